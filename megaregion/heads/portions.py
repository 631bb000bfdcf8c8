"""How much the heads work on at a time.

Several passes follow each other over the same elements. On a processor a portion stays in its cache between
them; on a GPU it keeps the device busy for longer than its host takes to start the next pass.

Shapes: K lines, E width.
"""

from __future__ import annotations

from torch import Tensor

ELEMENTS = {"processor": 1 << 17, "gpu": 1 << 22}
"""Elements of centers, gradients and moments."""
SCORES = {"processor": 1 << 19, "gpu": 1 << 23}
"""Scores of a tile, between two matrix products; a GPU's lie in its L2 cache (33 MB of an H100's 50)."""


def kind_of_device(matrix: Tensor) -> str:
    """Key of the tables above."""
    return "processor" if matrix.device.type == "cpu" else "gpu"


def lines_at_a_time(matrix: Tensor) -> int:
    """Lines of a matrix [K, E] that make a portion, at least 1."""
    return max(1, ELEMENTS[kind_of_device(matrix)] // max(1, matrix.shape[1]))
