"""Places on the map: the centers along their principal axes, or by UMAP where it is installed.

Shapes: K centers of C channels, A axes.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.settings import Projection
from megaregion.atlas.source import Floats

BLOCK = 65_536
"""Centers that are held in memory at once."""
AXES = 64
"""Principal axes that are computed; also what the search for neighbours looks at first."""
MARGIN = 0.03
"""Share of the map's side that stays free on each side."""


@dataclass(frozen=True)
class Places:
    """Where each cluster lies on the map."""

    position: Floats
    """x and y in 0..1, [K, 2]."""
    tint: NDArray[np.uint8]
    """Rank along the third axis, 0..255, [K]: a colour that adds what two axes cannot show."""


def principal_axes(centers: Floats) -> Floats:
    """The centers along their first axes, [K, A], A = min(C, 64); reads them twice, block by block."""
    channels = centers.shape[1]
    total, square = np.zeros(channels), np.zeros((channels, channels))
    for start in range(0, len(centers), BLOCK):
        block = np.asarray(centers[start : start + BLOCK], dtype=np.float64)
        total += block.sum(axis=0)
        square += block.T @ block
    mean = total / len(centers)
    _, vectors = np.linalg.eigh(square / len(centers) - np.outer(mean, mean))
    axes = vectors[:, ::-1][:, :AXES]
    # An axis has no direction of its own: point its greatest part upwards, so that maps do not flip.
    greatest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    axes = (axes * np.where(greatest < 0, -1, 1)).astype(np.float32)
    projected = np.empty((len(centers), axes.shape[1]), dtype=np.float32)
    for start in range(0, len(centers), BLOCK):
        block = np.asarray(centers[start : start + BLOCK], dtype=np.float32)
        projected[start : start + BLOCK] = (block - mean.astype(np.float32)) @ axes
    return projected


def place_clusters(axes: Floats, projection: Projection, seed: int) -> Places:
    """Lay the clusters out.

    Args:
        axes: From :func:`principal_axes`, [K, A].
        projection: pca takes the first two axes; umap unfolds all of them.
        seed: Seed of UMAP.
    """
    third = axes[:, 2] if axes.shape[1] > 2 else np.zeros(len(axes), dtype=np.float32)
    rank = np.empty(len(axes), dtype=np.int64)
    rank[np.argsort(third, kind="stable")] = np.arange(len(axes))
    tint = (rank * 255 // max(len(axes) - 1, 1)).astype(np.uint8)
    flat = _unfold(axes, seed) if projection == "umap" else np.zeros((len(axes), 2), dtype=np.float32)
    if projection == "pca":
        flat[:, : axes.shape[1]] = axes[:, :2]
    low, high = flat.min(axis=0), flat.max(axis=0)
    # One scale for both axes, or distances along them could not be compared.
    scale = (1 - 2 * MARGIN) / max(float((high - low).max()), 1e-12)
    return Places(((flat - (low + high) / 2) * scale + 0.5).astype(np.float32), tint)


def _unfold(axes: Floats, seed: int) -> Floats:
    umap = importlib.import_module("umap")
    # Fewer than four points have no neighbourhood to keep.
    if len(axes) < 4:
        return np.ascontiguousarray(np.pad(axes, ((0, 0), (0, 2)))[:, :2])
    neighbours = min(15, len(axes) - 1)
    model = umap.UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, init="pca", n_jobs=1)
    flat: Floats = np.asarray(model.fit_transform(axes), dtype=np.float32)
    return flat
