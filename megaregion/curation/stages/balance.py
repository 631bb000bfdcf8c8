"""Stage balance: which labelled regions are packed.

In this order, each where its setting asks for it: of near-duplicates the first one stays; a draw thins large
clusters out; of what is left of a cluster, no more than a cap stays, spread evenly over the run.

Near-duplicates are looked for among the regions of one cluster, as SemDeDup does (Abbas et al., 2023), since
two that are nearly equal have one center: the work grows with the regions times the size of their clusters,
and memory holds one cluster, or as many as fit. Labels are read slice by slice.

Shapes: n regions of the whole run, r of a slice, K clusters, m regions of a cluster, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.picture import read_regions
from megaregion.curation.stages.cluster import cluster_sizes, read_labels
from megaregion.curation.stages.regions import FEATURES, REGIONS
from megaregion.curation.stages.stage import Job, Output, Piece, Stage
from megaregion.data.order import mix
from megaregion.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FATES, STARTS, SIZES, EXAMPLES, NEAR = "fates.npy", "starts.npy", "sizes.npy", "examples.npy", "near.npy"

CAPPED, THINNED, TWIN = -2, -3, -4
"""In place of a label: the cluster is full, the draw left the region out, an earlier one is nearly equal."""
FATE_NAMES = {TWIN: "near-duplicate", THINNED: "drawn out", CAPPED: "over the cap"}

SORTED = 2**24
"""Regions whose labels are held at once; all labels are read once for each so many regions."""
BLOCK, TILE = 1024, 2**16
"""Regions of a cluster that are compared at once with so many before them."""
SHOWN = 10
"""Examples of near-duplicates: those of the regions that have most."""

Integers = NDArray[np.int64]


class Balance(Stage):
    """Writes the fate of every region; without a cap, a temperature or a threshold there is nothing to do.

    fates.npy, int8 [n]: what a region has in place of its label, 0 or more where it keeps it; starts.npy,
    int64 [slices + 1]: where each slice's regions begin there; sizes.npy, int64 [K]: regions of each cluster
    that are packed; examples.npy, int64 [e, 3]: a region, the first that nearly equals it, and how many do.
    """

    name = "balance"
    whole = True
    version = 2

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        compares = job.settings.pack.near_duplicates > 0
        self.reads = ("embed", "assign") if compares else ("assign",)
        self.together = compares

    @override
    def settings(self) -> dict[str, Any]:
        pack = self.job.settings.pack
        return {
            "cluster_cap": pack.cluster_cap,
            "cluster_temperature": pack.cluster_temperature,
            "near_duplicates": pack.near_duplicates,
            "seed": self.job.settings.cluster.cluster_seed,
        }

    @override
    def pieces(self) -> int:
        pack = self.job.settings.pack
        return int(pack.cluster_cap > 0 or pack.cluster_temperature < 1 or pack.near_duplicates > 0)

    @override
    def work(self, number: int, output: Output) -> None:
        pack = self.job.settings.pack
        starts = np.cumsum([0, *map(len, read_labels(self.job))], dtype=np.int64)
        output.save(STARTS, starts)
        near = None
        if pack.near_duplicates:
            near = np.lib.format.open_memmap(
                output.folder / NEAR, mode="w+", dtype=bool, shape=(int(starts[-1]),)
            )
            output.save(EXAMPLES, self._find_twins(near, starts))
        before = cluster_sizes(self.job)
        distinct = cluster_sizes(self.job, self._labels(starts, near))
        shares = kept_shares(distinct, pack.cluster_temperature)
        drawn = cluster_sizes(self.job, self._labels(starts, near, shares))
        caps = np.minimum(drawn, pack.cluster_cap or drawn)
        seen = np.zeros_like(drawn)
        with output.file(FATES) as file:
            header = {"descr": "|i1", "fortran_order": False, "shape": (int(starts[-1]),)}
            np.lib.format.write_array_header_1_0(file, header)
            for labels in self._labels(starts, near, shares):
                labels[(labels >= 0) & ~keep_evenly(labels, seen, drawn, caps)] = CAPPED
                file.write(np.minimum(labels, 0).astype(np.int8).tobytes())
        output.save(SIZES, caps)
        output.counts["clusters capped"] = int((drawn > caps).sum())
        for fate, (larger, smaller) in zip(
            (TWIN, THINNED, CAPPED), ((before, distinct), (distinct, drawn), (drawn, caps)), strict=True
        ):
            output.counts[f"regions {FATE_NAMES[fate]}"] = int((larger - smaller).sum())
        output.tick()

    def _labels(
        self, starts: Integers, near: NDArray[np.bool_] | None, shares: NDArray[np.float64] | None = None
    ) -> Iterator[Integers]:
        """Labels of each slice's regions, [r], less the near-duplicates and what the draw leaves out."""
        seed = self.job.settings.cluster.cluster_seed
        for labels, first in zip(read_labels(self.job), starts.tolist(), strict=False):
            if near is not None:
                labels[near[first : first + len(labels)]] = TWIN
            if shares is not None:
                draw = mix(np.arange(first, first + len(labels)), seed) / 2.0**64
                labels[(labels >= 0) & (draw >= shares[labels])] = THINNED
            yield labels

    def _find_twins(self, near: NDArray[np.bool_], starts: Integers) -> Integers:
        """Mark every region that nearly equals an earlier one that stays; gives the examples."""
        from megaregion.curation.embeddings import rows_in

        settings, sizes = self.job.settings, cluster_sizes(self.job)
        channels = self.job.store.load(Piece("embed", 0), FEATURES, mapped=True).shape[1]
        room = rows_in(settings.assign.chunk_memory, channels)
        examples: list[tuple[int, ...]] = []
        for clusters in _runs(sizes, SORTED):
            members = self._members(starts, clusters)
            for some in _runs(sizes[clusters.start : clusters.stop], room):
                lengths = sizes[clusters.start :][some.start : some.stop].tolist()
                rows, members = np.split(members, [sum(lengths)])
                if not len(rows):
                    continue
                twins = twins_within(self._vectors(rows, starts), lengths, settings.pack.near_duplicates)
                late = np.flatnonzero(twins >= 0)
                near[rows[late]] = True
                kept, places, counts = np.unique(twins[late], return_index=True, return_counts=True)
                examples += map(tuple, np.stack([rows[kept], rows[late[places]], counts], axis=1).tolist())
                examples = sorted(examples, key=lambda each: (-each[2], each[0]))[:SHOWN]
        return np.array(examples, dtype=np.int64).reshape(-1, 3)

    def _members(self, starts: Integers, clusters: range) -> Integers:
        """Numbers of all regions of some clusters, cluster after cluster, each in order."""
        found = []
        for labels, first in zip(read_labels(self.job), starts.tolist(), strict=False):
            own = np.flatnonzero((labels >= clusters.start) & (labels < clusters.stop))
            found.append((labels[own], own + first))
        labels, rows = (np.concatenate(each) for each in zip(*found, strict=True))
        members: Integers = rows[np.argsort(labels, kind="stable")]
        return members

    def _vectors(self, rows: Integers, starts: Integers) -> Tensor:
        """Unit vectors of some regions, float32 [len(rows), C], each slice's read in one go."""
        import torch

        from megaregion.curation.embeddings import unit

        order = np.argsort(rows)
        slices = np.searchsorted(starts, rows[order], side="right") - 1
        found = []
        for number in np.unique(slices).tolist():
            stored = self.job.store.load(Piece("embed", number), FEATURES, mapped=True)
            found.append(stored[rows[order][slices == number] - starts[number]])
        vectors = np.empty((len(rows), found[0].shape[1]), dtype=np.float32)
        vectors[order] = unit(np.concatenate(found))
        return torch.from_numpy(vectors)


