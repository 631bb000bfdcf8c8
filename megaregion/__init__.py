"""Region-based cluster discrimination, from raw images to a vision encoder; README.md is the map."""

import sys

from megaregion.errors import tell_uncaught

# Before anything heavy is imported: Ctrl-C may come at once.
sys.excepthook = tell_uncaught

__version__ = "0.1.0"
