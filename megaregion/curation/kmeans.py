"""Exact spherical k-means over ranks: every pass assigns each embedding to the nearest of all centers.

Scores are never all written: tiles of them are products with a running best and second best; a processor
rules most centers out by 8-bit products first. Where the two are closer than the product's rounding, the
embedding is scored again in the next precision, up to float64: so labels do not depend on precision, blocks,
threads, device or library. What bounds prove unchanged is not
scored at all: each embedding keeps a bound on its cosine with all centers but its own, which rises by no more
than these move. No pass mends a guess that has two centers in one cluster and one in two. So pairs of centers
are merged, and what that frees, like an empty center, takes half of the cluster that gains most.

Shapes: n embeddings of a chunk, G cells, K centers, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megaregion.curation.embeddings import Embeddings, evenly, unit, usable
from megaregion.curation.settings import ClusterSettings
from megaregion.errors import UserError
from megaregion.files import new_file
from megaregion.processor import in_order, multiplies_bytes, product

TILE = {"cpu": (1024, 2048), "cuda": (16_384, 32_768)}
"""Vectors and centers that are scored at once; a processor's scores stay in its cache."""
GRAIN = 256
"""Numbers of rows in a product on a processor are multiples of it, or a power of 2 below."""
MANY, BLOCK, GROUP, GROUPED = 2048, 16_384, 64, 2**18
"""8-bit products: least number of centers for each that is wanted; most vectors of a block; centers of a
group, whose size is doubled, tripled and so on with each further so many centers."""
LADDER = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float16, torch.float32, torch.float64)}
"""Precisions of the products, rising."""
ROUNDING = {torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}
"""How far two scores of unit vectors may be off from each other: closer ones are scored again, or equal."""
SLACK = ROUNDING[torch.float32]
FLAT, CELL_SAMPLE, CENTER_SAMPLE, GUESS_PASSES = 512, 256, 32, 10
"""The guess: most centers of one cell; embeddings that it sees for each cell, and for each center; passes."""
HALVINGS, WORTH = 4, 1e-3
"""Passes of the k-means that halves every cluster; share of the centers below which exchanges end."""


class Nearest(NamedTuple):
    """Of each vector the nearest center, int64 [n], the cosine to it, and what no other's exceeds, [n]."""

    labels: Tensor
    best: Tensor
    other: Tensor


class Scores(NamedTuple):
    """Some scores, [vectors, centers], of which vectors, and of which centers, rising numbers."""

    rows: Tensor | slice
    numbers: Tensor
    scores: Tensor


def nearest(vectors: Tensor, centers: Tensor, but: Tensor | None = None) -> Nearest:
    """The nearest center of each vector, both unit vectors; of equally near ones the first.

    With ``but``, int64 [n] or [n, m], the centers that each vector may not choose.
    """
    n, device = len(vectors), vectors.device
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    other = torch.full((n,), -torch.inf, device=device)
    rows = torch.arange(n, device=device)
    for precision in LADDER[device.type]:
        if len(rows):
            part = vectors if len(rows) == n else vectors[rows]
            found = scan(part.to(precision), centers.to(precision), None if but is None else but[rows])
            labels[rows] = found.labels
            other[rows] = found.other.float() + max(ROUNDING[precision], ROUNDING[torch.float32])
            rows = rows[(found.best - found.other) < ROUNDING[precision]]
    return Nearest(labels, dot(vectors, centers[labels]), other)


def scan(vectors: Tensor, centers: Tensor, but: Tensor | None = None) -> Nearest:
    """What :func:`nearest` finds with the scores of one precision, that of vectors and centers."""
    if vectors.is_cuda and vectors.dtype == torch.float16 and find_spec("triton"):
        from megaregion.curation.nearest_kernel import scan_on_gpu

        return Nearest(*scan_on_gpu(vectors, centers, but))
    barred = None if but is None else but.view(len(vectors), -1)
    least = 2 + (0 if barred is None else barred.shape[1])
    first = vectors.device.type == "cpu" and vectors.dtype == LADDER["cpu"][0]
    coded = Coded(centers) if first and multiplies_bytes() and len(centers) >= MANY * least else None
    height = coded.height(len(vectors)) if coded else TILE[vectors.device.type][0]
    found = Nearest(
        torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device),
        vectors.new_full((len(vectors),), -torch.inf),
        vectors.new_full((len(vectors),), -torch.inf),
    )

    def block(start: int) -> None:
        own = slice(start, start + height)
        # Written in place: what outlives a block would lie in the gap that its freed scores leave, and the
        # heap would grow by every block's.
        now, some = Nearest(*(part[own] for part in found)), vectors[own]
        pieces = coded.candidates(some, least) if coded else _tiles(some, centers)
        for rows, numbers, scores in pieces:
            if barred is not None:
                _bar(scores, numbers, barred[own][rows])
            better = _beaten(Nearest(*(part[rows] for part in now)), scores, numbers)
            for part, values in zip(now, better, strict=True):
                part[rows] = values

    in_order(block, range(0, len(vectors), height))
    return found


