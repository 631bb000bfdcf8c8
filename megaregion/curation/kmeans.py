"""Exact spherical k-means over ranks: passes that assign every embedding to the nearest of all centers.

The first guess is the paper's hierarchical split: Faiss finds cells, then centers inside each cell.

What bounds prove unchanged is not scored again: each embedding keeps a bound on its cosine with all centers
but its own, which rises by no more than these move. The few that move far are scored against all embeddings,
so that the bound rises by the movement of the others alone.

No pass would mend a guess that has two centers where one cluster is, and one where there are two. So pairs
of centers are merged, and what that frees, like an empty center, takes half of the cluster that gains most.

Shapes: n embeddings of a chunk, G cells, K centers, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from megaregion.curation.embeddings import Share, evenly, to_unit
from megaregion.curation.nearest import ROUNDING, in_order, nearest, scan
from megaregion.curation.settings import ClusterSettings
from megaregion.errors import UserError
from megaregion.files import new_file

FLAT = 512
"""Most centers that are guessed at in one cell."""
CELL_SAMPLE, CENTER_SAMPLE = 256, 32
"""Embeddings that the guess sees for each of its cells, and for each center of a cell."""
GUESS_PASSES = 10
"""Passes of Faiss: a guess need not have settled."""
SLACK = ROUNDING[torch.float32]
JUMPERS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Sixty-fourths of the centers that may be scored against all embeddings because they moved furthest."""
HALVINGS = 4
"""Passes of the k-means that halves every cluster."""
WORTH = 1e-3
"""Share of the centers below which exchanges end."""


# The first guess


def find_centers(
    vectors: NDArray[np.float32], clusters: int, iterations: int, seed: int, threads: int = 1
) -> tuple[NDArray[np.float32], list[float]]:
    """Cluster unit vectors by cosine with Faiss.

    Args:
        vectors: Unit vectors, float32 [n, C].
        clusters: Number of centers, K.
        iterations: Passes over the vectors.
        seed: Seed of the first centers.
        threads: Faiss's own; another number adds up in another order and may change the centers' last bits.

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


def first_guess(share: Share, settings: ClusterSettings) -> Tensor:
    """Centers found inside cells, each with as many as its size asks for: [K, C], the same on all ranks.

    Sample, cells and seeds do not depend on the ranks; each rank splits cells of its own, on torch's threads.

    Raises:
        UserError: There are fewer embeddings than centers.
    """
    clusters, seed = settings.clusters, settings.cluster_seed
    check_enough(share.usable, clusters)
    count = settings.first_level or (1 if clusters <= FLAT else round(clusters**0.5))
    cells = _find_cells(share, count, seed)
    rows = evenly(share.total, CENTER_SAMPLE * clusters)
    cell_of = _route(share, rows, cells)
    if (cell_of >= 0).sum() < clusters:
        # So many rows have no embedding that the sample has too few.
        rows = np.arange(share.total)
        cell_of = _route(share, rows, cells)
    counts = share_out(np.bincount(cell_of[cell_of >= 0], minlength=len(cells)), clusters)
    centers = torch.zeros(clusters, share.channels)
    first = np.cumsum(counts) - counts

    def split(cell: int) -> None:
        if count := int(counts[cell]):
            own = rows[cell_of == cell]
            vectors = to_unit(share.read(own[evenly(len(own), max(share.chunk, count))]))
            found, _ = find_centers(vectors, count, GUESS_PASSES, seed + 1 + cell)
            centers[first[cell] : first[cell] + count] = torch.from_numpy(found)

    in_order(split, range(share.rank, len(cells), share.ranks))
    return share.add(centers.to(share.device))


def _find_cells(share: Share, count: int, seed: int) -> Tensor:
    """Centers of the cells, [G, C]; zeros where there is one, or too few embeddings in the sample."""
    cells = torch.zeros(count, share.channels)
    if share.rank == 0 and count > 1:
        # Room for rows without embedding, which are of no use here.
        sample = to_unit(share.read(evenly(share.total, 2 * CELL_SAMPLE * count)))
        sample = sample[sample.any(axis=1)]
        sample = sample[evenly(len(sample), CELL_SAMPLE * count)]
        if len(sample) >= count:
            cells = torch.from_numpy(find_centers(sample, count, GUESS_PASSES, seed)[0])
    return share.agree(cells.to(share.device))


def _route(share: Share, rows: NDArray[np.int64], cells: Tensor) -> NDArray[np.int64]:
    """The nearest cell of each row, [len(rows)]; -1 without embedding."""
    found = torch.zeros(len(rows), dtype=torch.int64, device=share.device)
    own = share.own(len(rows))
    for start in own[:: share.chunk]:
        part = slice(start, min(start + share.chunk, own.stop))
        vectors = torch.from_numpy(to_unit(share.read(rows[part]))).to(share.device)
        # Numbers from 1, so that the sum over ranks tells a row without embedding from cell 0.
        found[part] = torch.where(vectors.any(1), 1 + nearest(vectors, cells).labels, 0)
    return share.add(found).cpu().numpy() - 1


def share_out(sizes: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    """Centers of each cell, int64 [G], by its number of vectors: largest remainders, at most one a vector.

    Raises:
        UserError: There are fewer vectors than centers.
    """
    check_enough(int(sizes.sum()), clusters)
    exact = sizes * (clusters / sizes.sum())
    shares = np.minimum(np.floor(exact).astype(np.int64), sizes)
    while (lacking := clusters - int(shares.sum())) > 0:
        # A stable order, so that every rank comes to the same.
        order = np.argsort(-(exact - shares), kind="stable")
        shares[order[shares[order] < sizes[order]][:lacking]] += 1
    return shares


def check_enough(vectors: int, clusters: int) -> None:
    """Raise UserError where there are fewer vectors than centers."""
    if not vectors:
        raise UserError(
            "no image has a region that can be embedded; loosen --min-edge, --max-area or --min-objectness"
        )
    if vectors < clusters:
        raise UserError(
            f"--clusters must be at most the {vectors} regions that were embedded, got {clusters}; "
            "use fewer clusters or more images"
        )


# The passes


class Known(NamedTuple):
    """Of each embedding of a chunk the nearest center, int64 [n], and what no other's cosine exceeds, [n]."""

    labels: Tensor
    other: Tensor


