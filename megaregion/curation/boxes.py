"""Boxes: their sizes, their overlaps, and an order that prefers different places.

Shapes: R and S boxes, [R, 4], as x0, y0, x1, y1 in pixels; x1 and y1 exclusive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels; x1 and y1 exclusive."""

Boxes = NDArray[np.float64]
"""[R, 4]"""


def as_array(boxes: Sequence[Box]) -> Boxes:
    """Boxes as an array, [R, 4], also when there is none."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def area(boxes: Boxes) -> NDArray[np.float64]:
    """Area of each box in square pixels, [R]; zero for one that is empty or turned inside out."""
    return np.clip(boxes[:, 2] - boxes[:, 0], 0, None) * np.clip(boxes[:, 3] - boxes[:, 1], 0, None)


def intersection(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Area that each box shares with each of the others, [R, S]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def iou(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Intersection over union of each box with each of the others, [R, S]."""
    shared = intersection(boxes, others)
    union = area(boxes)[:, None] + area(others)[None] - shared
    return shared / np.maximum(union, 1e-9)


def nms(boxes: Boxes, scores: NDArray[np.float64], limit: float, crowding: float = 0.0) -> NDArray[np.int64]:
    """Order boxes so that every prefix holds good ones of different places; leave near-equal ones out.

    Greedy: the next box is the one with the best score, less a penalty for lying inside, or around, one
    that was taken before. So the whole object comes first, then the other objects, then their parts.

    Args:
        boxes: [R, 4].
        scores: Higher is better, [R]; of equal ones the earlier wins.
        limit: Greatest IoU of two boxes that are both taken.
        crowding: Penalty of a box that lies wholly inside a taken one, in units of the score. 0 gives
            plain non-maximum suppression.

    Returns:
        Rows in the order in which they were taken.
    """
    shared, sizes = intersection(boxes, boxes), np.maximum(area(boxes), 1e-9)
    overlap = shared / (sizes[:, None] + sizes[None] - shared)
    nested = shared / np.minimum(sizes[:, None], sizes[None])
    merit, crowd = scores.astype(np.float64), np.zeros(len(boxes))
    open_rows = np.ones(len(boxes), dtype=bool)
    taken: list[int] = []
    while open_rows.any():
        best = int(np.where(open_rows, merit - crowding * crowd, -np.inf).argmax())
        taken.append(best)
        open_rows &= overlap[best] <= limit
        open_rows[best] = False
        crowd = np.maximum(crowd, nested[best])
    return np.array(taken, dtype=np.int64)
