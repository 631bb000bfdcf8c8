"""Exact spherical k-means over ranks: every pass assigns each embedding to the nearest of all centers.

What bounds prove unchanged is not scored again: each embedding keeps a bound on its cosine with all centers
but its own, which rises by no more than these move. The few that move far are scored against all embeddings,
so that the bound rises by the movement of the others alone. No pass would mend a guess that has two centers
where one cluster is, and one where there are two. So pairs of centers are merged, and what that frees, like
an empty center, takes half of the cluster that gains most.

Shapes: n embeddings of a chunk, G cells, K centers, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from megaregion.curation.embeddings import Embeddings, evenly, unit
from megaregion.curation.nearest import ROUNDING, Nearest, dot, nearest, scan
from megaregion.curation.settings import ClusterSettings
from megaregion.errors import UserError
from megaregion.files import new_file
from megaregion.processor import in_order

FLAT = 512
"""Most centers that are guessed at in one cell."""
CELL_SAMPLE, CENTER_SAMPLE, GUESS_PASSES = 256, 32, 10
"""Embeddings that the guess sees for each cell, and for each center of a cell; passes: it need not settle."""
SLACK = ROUNDING[torch.float32]
JUMPERS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Sixty-fourths of the centers that may be scored against all embeddings because they moved furthest."""
HALVINGS = 4
"""Passes of the k-means that halves every cluster."""
WORTH = 1e-3
"""Share of the centers below which exchanges end."""


def find_centers(
    vectors: NDArray[np.float32], clusters: int, iterations: int, seed: int, threads: int = 1
) -> tuple[NDArray[np.float32], list[float]]:
    """Cluster unit vectors, float32 [n, C], by cosine with Faiss; n is at least K.

    Gives unit vectors, float32 [K, C], and after each pass the sum of the cosines to the nearest center.
    Another number of threads adds up in another order and may change the centers' last bits.
    """
    import faiss

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


def first_guess(embeddings: Embeddings, settings: ClusterSettings) -> Tensor:
    """The paper's hierarchical split: centers inside cells, each with as many as its size asks for, [K, C].

    Sample, cells and seeds do not depend on the ranks; each rank splits cells of its own, on torch's threads.
    Raises UserError where there are fewer embeddings than centers.
    """
    clusters, seed, total = settings.clusters, settings.cluster_seed, embeddings.total
    cells = find_cells(embeddings, settings)
    for rows in (evenly(total, CENTER_SAMPLE * clusters), np.arange(total)):
        cell_of = _route(embeddings, rows, cells)
        if (cell_of >= 0).sum() >= clusters:
            break
        # So many rows have no embedding that the sample has too few: all are looked at.
    counts = share_out(np.bincount(cell_of[cell_of >= 0], minlength=len(cells)), clusters)
    centers = torch.zeros(clusters, embeddings.channels)
    first = np.cumsum(counts) - counts

    def split(cell: int) -> None:
        if count := int(counts[cell]):
            own = rows[cell_of == cell]
            vectors = unit(embeddings.read(own[evenly(len(own), max(embeddings.chunk, count))]))
            found, _ = find_centers(vectors, count, GUESS_PASSES, seed + 1 + cell)
            centers[first[cell] : first[cell] + count] = torch.from_numpy(found)

    in_order(split, embeddings.own(len(cells)))
    return embeddings.add(centers.to(embeddings.device))


def find_cells(embeddings: Embeddings, settings: ClusterSettings) -> Tensor:
    """Centers of the cells, [G, C]; zeros where there is one, or too few embeddings in the sample."""
    clusters = settings.clusters
    count = settings.first_level or (1 if clusters <= FLAT else round(clusters**0.5))
    cells = torch.zeros(count, embeddings.channels)
    if embeddings.rank == 0 and count > 1:
        sample = unit(embeddings.read(evenly(embeddings.total, CELL_SAMPLE * count)))
        sample = sample[sample.any(axis=1)]
        if len(sample) >= count:
            cells = torch.from_numpy(find_centers(sample, count, GUESS_PASSES, settings.cluster_seed)[0])
    return embeddings.agree(cells.to(embeddings.device))


