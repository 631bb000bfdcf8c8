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
        # As choice() without replacement, at half its time.
        return np.sort(rng.permutation(kept)[:n])
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
    width, height = x_edges[1] - x_edges[0], y_edges[1] - y_edges[0]
    x_share = overlap(x_edges, boxes[:, 0], boxes[:, 2])
    y_share = overlap(y_edges, boxes[:, 1], boxes[:, 3])
    x_share /= width
    y_share /= height
    share = y_share.T[:, :, None] * x_share.T[:, None, :]
    for n, mask in enumerate(masks):
        if mask is not None:
            share[n] = mask_area(mask, x_edges, y_edges) / (width * height)
    visible = share >= max(coverage - TOLERANCE, np.nextafter(0, 1))
    blind = np.flatnonzero(~visible.reshape(len(boxes), rows * columns).any(axis=1))
    for n in blind.tolist():
        x, y = _middle(boxes[n], share[n] if masks[n] is not None else None, view, x_edges, y_edges)
        column = min(max(int(np.searchsorted(x_edges, x, side="right")) - 1, 0), columns - 1)
        row = min(max(int(np.searchsorted(y_edges, y, side="right")) - 1, 0), rows - 1)
        visible[n, row, column] = True
    if view.flipped:
        visible = visible[:, :, ::-1]
    return visible.reshape(len(boxes), rows * columns)


def _middle(
    box: NDArray[np.float64],
    share: NDArray[np.float64] | None,
    view: View,
    x_edges: NDArray[np.float64],
    y_edges: NDArray[np.float64],
) -> tuple[float, float]:
    """Center of the part of a region that is in the view: of its mask, if that has any area there."""
    if share is not None and (total := share.sum()) > 0:
        x = share.sum(axis=0) @ (x_edges[:-1] + x_edges[1:]) / 2 / total
        y = share.sum(axis=1) @ (y_edges[:-1] + y_edges[1:]) / 2 / total
        return float(x), float(y)
    x0, y0, x1, y1 = np.clip(box, (view.x0, view.y0) * 2, (view.x1, view.y1) * 2).tolist()
    return (x0 + x1) / 2, (y0 + y1) / 2
