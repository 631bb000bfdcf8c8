"""DeepSpeed's room: nothing outside this folder imports it."""

from megaregion.parallel.zero.engine import ZeroEngine

__all__ = ["ZeroEngine"]