def _route(embeddings: Embeddings, rows: NDArray[np.int64], cells: Tensor) -> NDArray[np.int64]:
    """The nearest cell of each row, [len(rows)]; -1 without embedding."""
    found = torch.zeros(len(rows), dtype=torch.int64, device=embeddings.device)
    own = embeddings.own(len(rows))
    for start in own[:: embeddings.chunk]:
        part = slice(start, min(start + embeddings.chunk, own.stop))
        # Numbers from 1, so that the sum over ranks tells a row without embedding from cell 0.
        found[part] = 1 + label_rows(embeddings.read(rows[part]), cells)[0]
    return embeddings.add(found).cpu().numpy() - 1


def share_out(sizes: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    """Centers of each cell, int64 [G], by its number of vectors: largest remainders, at most one a vector."""
    total = int(sizes.sum())
    if not total:
        raise UserError(
            "no image has a region that can be embedded; loosen --min-edge, --max-area or --min-objectness"
        )
    if total < clusters:
        raise UserError(
            f"--clusters must be at most the {total} regions that were embedded, got {clusters}; "
            "use fewer clusters or more images"
        )
    shares, remainders = np.divmod(sizes * clusters, total)
    # A stable order, so that every rank comes to the same.
    shares[np.argsort(-remainders, kind="stable")[: clusters - shares.sum()]] += 1
    return shares


def label_rows(
    rows: NDArray[np.floating], centers: Tensor, but: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest center of each row, int64 [n], -1 for one without embedding, and the cosine to it, [n].

    With ``but``, int64 [n, m], the centers that each row may not choose.
    """
    vectors = torch.from_numpy(unit(rows)).to(centers.device)
    usable = vectors.any(1)
    if not usable.all():
        vectors, but = vectors[usable], None if but is None else but[usable]
    found = nearest(vectors, centers, but)
    labels = found.labels.new_full((len(rows),), -1).masked_scatter_(usable, found.labels)
    return labels, found.best.new_zeros(len(rows)).masked_scatter_(usable, found.best)


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


class SavedPass(NamedTuple):
    """The file that keeps the centers after each pass, so that a kill costs one."""

    path: Path
    key: str
    """What the centers are made from; what another key left is of no use."""

    def load(self) -> tuple[int, int, Tensor] | None:
        """Passes that are done, whether exchanges go on, and centers; None if there is nothing of use."""
        with suppress(OSError, ValueError, KeyError, EOFError), np.load(self.path, allow_pickle=False) as old:
            if str(old["key"]) == self.key:
                return int(old["done"]), int(old["mending"]), torch.from_numpy(old["centers"])
        return None

    def save(self, done: int, mending: int, centers: Tensor) -> None:
        """Keep the centers after a pass."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.path) as file:
            np.savez(file, key=self.key, done=done, mending=mending, centers=centers.cpu().numpy())


def cluster(
    embeddings: Embeddings,
    settings: ClusterSettings,
    saved: SavedPass | None = None,
    on_pass: Callable[[Pass], None] | None = None,
) -> Tensor:
    """Find centers, unit vectors, float32 [K, C], the same on every rank; all ranks call it together.

    The outcome is a function of the embeddings, the settings, the ranks and the chunks: threads and kills
    change no bit of it. Raises UserError where there are fewer embeddings than centers.
    """
    clusters, most, seed = settings.clusters, settings.cluster_iterations, settings.cluster_seed
    found = saved.load() if saved and embeddings.rank == 0 else None
    done, mending, centers = found or (0, 1, torch.zeros(clusters, embeddings.channels))
    done, mending = map(int, embeddings.agree(torch.tensor([done, mending], device=embeddings.device)))
    centers = centers.to(embeddings.device) if done else first_guess(embeddings, settings)
    embeddings.agree(centers)
    known: list[Nearest] = []
    moved = torch.zeros(clusters, device=embeddings.device)
    for number in range(done + 1, most + 1):
        sums, before, known = torch.zeros_like(centers), known, []
        counts = torch.zeros(clusters, dtype=torch.int64, device=embeddings.device)
        told = torch.zeros(2, dtype=torch.float64, device=embeddings.device)
        for vectors, past in zip_longest(embeddings, before):
            now, scores = assign(vectors, centers, past, moved)
            add_up(sums, vectors, now.labels)
            counts += torch.bincount(now.labels, minlength=clusters)
            told += torch.stack([now.best.double().sum(), told.new_tensor(scores)])
            known.append(now)
        for values in (sums, counts, told):
            embeddings.add(values)
        # Embeddings that cancel out leave no direction; the center stays where it was.
        new, exchanged = torch.where(sums.any(1, keepdim=True), normalize(sums), centers), 0
        if (mending and number <= most // 2) or not bool(counts.all()):
            labels = [each.labels for each in known]
            exchanged = exchange(embeddings, new, sums, counts, labels, seed + number)
            mending = exchanged > WORTH * clusters
        embeddings.agree(new)
        moved, centers = (new - centers).norm(dim=1), new
        settled = not bool(moved.any())
        if saved and embeddings.rank == 0:
            saved.save(most if settled else number, mending, centers)
        if on_pass:
            cosine, scored = (told / embeddings.usable).tolist()
            on_pass(Pass(number, centers, cosine, exchanged, scored / clusters))
        if settled:
            break
    return centers


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


def assign(vectors: Tensor, centers: Tensor, known: Nearest | None, moved: Tensor) -> tuple[Nearest, int]:
    """The nearest of all centers, and how many scores were looked at.

    Given what was known before each of the centers moved, [K]; None where nothing was.
    """
    if known is None:
        return nearest(vectors, centers), len(vectors) * len(centers)
    labels, best = known.labels.clone(), dot(vectors, centers[known.labels])
    jumpers, rise, scores = _jumpers(best - known.other, moved)
    other = known.other + rise
    again = best - other <= SLACK
    rest = (~again).nonzero()[:, 0]
    if len(jumpers) and len(rest):
        found, mine, before = scan(vectors[rest], centers[jumpers]), best[rest], labels[rest]
        place = jumpers[found.labels]
        rival = torch.where(place == before, found.other, found.best)
        takes = rival > mine
        labels[rest], best[rest] = torch.where(takes, place, before), torch.maximum(mine, rival)
        beaten = torch.where(takes, torch.maximum(mine, found.other), rival) + SLACK
        other[rest] = torch.maximum(other[rest], beaten)
        again[rest] = best[rest] - other[rest] <= SLACK
    rows = again.nonzero()[:, 0]
    if len(rows):
        labels[rows], best[rows], other[rows] = nearest(vectors[rows], centers)
    return Nearest(labels, best, other), scores


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


def exchange(
    embeddings: Embeddings, centers: Tensor, sums: Tensor, counts: Tensor, labels: Sequence[Tensor], seed: int
) -> int:
    """Merge pairs of clusters and halve others, in place, where the sum of cosines rises by it.

    What a pair loses and what halves gain are exact for the members as they are, and no cluster takes part
    twice. An empty center is free at once. Where all members of a cluster are the same, nothing is gained.
    The seed chooses the direction in which clusters are cut first. Gives the centers that took a half.
    """
    lengths, filled = sums.norm(dim=1), counts > 0
    halves = _halve(embeddings, sums / counts.clamp(min=1)[:, None], labels, seed)
    gains = (halves.norm(dim=2).sum(1) - lengths * (1 + SLACK)) * (1 - WORTH) * filled
    first, second = _pairs(embeddings, centers, filled)
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


def _pairs(embeddings: Embeddings, centers: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """Clusters that are each other's nearest, each pair once; every rank looks for some of them."""
    numbers = torch.arange(len(centers), device=centers.device)
    span = embeddings.own(len(centers))
    own = numbers[span.start : span.stop]
    partner = torch.zeros_like(numbers)
    partner[own] = nearest(centers[own], centers, but=own).labels
    embeddings.add(partner)
    first = ((partner[partner] == numbers) & (numbers < partner) & filled & filled[partner]).nonzero()[:, 0]
    return first, partner[first]


def _halve(embeddings: Embeddings, means: Tensor, labels: Sequence[Tensor], seed: int) -> Tensor:
    """Sums of two halves of every cluster, [K, 2, C]: two-means in each, begun along a random direction."""
    k, channels = means.shape
    random = np.random.Generator(np.random.Philox(key=seed)).standard_normal((1, channels), dtype=np.float32)
    toward = torch.from_numpy(random).to(means.device).expand(k, channels)
    middle = dot(means, toward)
    for _ in range(HALVINGS):
        sums = means.new_zeros(2 * k, channels)
        for vectors, own in zip(embeddings, labels, strict=True):
            add_up(sums, vectors, 2 * own + (dot(vectors, toward[own]) > middle[own]))
        halves = embeddings.add(sums).view(k, 2, channels)
        low, high = normalize(halves, dim=2).unbind(1)
        toward, middle = high - low, torch.zeros_like(middle)
    return halves