class Pass(NamedTuple):
    """What the caller of :func:`cluster` is told after each pass."""

    number: int
    centers: Tensor
    """Those that the next pass starts from."""
    cosine: float
    """Mean cosine of an embedding to the center that it chose."""
    exchanged: int
    """Centers that were freed or empty and took half of a cluster."""
    scored: float
    """Share of all scores, embeddings times centers, that had to be looked at."""


class Progress(NamedTuple):
    """The file that keeps the centers after each pass, so that a kill costs one."""

    path: Path
    key: str
    """What the centers are made from; what another key left is of no use."""

    def load(self) -> tuple[int, bool, Tensor] | None:
        """Passes that are done, whether exchanges go on, and centers; None if there is nothing of use."""
        with suppress(OSError, ValueError, KeyError, EOFError), np.load(self.path, allow_pickle=False) as old:
            if str(old["key"]) == self.key:
                return int(old["done"]), bool(old["mending"]), torch.from_numpy(old["centers"])
        return None

    def save(self, done: int, mending: bool, centers: Tensor) -> None:
        """Keep the centers after a pass."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.path) as file:
            np.savez(file, key=self.key, done=done, mending=mending, centers=centers.cpu().numpy())


def cluster(
    share: Share,
    settings: ClusterSettings,
    progress: Progress | None = None,
    on_pass: Callable[[Pass], None] | None = None,
) -> Tensor:
    """Find centers; all ranks call it together, each with its share.

    The outcome is a function of the embeddings, the settings, the ranks and the chunks: threads and kills
    change no bit of it.

    Returns:
        Unit vectors, float32 [K, C], the same on every rank.

    Raises:
        UserError: There are fewer embeddings than centers.
    """
    clusters, most, seed = settings.clusters, settings.cluster_iterations, settings.cluster_seed
    done, mending, centers = _begin(share, settings, progress)
    known: list[Known] = []
    moved = torch.zeros(clusters, device=share.device)
    for number in range(done + 1, most + 1):
        sums, before, known = torch.zeros_like(centers), known, []
        counts = torch.zeros(clusters, dtype=torch.int64, device=share.device)
        told = torch.zeros(2, dtype=torch.float64, device=share.device)
        for place, vectors in enumerate(share):
            found, scored = assign(vectors, centers, before[place] if before else None, moved)
            add_up(sums, vectors, found.labels)
            counts += torch.bincount(found.labels, minlength=clusters)
            told += torch.stack([dot(vectors, centers[found.labels]).double().sum(), told.new_tensor(scored)])
            known.append(found)
        for values in (sums, counts, told):
            share.add(values)
        # Embeddings that cancel out leave no direction; the center stays where it was.
        new, exchanged = torch.where(sums.any(1, keepdim=True), normalize(sums), centers), 0
        if (mending and number <= most // 2) or not bool(counts.all()):
            exchanged = exchange(share, new, sums, counts, [each.labels for each in known], seed + number)
            mending = exchanged > WORTH * clusters
        share.agree(new)
        moved, centers = (new - centers).norm(dim=1), new
        settled = not bool(moved.any())
        if progress and share.rank == 0:
            progress.save(most if settled else number, mending, centers)
        if on_pass:
            cosine, scored = (told / share.usable).tolist()
            on_pass(Pass(number, centers, cosine, exchanged, scored / clusters))
        if settled:
            break
    return centers


def _begin(share: Share, settings: ClusterSettings, progress: Progress | None) -> tuple[int, bool, Tensor]:
    """What the first rank finds saved, else a first guess."""
    saved = progress.load() if progress and share.rank == 0 else None
    done, mending, centers = saved or (0, True, torch.zeros(settings.clusters, share.channels))
    done, mending = share.agree(torch.tensor([done, mending], device=share.device)).tolist()
    centers = centers.to(share.device) if done else first_guess(share, settings)
    return done, bool(mending), share.agree(centers)


def dot(some: Tensor, others: Tensor) -> Tensor:
    """Row by row, [n]: the same bits whatever the rows beside."""
    return (some * others).sum(1)


def add_up(sums: Tensor, vectors: Tensor, labels: Tensor) -> None:
    """Add each vector, [n, C], to the float32 sum of its label, [K, C], always in the order of the rows."""
    if sums.device.type == "cpu":
        sums.index_add_(0, labels, vectors)
    else:
        _add_segments(sums, vectors, labels)


def _add_segments(sums: Tensor, vectors: Tensor, labels: Tensor) -> None:
    """A GPU's index_add_ adds in any order; sorted, each label is one segment and there is one order."""
    order = labels.argsort(stable=True)
    present, lengths = labels[order].unique_consecutive(return_counts=True)
    sums[present] += torch.segment_reduce(vectors[order], "sum", lengths=lengths, axis=0)