def _tiles(vectors: Tensor, centers: Tensor) -> Iterator[Scores]:
    """All scores."""
    numbers, width = torch.arange(len(centers), device=centers.device), TILE[vectors.device.type][1]
    for part, tile in zip(numbers.split(width), centers.split(width), strict=True):
        scores = product(_filled(vectors), _filled(tile))[: len(vectors), : len(tile)]
        yield Scores(slice(None), part, scores)


def _bar(scores: Tensor, numbers: Tensor, barred: Tensor) -> None:
    """Take the centers that each vector may not choose, [n, m], out of its scores of some, in place."""
    places = torch.searchsorted(numbers, barred).clamp_(max=len(numbers) - 1)
    here, which = (numbers[places] == barred).nonzero().unbind(1)
    scores[here, places[here, which]] = -torch.inf


def _beaten(now: Nearest, scores: Tensor, numbers: Tensor) -> Nearest:
    """What is nearest once the scores of some more centers, rising numbers, are known; spoils the scores."""
    tie = ROUNDING[torch.float64] if scores.dtype == torch.float64 else 0.0
    equal = (scores >= scores.amax(1, keepdim=True) - tie).double() if tie else scores
    # On a processor numpy's is six times as fast as torch's.
    on_cpu = scores.device.type == "cpu"
    place = torch.from_numpy(equal.numpy().argmax(1)) if on_cpu else equal.argmax(1)
    value = scores.gather(1, place[:, None])[:, 0]
    scores.scatter_(1, place[:, None], -torch.inf)
    other = torch.maximum(torch.maximum(now.other, scores.amax(1)), torch.minimum(now.best, value))
    labels = torch.where(value > now.best + tie, numbers[place], now.labels)
    return Nearest(labels, torch.maximum(now.best, value), other)