def _runs(sizes: Integers, most: int) -> list[range]:
    """Cut clusters into runs of about so many regions; a larger cluster stands with those before it."""
    ends = np.cumsum(sizes)
    firsts = np.flatnonzero(np.diff(np.maximum(ends - 1, 0) // most, prepend=-1))
    return [range(a, b) for a, b in zip(firsts.tolist(), [*firsts[1:].tolist(), len(sizes)], strict=True)]


def twins_within(vectors: Tensor, lengths: Sequence[int], threshold: float) -> Integers:
    """What :func:`find_twins` finds in each of some clusters that follow one another, on torch's threads."""
    from megaregion.processor import in_order

    parts, starts = vectors.split(list(lengths)), np.cumsum([0, *lengths])
    found = in_order(lambda cluster: find_twins(parts[cluster], threshold), range(len(parts)))
    return np.concatenate(
        [np.where(own < 0, own, own + start) for own, start in zip(found, starts, strict=False)]
    )


def find_twins(vectors: Tensor, threshold: float) -> Integers:
    """Of each unit vector, [m, C], the first before it that stays and is as near as the threshold.

    Gives its row, int64 [m], or -1 for a vector that stays itself.
    """
    from megaregion.processor import product

    twins = np.full(len(vectors), -1, dtype=np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        own = twins[start : start + BLOCK]
        kept = np.flatnonzero(twins[:start] < 0)
        for first in range(0, len(kept), TILE):
            some = kept[first : first + TILE]
            near = (product(block, vectors[some]) >= threshold).numpy()
            new = near.any(axis=1) & (own < 0)
            own[new] = some[near[new].argmax(axis=1)]
        inside = np.tril((product(block, block) >= threshold).numpy(), -1)
        for row in np.flatnonzero(inside.any(axis=1) & (own < 0)).tolist():
            before = np.flatnonzero(inside[row, :row] & (own[:row] < 0))
            if len(before):
                own[row] = start + before[0]
    return twins


def kept_shares(sizes: Integers, temperature: float) -> NDArray[np.float64]:
    """Share of each cluster's regions that a draw keeps, [K], so that of n regions about n^temperature stay.

    Clusters up to the median of those that have a region keep all: with 0 the others become as large as it.
    """
    if temperature == 1 or not sizes.any():
        return np.ones(len(sizes))
    larger = np.maximum(sizes / np.median(sizes[sizes > 0]), 1)
    return np.asarray(larger ** (temperature - 1))


def keep_evenly(labels: Integers, seen: Integers, sizes: Integers, caps: Integers) -> NDArray[np.bool_]:
    """Choose the regions of a piece that stay, by cluster, below 0 for none: every size/cap-th of each.

    Given of each cluster the regions in the pieces before, counted on here, those in the whole run, and how
    many of them stay. Over all pieces exactly caps[k] of cluster k are True.
    """
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    clusters = labels[order]
    firsts = np.flatnonzero(np.diff(clusters, prepend=-1))
    lengths = np.diff(firsts, append=len(clusters))
    place = seen[clusters] + np.arange(len(clusters)) - np.repeat(firsts, lengths)
    kept = np.zeros(len(labels), dtype=bool)
    share, whole = caps[clusters], np.maximum(sizes[clusters], 1)
    kept[order] = (place + 1) * share // whole > place * share // whole
    seen[clusters[firsts]] += lengths
    return kept


# What it did


@dataclass(frozen=True)
class Balancing:
    """What the stage balance left out of the clusters."""

    before: int
    """Labelled regions."""
    after: int
    """Those that are packed."""
    left_out: dict[str, int]
    """Regions that are not, by reason."""
    effective: float
    """Clusters that would be as hard to guess from if all were equal."""
    histogram: dict[str, tuple[int, int]]
    """Clusters before and after, by the least number of their regions; the next bin's is twice as large."""
    examples: list[tuple[str, str, int]]
    """A region that stays, the first that nearly equals it, and how many do, as "KEY [x0, y0, x1, y1]"."""


def read_balancing(job: Job) -> Balancing | None:
    """What a finished stage balance did; None where its settings ask for nothing."""
    done = Piece(Balance.name, 0)
    manifest = job.store.read(done, thorough=False) if Balance(job).pieces() else None
    if manifest is None:
        return None
    before, after = cluster_sizes(job), job.store.load(done, SIZES)
    bins = [np.bincount(np.frexp(sizes)[1], minlength=64) for sizes in (before, after)]
    examples = job.store.load(done, EXAMPLES).tolist() if job.settings.pack.near_duplicates else []
    return Balancing(
        before=int(before.sum()),
        after=int(after.sum()),
        left_out={why: manifest.counts.get(f"regions {why}", 0) for why in FATE_NAMES.values()},
        effective=effective_clusters(after),
        histogram={
            str(2**place // 2): (int(old), int(new))
            for place, (old, new) in enumerate(zip(*bins, strict=True))
            if old or new
        },
        examples=[(_named(job, kept), _named(job, other), count) for kept, other, count in examples],
    )


def _named(job: Job, region: int) -> str:
    """Key and box of a region, by its number in the run."""
    starts = job.store.load(Piece(Balance.name, 0), STARTS)
    number = int(np.searchsorted(starts, region, side="right")) - 1
    place = region - int(starts[number])
    for image in read_regions([job.store.folder(Piece("embed", number)) / REGIONS]):
        if place < len(image.regions):
            return f"{image.key} {[round(side) for side in image.regions[place].box]}"
        place -= len(image.regions)
    raise UserError(f"{job.store.root} was changed while it was read; run again")


def effective_clusters(sizes: Integers) -> float:
    """The exponential of the entropy of regions over clusters, given their sizes, [K]."""
    shares = sizes[sizes > 0] / max(1, int(sizes.sum()))
    return float(np.exp(-(shares * np.log(shares)).sum()))
