"""Region masks as run lengths, in COCO's uncompressed form, and how much of a patch they cover.

Shapes: h x w pixels of the stored image, g x g patches of the crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RLE:
    """A binary mask as runs of zeros and ones in turn, column by column, zeros first.

    Raises:
        ValueError: The runs are negative or do not add up to the size.
    """

    size: tuple[int, int]
    """Height and width of the image, in pixels."""
    counts: tuple[int, ...]
    """Lengths of the runs; the first is of zeros and may be 0."""

    def __post_init__(self) -> None:
        height, width = self.size
        if min(self.counts, default=-1) < 0 or sum(self.counts) != height * width:
            raise ValueError(f"mask runs do not add up to {height} x {width} pixels")

    @property
    def area(self) -> int:
        """Pixels inside the mask."""
        return sum(self.counts[1::2])


def encode_mask(mask: NDArray[np.bool_]) -> RLE:
    """Run lengths of a mask, bool [h, w]."""
    height, width = mask.shape
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = np.concatenate([[0] if flat.size and flat[0] else [], changes, [flat.size]]).astype(np.int64)
    return RLE((height, width), tuple(np.diff(ends, prepend=0).tolist()))


def decode_mask(rle: RLE) -> NDArray[np.bool_]:
    """The mask of some run lengths, bool [h, w]."""
    height, width = rle.size
    inside = np.arange(len(rle.counts)) % 2 == 1
    return np.repeat(inside, rle.counts).reshape(width, height).T


def mask_area(rle: RLE, x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exact area of the mask in each cell of a grid, without decoding the mask.

    The number of ones among the first t pixels, column by column, is a piecewise linear function
    of t with its knots at the ends of the runs. So the part of a column between two heights is a
    difference of two interpolations, and the cells follow by weighting the columns.

    Args:
        rle: The mask.
        x_edges: Rising borders of the cells in pixels, [g + 1], within 0..w.
        y_edges: Rising borders of the cells in pixels, [g + 1], within 0..h.

    Returns:
        Area in square pixels, [g, g], rows first.
    """
    first, last = int(np.floor(x_edges[0])), int(np.ceil(x_edges[-1]))
    columns = np.arange(first, last)
    counts = np.asarray(rle.counts, dtype=np.int64)
    ones = np.where(np.arange(counts.size) % 2 == 1, counts, 0)
    places = columns[:, None] * rle.size[0] + y_edges[None, :]
    heights = np.diff(np.interp(places, np.cumsum(counts), np.cumsum(ones)), axis=1)
    return (overlap(x_edges, columns, columns + 1) @ heights).T


def overlap(
    edges: NDArray[np.float64],
    starts: NDArray[np.generic] | Sequence[float],
    ends: NDArray[np.generic] | Sequence[float],
) -> NDArray[np.float64]:
    """Length that each cell of a row shares with each interval.

    Args:
        edges: Rising borders of the cells, [g + 1].
        starts: Starts of the intervals, [k].
        ends: Ends of the intervals, [k].

    Returns:
        Shared lengths, [g, k].
    """
    length = np.minimum.outer(edges[1:], ends)
    length -= np.maximum.outer(edges[:-1], starts)
    return np.maximum(length, 0.0, out=length)
