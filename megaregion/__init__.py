"""Region-based cluster discrimination, from raw images to a vision encoder; README.md is the map."""

__version__ = "0.1.0"
