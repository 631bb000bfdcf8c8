"""Nearest centers among very many: a few cells of centers are looked through, then the best one's neighbours.

Exact within the cells that are probed; with as many probes as cells, exact.

Shapes: n vectors of C channels, K centers, L cells of centers, M neighbours of a center.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.kmeans.features import Vectors, in_chunks
from megaregion.curation.kmeans.hierarchy import Labels, climb, find_neighbours, in_order
from megaregion.curation.kmeans.kmeans import find_centers, nearest, nearest_centers

ALL = 4096
"""Most centers that are all looked at: cells would not be faster."""
CLIMBS = 2
"""Moves to the nearest center around the best one so far; a third finds next to nothing."""
NEIGHBOURS = 64
"""Neighbours M of a center that a move looks at."""
BLOCK = 32
"""Consecutive centers whose vectors and neighbours are looked at together."""
CELL_ITERATIONS = 10
"""Passes of the k-means over the centers."""


@dataclass(frozen=True)
class Probing:
    """Centers, sorted by cell, and what finds the nearest of them."""

    centers: Vectors
    """Unit vectors, float32 [K, C]; those of a cell follow one another."""
    cells: Vectors
    """Center of each cell, float32 [L, C]."""
    first: NDArray[np.int64]
    """Number of each cell's first center, [L + 1]."""
    neighbours: Labels
    """Centers near each center, int32 [K, M]."""

    def find(self, vectors: Vectors, probes: int) -> tuple[NDArray[np.int64], Vectors]:
        """Label vectors with the nearest center that is found.

        Args:
            vectors: Unit vectors, float32 [n, C].
            probes: Cells that are looked through for each vector; 0, or as many as there are, finds the
                nearest of all centers.

        Returns:
            Labels, int64 [n], and cosines to the chosen centers, float32 [n].
        """
        if not probes or probes >= len(self.cells):
            return nearest_centers(vectors, self.centers)
        labels = self._probe(vectors, probes)
        for _ in range(CLIMBS):
            labels, cosines = climb(vectors, labels, self.centers, self.neighbours, BLOCK)
        return labels, cosines

    def _probe(self, vectors: Vectors, probes: int) -> NDArray[np.int64]:
        """Nearest center within the nearest cells; a cell's vectors are scored by one matrix product."""
        probed = nearest(vectors, self.cells, probes)[0].ravel()
        order = np.argsort(probed, kind="stable")
        bounds = np.searchsorted(probed[order], np.arange(len(self.cells) + 1))
        best = np.full(len(vectors), -np.inf, dtype=np.float32)
        labels = np.zeros(len(vectors), dtype=np.int64)
        for cell in range(len(self.cells)):
            low, high = self.first[cell : cell + 2].tolist()
            rows = order[bounds[cell] : bounds[cell + 1]] // probes
            if low == high or not len(rows):
                continue
            found, cosines = nearest(vectors[rows], self.centers[low:high], 1)
            better = cosines[:, 0] > best[rows]
            best[rows[better]] = cosines[better, 0]
            labels[rows[better]] = found[better, 0] + low
        return labels


def build_probing(centers: Vectors, seed: int, threads: int = 1) -> Probing:
    """Sort centers into cells and find the neighbours of each.

    The centers get new numbers: those of a cell follow one another.

    Args:
        centers: Unit vectors, float32 [K, C].
        seed: Seed of the k-means over them.
        threads: Parts of the search for neighbours that are worked on at once.
    """
    count = max(1, round(2 * len(centers) ** 0.5))
    cells = find_centers(centers, min(count, len(centers)), CELL_ITERATIONS, seed).centers
    cell_of = nearest_centers(centers, cells)[0]
    order = np.argsort(cell_of, kind="stable")
    ordered = centers[order]
    first = np.searchsorted(cell_of[order], np.arange(len(cells) + 1)).astype(np.int64)
    count = min(NEIGHBOURS, len(ordered))
    near = in_order(
        threads, lambda part: find_neighbours(part, ordered, count), list(in_chunks(ordered, 1024))
    )
    return Probing(ordered, cells, first, np.concatenate(near))
