"""Region-based cluster discrimination, from raw images to a vision encoder; README.md is the map."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``megaregion.fit``, imported when it is asked for: a run that trains needs none of it."""
    if name == "fit":
        from importlib import import_module

        return import_module("megaregion.cli").fit
    raise AttributeError(f"module 'megaregion' has no attribute {name!r}")