def assign(vectors: Tensor, centers: Tensor, known: Known | None, moved: Tensor) -> tuple[Known, int]:
    """The nearest of all centers, from what was known before they moved.

    Args:
        vectors: Unit vectors, float32 [n, C].
        centers: Where the centers are now, [K, C].
        known: Of the pass before; None if nothing is.
        moved: How far each center has moved since, [K].

    Returns:
        What is known now, and how many scores were looked at.
    """
    if known is None:
        found = nearest(vectors, centers)
        return Known(found.labels, found.other), len(vectors) * len(centers)
    labels, other = known.labels.clone(), known.other
    own = dot(vectors, centers[labels])
    jumpers, rise, scores = _jumpers(own - other, moved)
    other = other + rise
    again = own - other <= SLACK
    rest = (~again).nonzero()[:, 0]
    if len(jumpers) and len(rest):
        found, mine, before = scan(vectors[rest], centers[jumpers]), own[rest], labels[rest]
        place = jumpers[found.labels]
        rival = torch.where(place == before, found.other, found.best)
        takes = rival > mine
        labels[rest] = torch.where(takes, place, before)
        beaten = torch.where(takes, torch.maximum(mine, found.other), rival) + SLACK
        other[rest] = torch.maximum(other[rest], beaten)
        again[rest] = torch.maximum(mine, rival) - other[rest] <= SLACK
    rows = again.nonzero()[:, 0]
    if len(rows):
        labels[rows], _, other[rows] = nearest(vectors[rows], centers)
    return Known(labels, other), scores


