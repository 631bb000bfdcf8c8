"""The first guess: Faiss's spherical k-means, and with it the paper's hierarchical split.

Faiss works on one thread of this process: more of them add up in another order, and centers would differ by
machine. Cells are split on as many threads as torch has.

Shapes: n embeddings, G cells, K centers, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaregion.curation.kmeans.embeddings import Share, evenly, to_unit
from megaregion.curation.kmeans.nearest import in_order, nearest
from megaregion.errors import UserError

FLAT = 512
"""Most centers that are guessed at in one cell."""
CELL_SAMPLE, CENTER_SAMPLE = 256, 32
"""Embeddings that the first level sees for each of its cells, and the second for each of its centers."""
ITERATIONS = 10
"""Passes of either level: a guess need not have settled."""


@dataclass(frozen=True)
class Plan:
    """The sizes of one k-means."""

    clusters: int
    """Centers, K."""
    iterations: int
    """Most exact passes."""
    seed: int
    first_level: int = 0
    """Cells of the first guess, G; 0 takes the root of K, or 1 for few centers."""

    @property
    def cells(self) -> int:
        """Cells of the first guess, G."""
        return self.first_level or (1 if self.clusters <= FLAT else round(self.clusters**0.5))


def find_centers(
    vectors: NDArray[np.float32], clusters: int, iterations: int, seed: int, threads: int = 1
) -> tuple[NDArray[np.float32], list[float]]:
    """Cluster unit vectors by cosine with Faiss.

    Args:
        vectors: Unit vectors, float32 [n, C].
        clusters: Number of centers, K.
        iterations: Passes over the vectors.
        seed: Seed of the first centers.
        threads: Faiss's own; another number may change the last bits of the centers.

    Returns:
        Unit vectors, float32 [K, C], and after each pass the sum of the cosines to the nearest center.

    Raises:
        UserError: There are fewer vectors than centers.
    """
    import faiss

    check_enough(len(vectors), clusters)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        # Every vector counts; faiss would take a sample and warn about small clusters.
        every: dict[str, Any] = {"min_points_per_centroid": 1, "max_points_per_centroid": len(vectors)}
        means = faiss.Kmeans(vectors.shape[1], clusters, niter=iterations, seed=seed, spherical=True, **every)
        means.train(np.ascontiguousarray(vectors))
    finally:
        faiss.omp_set_num_threads(before)
    return np.asarray(means.centroids, dtype=np.float32), np.asarray(means.obj).tolist()


def first_guess(share: Share, plan: Plan) -> Tensor:
    """Centers found inside cells, each with as many as its size asks for: [K, C], the same on all ranks.

    Sample, cells and seeds do not depend on the ranks; each rank splits cells of its own.

    Raises:
        UserError: There are fewer embeddings than centers.
    """
    check_enough(share.usable, plan.clusters)
    rows = evenly(share.total, CENTER_SAMPLE * plan.clusters)
    cell_of = _route(share, rows, plan)
    if (cell_of >= 0).sum() < plan.clusters:
        # So many rows have no embedding that the sample has too few.
        rows = np.arange(share.total)
        cell_of = _route(share, rows, plan)
    sizes = np.bincount(cell_of[cell_of >= 0], minlength=plan.cells)
    counts = share_out(sizes, plan.clusters)
    centers = torch.zeros(plan.clusters, share.channels)
    first = np.cumsum(counts) - counts

    def split(cell: int) -> None:
        if counts[cell]:
            own = rows[cell_of == cell]
            own = own[evenly(len(own), max(share.chunk, int(counts[cell])))]
            found = find_centers(
                to_unit(share.read(own)), int(counts[cell]), ITERATIONS, plan.seed + 1 + cell
            )
            centers[first[cell] : first[cell] + counts[cell]] = torch.from_numpy(found[0])

    in_order(split, range(share.rank, plan.cells, share.ranks))
    return share.add(centers.to(share.device))


def _route(share: Share, rows: NDArray[np.int64], plan: Plan) -> NDArray[np.int64]:
    """The nearest cell of each sampled row, [len(rows)]; -1 without embedding."""
    cells = torch.zeros(plan.cells, share.channels)
    if share.rank == 0 and plan.cells > 1:
        # Room for rows without embedding, which are of no use here.
        sample = to_unit(share.read(rows[evenly(len(rows), 2 * CELL_SAMPLE * plan.cells)]))
        sample = sample[sample.any(axis=1)]
        sample = sample[evenly(len(sample), CELL_SAMPLE * plan.cells)]
        if len(sample) >= plan.cells:
            cells = torch.from_numpy(find_centers(sample, plan.cells, ITERATIONS, plan.seed)[0])
    cells = share.agree(cells.to(share.device))
    found = torch.zeros(len(rows), dtype=torch.int64, device=share.device)
    low, high = (len(rows) * place // share.ranks for place in (share.rank, share.rank + 1))
    for start in range(low, high, share.chunk):
        part = slice(start, min(start + share.chunk, high))
        vectors = torch.from_numpy(to_unit(share.read(rows[part]))).to(share.device)
        # Numbers from 1, so that the sum over ranks tells a row without embedding from cell 0.
        found[part] = torch.where(vectors.any(1), 1 + nearest(vectors, cells).labels, 0)
    return share.add(found).cpu().numpy() - 1


def share_out(sizes: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    """Centers of each cell by its size: largest remainders, never more than the cell has vectors.

    Args:
        sizes: Vectors in each cell, int64 [G].
        clusters: Centers to share out, K.

    Returns:
        Centers of each cell, int64 [G], whose sum is K; 0 for an empty cell.

    Raises:
        UserError: There are fewer vectors than centers.
    """
    check_enough(int(sizes.sum()), clusters)
    exact = sizes * (clusters / sizes.sum())
    shares = np.minimum(np.floor(exact).astype(np.int64), sizes)
    while (lacking := clusters - int(shares.sum())) > 0:
        # A stable order, so that every rank comes to the same.
        order = np.argsort(-(exact - shares), kind="stable")
        open_cells = order[shares[order] < sizes[order]][:lacking]
        shares[open_cells] += 1
    return shares


def check_enough(vectors: int, clusters: int) -> None:
    """Refuse more centers than vectors.

    Raises:
        UserError: There are fewer vectors than centers.
    """
    if not vectors:
        raise UserError(
            "no image has a region that can be embedded; loosen --min-edge, --max-area or --min-objectness"
        )
    if vectors < clusters:
        raise UserError(
            f"--clusters must be at most the {vectors} regions that were embedded, got {clusters}; "
            "use fewer clusters or more images"
        )
