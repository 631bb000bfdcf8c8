"""One basis of principal components for many feature maps, and the colours that it gives them.

Shapes: C channels, h x w cells of a map, n cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.maps import SceneMap

COLOURS = 3
MOST_CELLS = 100_000
"""Cells that a basis is fitted on, evenly strided over all maps."""


@dataclass(frozen=True)
class Basis:
    """Three directions, fitted once and used for every picture."""

    mean: NDArray[np.float32]
    """[C]."""
    directions: NDArray[np.float32]
    """[C, 3], most variance first."""
    low: NDArray[np.float32]
    """Value of each component that is drawn as 0, [3]."""
    high: NDArray[np.float32]
    """Value of each component that is drawn as 255, [3]."""
    explained: float
    """Share of the cells' variance that the three hold."""

    def project(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Components of features [..., C], as [..., 3]."""
        components = (features - self.mean) @ self.directions
        return components.astype(np.float32, copy=False)

    def colours(self, components: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Components [h, w, 3] as red, green and blue."""
        scaled = (components - self.low) / np.maximum(self.high - self.low, 1e-9)
        colours: NDArray[np.uint8] = (255 * np.clip(scaled, 0, 1)).round().astype(np.uint8)
        return colours


def fit_basis(maps: Sequence[SceneMap]) -> Basis:
    """Fit the basis on the cells of all maps.

    Args:
        maps: Feature maps of one encoder, [h, w, C] each.
    """
    cells = np.concatenate([own.reshape(-1, own.shape[-1]) for own in maps])
    cells = cells[:: max(1, len(cells) // MOST_CELLS)]
    mean = cells.mean(axis=0)
    centred = (cells - mean).astype(np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    directions = vectors[:, ::-1][:, :COLOURS]
    if directions.shape[1] < COLOURS:
        directions = np.pad(directions, ((0, 0), (0, COLOURS - directions.shape[1])))
    # The sign of an eigenvector is chance; fixed so, the same features give the same picture.
    directions = directions * np.where(
        directions[np.abs(directions).argmax(axis=0), range(COLOURS)] < 0, -1, 1
    )
    components = centred @ directions
    low, high = np.quantile(components, (0.01, 0.99), axis=0)
    return Basis(
        mean.astype(np.float32),
        directions.astype(np.float32),
        low.astype(np.float32),
        high.astype(np.float32),
        float(values[::-1][:COLOURS].sum() / max(values.sum(), 1e-12)),
    )