def _jumpers(margins: Tensor, moved: Tensor) -> tuple[Tensor, Tensor, int]:
    """The centers to score against all embeddings, how far the others moved at most, and what both cost.

    The margins, [n], say by how much each embedding's own center is nearer than any other could be.
    """
    n, k = len(margins), len(moved)
    far = moved.argsort(descending=True, stable=True)
    sizes = [k * part // 64 for part in JUMPERS]
    rises = moved[far[sizes]]
    fails = torch.searchsorted(margins.sort().values, rises + SLACK, right=True).tolist()
    costs = [fail * k + (n - fail) * size for fail, size in zip(fails, sizes, strict=True)]
    best = int(np.argmin(costs))
    return far[: sizes[best]], rises[best], costs[best]


# Exchanges


def exchange(
    share: Share, centers: Tensor, sums: Tensor, counts: Tensor, labels: Sequence[Tensor], seed: int
) -> int:
    """Merge pairs of clusters and halve others, in place, where the sum of cosines rises by it.

    What a pair loses and what halves gain are exact for the members as they are, and no cluster takes part
    twice. An empty center is free at once. Where all members of a cluster are the same, nothing is gained.

    Args:
        share: This rank's embeddings.
        centers: Means of the pass, unit vectors [K, C].
        sums: Sum of each cluster, [K, C].
        counts: Embeddings of each, [K].
        labels: Of each chunk of the share.
        seed: Seed of the direction in which clusters are cut first.

    Returns:
        Centers that took half of a cluster.
    """
    lengths, filled = sums.norm(dim=1), counts > 0
    halves = _halve(share, sums / counts.clamp(min=1)[:, None], labels, seed)
    gains = (halves.norm(dim=2).sum(1) - lengths * (1 + SLACK)) * (1 - WORTH) * filled
    first, second = _pairs(share, centers, filled)
    losses = lengths[first] + lengths[second] - (sums[first] + sums[second]).norm(dim=1)
    order = losses.argsort(stable=True)
    first, second = first[order], second[order]
    empty = (~filled).nonzero()[:, 0]
    # Cheapest first.
    freed = torch.cat([empty, second])
    prices = torch.cat([losses.new_zeros(len(empty)), losses[order]])

    def worthwhile() -> int:
        return int((gains.sort(descending=True).values[: len(prices)] > prices).sum())

    pairs = max(0, worthwhile() - len(empty))
    gains[first[:pairs]] = gains[second[:pairs]] = 0
    taken = worthwhile()
    pairs = max(0, taken - len(empty))
    halved = gains.argsort(descending=True, stable=True)[:taken]
    centers[first[:pairs]] = normalize(sums[first[:pairs]] + sums[second[:pairs]])
    centers[halved], centers[freed[:taken]] = normalize(halves[halved], dim=2).unbind(1)
    return taken


def _pairs(share: Share, centers: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """Clusters that are each other's nearest, each pair once; every rank looks for some of them."""
    numbers = torch.arange(len(centers), device=centers.device)
    span = share.own(len(centers))
    own = numbers[span.start : span.stop]
    partner = torch.zeros_like(numbers)
    partner[own] = nearest(centers[own], centers, but=own).labels
    share.add(partner)
    first = ((partner[partner] == numbers) & (numbers < partner) & filled & filled[partner]).nonzero()[:, 0]
    return first, partner[first]


def _halve(share: Share, means: Tensor, labels: Sequence[Tensor], seed: int) -> Tensor:
    """Sums of two halves of every cluster, [K, 2, C]: two-means in each, begun along a random direction."""
    k, channels = means.shape
    random = np.random.Generator(np.random.Philox(key=seed)).standard_normal((1, channels), dtype=np.float32)
    toward = torch.from_numpy(random).to(means.device).expand(k, channels)
    middle = dot(means, toward)
    for _ in range(HALVINGS):
        sums = means.new_zeros(2 * k, channels)
        for vectors, own in zip(share, labels, strict=True):
            add_up(sums, vectors, 2 * own + (dot(vectors, toward[own]) > middle[own]))
        halves = share.add(sums).view(k, 2, channels)
        low, high = normalize(halves, dim=2).unbind(1)
        toward, middle = high - low, torch.zeros_like(middle)
    return halves