class Coded:
    """Centers as 8-bit integers, whose products take a processor a quarter of the time, to rule most out.

    Centers of like range form a group of one scale, and of a group's scores the greatest alone is kept. It is
    off by no more than the lengths of what rounding took from vector and center: no group is left out that
    may hold a center that is looked for.
    """

    def __init__(self, centers: Tensor) -> None:
        count, self._centers = len(centers), centers
        self._size = GROUP * -(-count // GROUPED)
        range_of = torch.maximum(centers.amax(1), -centers.amin(1))
        order = range_of.argsort(stable=True)
        self._groups = [part.sort().values for part in order.split(self._size)]
        # Tiles of few sizes, filled up by the last center; its groups of nothing else are not read.
        padding = -count % (self._size * -(-GRAIN // self._size))
        padded = F.pad(order, (0, padding), mode="constant", value=int(order[-1]))
        members = padded.view(-1, self._size)
        self._scale = range_of[members].amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self._error = torch.zeros(len(members))
        width = max(1, TILE["cpu"][1] // self._size)

        def encode(first: int) -> Tensor:
            part = centers[members[first : first + width].T] / self._scale[first : first + width, None]
            codes = part.round()
            lengths = (part - codes).norm(dim=2).amax(0)
            self._error[first : first + width] = lengths * self._scale[first : first + width]
            return codes.to(torch.int8).flatten(0, 1).T

        self._tiles = in_order(encode, range(0, len(members), width))

    def height(self, vectors: int) -> int:
        """Vectors of a block: equal blocks for torch's threads, whose greatest scores take 64 MiB at most."""
        threads, most = torch.get_num_threads(), min(BLOCK, 2**24 // len(self._scale))
        return max(1, -(-vectors // (threads * -(-vectors // (threads * most)) or 1)))

    def candidates(self, vectors: Tensor, least: int) -> Iterator[Scores]:
        """Scores, among which are the ``least`` greatest ones of each vector."""
        scale = torch.maximum(vectors.amax(1, keepdim=True), -vectors.amin(1, keepdim=True)) / 127
        scaled = vectors / scale.clamp_(min=torch.finfo(torch.float32).tiny)
        codes = scaled.round()
        error = (scaled - codes).norm(dim=1, keepdim=True) * scale
        codes, height = codes.to(torch.int8), TILE["cpu"][0]
        greatest = vectors.new_empty(len(vectors), len(self._scale))
        for some, rows in zip(codes.split(height), greatest.split(height), strict=True):
            filled, first = _filled(some), 0
            for tile in self._tiles:
                groups = tile.shape[1] // self._size
                sums = torch._int_mm(filled, tile).view(len(filled), self._size, groups)
                rows[:, first : first + groups] = sums[: len(rows)].amax(1)
                first += groups
        real = len(self._groups)
        greatest, off = greatest[:, :real] * scale * self._scale[:real], self._error[:real]
        off = error * (1 + off) + off + SLACK
        floor = (greatest - off).topk(least, 1).values[:, -1:]
        group, rows_of = (greatest + off >= floor).T.nonzero().unbind(1)
        parts = rows_of.split(group.bincount(minlength=real).tolist())
        for numbers, rows in zip(self._groups, parts, strict=True):
            if len(rows):
                # Of many sizes: torch's product keeps no program of them.
                scores = vectors.index_select(0, rows) @ self._centers.index_select(0, numbers).T
                yield Scores(rows, numbers, scores)


def _filled(rows: Tensor) -> Tensor:
    """Rows with zeros behind, to one of few sizes: oneDNN keeps a program for each size that it has met."""
    if rows.device.type != "cpu":
        return rows
    grain = next(size for size in (16, 32, 64, 128, GRAIN) if size >= min(len(rows), GRAIN))
    return F.pad(rows, (0, 0, 0, -len(rows) % grain))


def dot(some: Tensor, others: Tensor) -> Tensor:
    """Row by row, [n]: the same bits whatever the rows beside."""
    return (some * others).sum(1)


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
    # Every vector counts; faiss would take a sample and warn about small clusters.
    every: dict[str, Any] = {"min_points_per_centroid": 1, "max_points_per_centroid": len(vectors)}
    means = faiss.Kmeans(vectors.shape[1], clusters, niter=iterations, seed=seed, spherical=True, **every)
    means.train(np.ascontiguousarray(vectors))
    faiss.omp_set_num_threads(before)
    return np.asarray(means.centroids, dtype=np.float32), np.asarray(means.obj).tolist()


def first_guess(embeddings: Embeddings, settings: ClusterSettings) -> Tensor:
    """The paper's hierarchical split: centers inside cells, each with as many as its size asks for, [K, C].

    Sample, cells and seeds do not depend on the ranks; each rank splits cells of its own, on torch's threads.
    """
    clusters, seed, total = settings.clusters, settings.cluster_seed, embeddings.total
    cells = find_cells(embeddings, settings)
    for rows in (evenly(total, CENTER_SAMPLE * clusters), np.arange(total)):
        found = torch.zeros(len(rows), dtype=torch.int64, device=embeddings.device)
        for part in embeddings.chunks(len(rows)):
            found[part] = label_rows(embeddings.read(rows[part]), cells)[0][:, 0]
        cell_of = embeddings.add(found).cpu().numpy()
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
        rows = embeddings.read(evenly(embeddings.total, CELL_SAMPLE * count))
        sample = usable(rows, cells.device)[0].numpy()
        if len(sample) >= count:
            cells = torch.from_numpy(find_centers(sample, count, GUESS_PASSES, settings.cluster_seed)[0])
    return embeddings.agree(cells.to(embeddings.device))


def share_out(sizes: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    """Centers of each cell, int64 [G], by its number of vectors: largest remainders, at most one a vector."""
    total = int(sizes.sum())
    if total < clusters:
        few = f"--clusters must be at most the {total} regions that were embedded, got {clusters}"
        none = "no image has a region that can be embedded; loosen --min-edge, --max-area or --min-objectness"
        raise UserError(f"{few}; use fewer clusters or more images" if total else none)
    shares, remainders = np.divmod(sizes * clusters, total)
    # A stable order, so that every rank comes to the same.
    shares[np.argsort(-remainders, kind="stable")[: clusters - shares.sum()]] += 1
    return shares


def label_rows(rows: NDArray[np.floating], centers: Tensor, wanted: int = 1) -> tuple[Tensor, Tensor]:
    """The centers nearest to each row, int64 [n, wanted], nearest first, and the cosine to the first, [n].

    A row without embedding has -1, and 0.
    """
    vectors, some = usable(rows, centers.device)
    first = nearest(vectors, centers)
    found = first.labels[:, None]
    while found.shape[1] < wanted:
        # One pass over the centers for each label: every one is exact, as the first.
        found = torch.cat([found, nearest(vectors, centers, found).labels[:, None]], 1)
    labels = found.new_full((len(rows), wanted), -1).masked_scatter_(some[:, None], found)
    return labels, first.best.new_zeros(len(rows)).masked_scatter_(some, first.best)


class Pass(NamedTuple):
    """What a pass ended with: the next one needs no more, so a kill costs one."""

    number: int
    exchanged: int
    """Centers that were freed or empty and took half of a cluster."""
    settled: bool
    """No center moved: another pass would do the same."""
    centers: Tensor
    """Those that the next pass starts from."""
    cosine: float = 0.0
    """Mean cosine of an embedding to the center that it chose."""
    scored: float = 0.0
    """Share of all scores, embeddings times centers, that had to be looked at."""

    def save(self, path: Path, key: str) -> None:
        """Keep it in a file, with what it was made from."""
        with new_file(path) as file:
            np.savez(file, key=key, state=self[:3], centers=self.centers.cpu().numpy())

    @classmethod
    def load(cls, path: Path, key: str) -> Pass | None:
        """What was kept; None if there is nothing, or it was made from something else."""
        with suppress(OSError, ValueError, KeyError, EOFError), np.load(path, allow_pickle=False) as old:
            number, exchanged, settled = old["state"].tolist()
            if str(old["key"]) == key:
                return cls(number, exchanged, settled, torch.from_numpy(old["centers"]))
        return None


def passes(embeddings: Embeddings, settings: ClusterSettings, last: Pass | None = None) -> Iterator[Pass]:
    """Exact passes until no center moves, on all ranks together; the first rank says which was the last.

    Centers are unit vectors, float32 [K, C], the same on every rank: a function of the embeddings, the
    settings, the ranks and the chunks. Threads and kills change no bit of them.
    Raises UserError where there are fewer embeddings than centers.
    """
    clusters, most, device = settings.clusters, settings.cluster_iterations, embeddings.device
    last = last or Pass(0, clusters, False, torch.zeros(clusters, embeddings.channels))
    number, exchanged, settled = embeddings.agree(torch.tensor(last[:3], device=device)).tolist()
    centers = embeddings.agree(last.centers.to(device) if number else first_guess(embeddings, settings))
    known: list[Nearest] = []
    moved = torch.zeros(clusters, device=device)
    while number < most and not settled:
        number, before, known = number + 1, known, []
        sums = torch.zeros_like(centers)
        counts = torch.zeros(clusters, dtype=torch.int64, device=device)
        told = torch.zeros(2, dtype=torch.float64, device=device)
        for vectors, past in zip_longest(embeddings, before):
            now, scores = assign(vectors, centers, past, moved)
            add_up(sums, vectors, now.labels)
            counts += torch.bincount(now.labels, minlength=clusters)
            told += torch.stack([now.best.double().sum(), told.new_tensor(scores)])
            known.append(now)
        for values in (sums, counts, told):
            embeddings.add(values)
        # Embeddings that cancel out leave no direction; the center stays where it was.
        new = torch.where(sums.any(1, keepdim=True), F.normalize(sums), centers)
        worthwhile, exchanged = number <= most // 2 and exchanged > WORTH * clusters, 0
        if worthwhile or not bool(counts.all()):
            exchanged = exchange(embeddings, new, sums, counts, known, settings.cluster_seed + number)
        embeddings.agree(new)
        moved, centers = (new - centers).norm(dim=1), new
        settled = not bool(moved.any())
        cosine, scored = (told / embeddings.usable).tolist()
        yield Pass(number, exchanged, settled, centers, cosine, scored / clusters)


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
    n, k = len(vectors), len(centers)
    if known is None:
        return nearest(vectors, centers), n * k
    labels, best = known.labels.clone(), dot(vectors, centers[known.labels])
    # As many of those that moved furthest are scored against all as make the fewest scores, with all centers
    # for the embeddings that the movement of the others brings into doubt.
    rises, far = moved.sort(descending=True, stable=True)
    doubts = torch.searchsorted((best - known.other).sort().values, rises + SLACK, right=True)
    scores, few = (doubts * k + (n - doubts) * torch.arange(k, device=moved.device)).min(0)
    jumpers, other = far[:few], known.other + rises[few]
    rows = (best - other > SLACK).nonzero()[:, 0]
    if len(jumpers) and len(rows):
        own, mine = labels[rows], best[rows]
        found = scan(vectors[rows], centers[jumpers], but=far.argsort()[own])
        takes = found.best > mine
        beaten = torch.where(takes, torch.maximum(mine, found.other), found.best) + SLACK
        labels[rows] = torch.where(takes, jumpers[found.labels], own)
        best[rows], other[rows] = torch.maximum(mine, found.best), torch.maximum(other[rows], beaten)
    rows = (best - other <= SLACK).nonzero()[:, 0]
    if len(rows):
        labels[rows], best[rows], other[rows] = nearest(vectors[rows], centers)
    return Nearest(labels, best, other), int(scores)


def exchange(
    embeddings: Embeddings, centers: Tensor, sums: Tensor, counts: Tensor, known: Sequence[Nearest], seed: int
) -> int:
    """Merge pairs of clusters and halve others, in place, where the sum of cosines rises by it.

    What a pair loses and what halves gain are exact for the members as they are, and no cluster takes part
    twice. An empty center is free at once. Where all members of a cluster are the same, nothing is gained.
    The seed chooses the direction in which clusters are cut first. Gives the centers that took a half.
    """
    lengths, filled = sums.norm(dim=1), counts > 0
    halves = _halve(embeddings, sums / counts.clamp(min=1)[:, None], known, seed)
    gains = (halves.norm(dim=2).sum(1) - lengths * (1 + SLACK)) * (1 - WORTH) * filled
    pairs = _pairs(embeddings, centers, filled)
    losses, cheapest = (lengths[pairs].sum(0) - sums[pairs].sum(0).norm(dim=1)).sort(stable=True)
    empty = (~filled).nonzero()[:, 0]
    # An empty center is freed as one that is merged with itself.
    prices = torch.cat([losses.new_zeros(len(empty)), losses])
    pairs = torch.cat([empty.expand(2, -1), pairs[:, cheapest]], 1)

    def worthwhile() -> int:
        return int((gains.sort(descending=True).values[: len(prices)] > prices).sum())

    gains[pairs[:, : worthwhile()]] = 0
    taken = worthwhile()
    halved, (merged, freed) = gains.argsort(descending=True, stable=True)[:taken], pairs[:, :taken]
    centers[merged] = F.normalize(sums[merged] + sums[freed])
    centers[halved], centers[freed] = F.normalize(halves[halved], dim=2).unbind(1)
    return taken


def _pairs(embeddings: Embeddings, centers: Tensor, filled: Tensor) -> Tensor:
    """Clusters that are each other's nearest, [2, pairs], each pair once; ranks share the work."""
    numbers = torch.arange(len(centers), device=centers.device)
    partner = torch.zeros_like(numbers)
    for part in embeddings.chunks(len(centers)):
        partner[part] = nearest(centers[part], centers, but=numbers[part]).labels
    embeddings.add(partner)
    first = ((partner[partner] == numbers) & (numbers < partner) & filled & filled[partner]).nonzero()[:, 0]
    return torch.stack([first, partner[first]])


def _halve(embeddings: Embeddings, means: Tensor, known: Sequence[Nearest], seed: int) -> Tensor:
    """Sums of two halves of every cluster, [K, 2, C]: two-means in each, begun along a random direction."""
    k, channels = means.shape
    random = np.random.Generator(np.random.Philox(key=seed)).standard_normal((1, channels), dtype=np.float32)
    toward = torch.from_numpy(random).to(means.device).expand(k, channels)
    middle = dot(means, toward)
    for _ in range(HALVINGS):
        sums = means.new_zeros(2 * k, channels)
        for vectors, (own, _, _) in zip(embeddings, known, strict=True):
            add_up(sums, vectors, 2 * own + (dot(vectors, toward[own]) > middle[own]))
        halves = embeddings.add(sums).view(k, 2, channels)
        low, high = F.normalize(halves, dim=2).unbind(1)
        toward, middle = high - low, torch.zeros_like(middle)
    return halves
