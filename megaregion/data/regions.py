"""Which regions of an image are learned from, and which patches each of them sees.

Shapes: N regions, P = rows * columns patches in row-major order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megaregion.data.mask import RLE, mask_area, overlap
from megaregion.data.view import View

TOLERANCE = 1e-9
"""Rounding must not decide whether a patch that is covered by exactly the threshold is visible."""


def sample_regions(kept: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose exactly n of the regions that an image has left.

    Args:
        kept: Number of regions, at least 1.
        n: Number wanted: a random subset of more; of fewer all, and then repeats at random.
        rng: Generator of this sample.

    Returns:
        Indices of the chosen regions, [n].
    """
    if kept >= n:
        return np.sort(rng.choice(kept, n, replace=False))
    return np.concatenate([np.arange(kept), rng.integers(kept, size=n - kept)])


def visibility(
    boxes: NDArray[np.float64],
    masks: Sequence[RLE | None],
    view: View,
    rows: int,
    columns: int,
    coverage: float,
) -> NDArray[np.bool_]:
    """Find the patches that each region sees: those it covers by at least a given share.

    A region that would see no patch sees the one nearest to its center, because attention over
    nothing is undefined.

    Args:
        boxes: Boxes in pixels of the stored image, [N, 4].
        masks: Exact shapes where known; a region with a mask is judged by it and not by its box.
        view: The part of the stored image that the patches divide.
        rows: Patches from top to bottom.
        columns: Patches from left to right.
        coverage: Least share of a patch that a region must cover.

    Returns:
        True where region n sees patch p, bool [N, P].
    """
    x_edges, y_edges = view.edges(rows, columns)
    x_share = overlap(x_edges, boxes[:, 0], boxes[:, 2]) / (x_edges[1] - x_edges[0])
    y_share = overlap(y_edges, boxes[:, 1], boxes[:, 3]) / (y_edges[1] - y_edges[0])
    share = y_share.T[:, :, None] * x_share.T[:, None, :]
    inside = np.minimum(np.maximum(boxes, (view.x0, view.y0) * 2), (view.x1, view.y1) * 2)
    middle = (inside[:, :2] + inside[:, 2:]) / 2
    patch_area = (x_edges[1] - x_edges[0]) * (y_edges[1] - y_edges[0])
    for n, mask in enumerate(masks):
        if mask is None:
            continue
        share[n] = mask_area(mask, x_edges, y_edges) / patch_area
        if (total := share[n].sum()) > 0:
            middle[n, 0] = share[n].sum(axis=0) @ (x_edges[:-1] + x_edges[1:]) / 2 / total
            middle[n, 1] = share[n].sum(axis=1) @ (y_edges[:-1] + y_edges[1:]) / 2 / total
    visible = (share >= coverage - TOLERANCE) & (share > 0)
    blind = np.flatnonzero(~visible.any(axis=(1, 2)))
    if blind.size:
        column = np.searchsorted(x_edges, middle[blind, 0], side="right") - 1
        row = np.searchsorted(y_edges, middle[blind, 1], side="right") - 1
        visible[blind, np.clip(row, 0, rows - 1), np.clip(column, 0, columns - 1)] = True
    if view.flipped:
        visible = visible[:, :, ::-1]
    return visible.reshape(len(boxes), rows * columns)
