"""Exact spherical k-means over ranks: passes that assign every embedding to the nearest of all centers.

What bounds prove unchanged is not scored again: each embedding keeps a bound on its cosine with all centers
but its own, which rises by no more than these move. The few that move far are scored against all embeddings,
so that the bound rises by the movement of the others alone.

No pass would mend a guess that has two centers where one cluster is, and one where there are two. So pairs
of centers are merged, and what that frees, like an empty center, takes half of the cluster that gains most.

Shapes: n embeddings of a chunk, K centers, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from megaregion.curation.kmeans.embeddings import Share
from megaregion.curation.kmeans.nearest import ROUNDING, nearest, scan
from megaregion.curation.kmeans.split import Plan, first_guess
from megaregion.files import new_file

SLACK = ROUNDING[torch.float32]
JUMPERS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Sixty-fourths of the centers that may be scored against all embeddings because they moved furthest."""
HALVINGS = 4
"""Passes of the k-means that halves every cluster."""
WORTH = 1e-3
"""Share of the centers below which exchanges end."""


class Known(NamedTuple):
    """What a rank knows of a chunk of its embeddings."""

    labels: Tensor
    """The nearest center, int64 [n]."""
    other: Tensor
    """No other center has a greater cosine, [n]."""


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


class Progress:
    """Where the centers lie after each pass, so that a kill costs one.

    Args:
        path: File; None keeps nothing.
        key: What the centers are made from; what another key left is of no use.
    """

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self._path, self._key = path, key

    def load(self) -> tuple[int, bool, Tensor] | None:
        """Passes that are done, whether exchanges go on, and centers; None if there is nothing of use."""
        with suppress(OSError, ValueError, KeyError, EOFError):
            if self._path is not None:
                with np.load(self._path, allow_pickle=False) as found:
                    if str(found["key"]) == self._key:
                        return int(found["done"]), bool(found["mending"]), torch.from_numpy(found["centers"])
        return None

    def save(self, done: int, mending: bool, centers: Tensor) -> None:
        """Keep the centers after a pass."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(self._path) as file:
                np.savez(file, key=self._key, done=done, mending=mending, centers=centers.cpu().numpy())


def cluster(
    share: Share, plan: Plan, progress: Progress | None = None, on_pass: Callable[[Pass], None] | None = None
) -> Tensor:
    """Find centers; all ranks call it together, each with its share.

    The outcome is a function of the embeddings, the plan, the ranks and the chunks: threads and kills change
    no bit of it.

    Returns:
        Unit vectors, float32 [K, C], the same on every rank.

    Raises:
        UserError: There are fewer embeddings than centers.
    """
    progress = progress or Progress()
    done, mending, centers = _begin(share, plan, progress)
    known: list[Known | None] | None = None
    moved = torch.zeros(plan.clusters, device=share.device)
    for number in range(done + 1, plan.iterations + 1):
        sums = torch.zeros_like(centers)
        now: list[Known] = []
        told = torch.zeros(2, dtype=torch.float64, device=share.device)
        for place, vectors in enumerate(share):
            found, scored = assign(vectors, centers, known[place] if known else None, moved)
            add_up(sums, vectors, found.labels)
            told += torch.stack([dot(vectors, centers[found.labels]).double().sum(), told.new_tensor(scored)])
            now.append(found)
        share.add(sums)
        share.add(told)
        counts = torch.zeros(plan.clusters, dtype=torch.int64, device=share.device)
        for each in now:
            counts += torch.bincount(each.labels, minlength=plan.clusters)
        share.add(counts)
        # Embeddings that cancel out leave no direction; the center stays where it was.
        new, exchanged = torch.where(sums.any(1, keepdim=True), normalize(sums), centers), 0
        if (mending and number <= plan.iterations // 2) or not bool(counts.all()):
            exchanged = exchange(share, new, sums, counts, [each.labels for each in now], plan.seed + number)
            mending = exchanged > WORTH * plan.clusters
        share.agree(new)
        moved, centers, known = (new - centers).norm(dim=1), new, list(now)
        settled = not bool(moved.any())
        if share.rank == 0:
            progress.save(plan.iterations if settled else number, mending, centers)
        if on_pass:
            cosine, scored = (told / share.usable).tolist()
            on_pass(Pass(number, centers, cosine, exchanged, scored / plan.clusters))
        if settled:
            break
    return centers


def _begin(share: Share, plan: Plan, progress: Progress) -> tuple[int, bool, Tensor]:
    """What the first rank finds saved, else a first guess."""
    saved = progress.load() if share.rank == 0 else None
    state = share.agree(torch.tensor([saved[0], saved[1]] if saved else [0, 1], device=share.device))
    done, mending = state.tolist()
    if not done:
        return 0, True, share.agree(first_guess(share, plan))
    empty = torch.zeros(plan.clusters, share.channels)
    return done, bool(mending), share.agree((saved[2] if saved else empty).to(share.device))


def dot(some: Tensor, others: Tensor) -> Tensor:
    """Row by row, [n]: the same bits whatever the rows beside."""
    return (some * others).sum(1)


def add_up(sums: Tensor, vectors: Tensor, labels: Tensor) -> None:
    """Add each vector to the sum of its label, in the order of the rows, so that the bits are the same again.

    Args:
        sums: Float32 [K, C]; 16 bits would overflow.
        vectors: Float32 [n, C].
        labels: Int64 [n].
    """
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
        found = nearest(vectors[rows], centers)
        labels[rows], other[rows] = found.labels, found.other
    return Known(labels, other), scores


def _jumpers(margins: Tensor, moved: Tensor) -> tuple[Tensor, Tensor, int]:
    """The centers to score against all embeddings, how far the others moved at most, and what both cost.

    Args:
        margins: By how much each embedding's own center is nearer than any other could be, [n].
        moved: How far each center moved, [K].
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
    own = numbers[len(centers) * share.rank // share.ranks : len(centers) * (share.rank + 1) // share.ranks]
    partner = torch.zeros_like(numbers)
    partner[own] = nearest(centers[own], centers, but=own).labels
    share.add(partner)
    mutual = (partner[partner] == numbers) & (numbers < partner) & filled & filled[partner]
    first = mutual.nonzero()[:, 0]
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
