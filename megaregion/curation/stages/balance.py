"""Stages duplicates and balance: which labelled regions are packed.

In this order, each where its setting asks for it: of near-duplicates the first one stays; a draw thins large
clusters out; of what is left of a cluster, no more than a cap stays, spread evenly over the run.

Near-duplicates are looked for among the regions of one cluster, as SemDeDup does (Abbas et al., 2023), since
two that are nearly equal have one center: the work grows with the regions times the size of their clusters.
Each piece takes some clusters of the whole run, and reads no embedding of another one.

Shapes: n regions of the whole run, r of a slice, K clusters, m regions of a cluster or of some, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.picture import read_regions
from megaregion.curation.stages.cluster import CENTERS, cluster_sizes, read_labels
from megaregion.curation.stages.regions import FEATURES, REGIONS
from megaregion.curation.stages.stage import Job, Output, Piece, Stage
from megaregion.data.order import mix
from megaregion.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TWINS, EXAMPLES = "twins.npy", "examples.npy"
FATES, STARTS, SIZES = "fates.npy", "starts.npy", "sizes.npy"

CAPPED, THINNED, TWIN = -2, -3, -4
"""In place of a label: the cluster is full, the draw left the region out, an earlier one is nearly equal."""
FATE_NAMES = {TWIN: "near-duplicate", THINNED: "drawn out", CAPPED: "over the cap"}

CLUSTERS, PIECES = 64, 128
"""Least clusters of a piece that looks for near-duplicates, and most pieces: each reads all labels."""
BLOCK, TILE = 1024, 2**16
"""Regions of a cluster that are compared at once with so many before them."""
SHOWN = 10
"""Examples of near-duplicates: those of the regions that have most."""

Integers = NDArray[np.int64]


class Duplicates(Stage):
    """Writes twins.npy, int64 [t]: regions that nearly equal an earlier one of their cluster that stays.

    And examples.npy, int64 [e, 3]: a region, the first that nearly equals it, and how many do. Without a
    threshold there is nothing to do.
    """

    name = "duplicates"
    reads = ("embed", "assign")
    whole = True

    @override
    def settings(self) -> dict[str, Any]:
        return {"near_duplicates": self.job.settings.pack.near_duplicates}

    @override
    def pieces(self) -> int:
        wanted = self.job.settings.pack.near_duplicates > 0
        return min(PIECES, -(-self.job.settings.cluster.clusters // CLUSTERS)) if wanted else 0

    @override
    def identity(self, number: int) -> list[Any]:
        return [number, self.pieces()]

    @override
    def work(self, number: int, output: Output) -> None:
        from megaregion.curation.embeddings import rows_in

        settings, pieces = self.job.settings, self.pieces()
        first, last = (settings.cluster.clusters * each // pieces for each in (number, number + 1))
        members, sizes, starts = self._members(first, last)
        channels = self.job.store.load(Piece("embed", 0), FEATURES, mapped=True).shape[1]
        room = rows_in(settings.assign.chunk_memory, channels)
        late, examples = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 3), dtype=np.int64)]
        for some in _runs(sizes, room):
            lengths = sizes[some.start : some.stop].tolist()
            rows, members = np.split(members, [sum(lengths)])
            if len(rows):
                twins = twins_within(self._vectors(rows, starts), lengths, settings.pack.near_duplicates)
                found = np.flatnonzero(twins >= 0)
                kept, places, counts = np.unique(twins[found], return_index=True, return_counts=True)
                late.append(rows[found])
                examples.append(np.stack([rows[kept], late[-1][places], counts], axis=1))
                examples = [most_frequent(examples)]
        output.save(TWINS, np.sort(np.concatenate(late)))
        output.save(EXAMPLES, most_frequent(examples))
        output.tick()

    def _members(self, first: int, last: int) -> tuple[Integers, Integers, Integers]:
        """Numbers of all regions of some clusters, cluster after cluster, each in order, [m].

        And how many each cluster has, [last - first]; and where each slice's regions begin, [slices + 1].
        """
        starts, found = [0], []
        for labels in read_labels(self.job):
            own = np.flatnonzero((labels >= first) & (labels < last))
            found.append((labels[own] - first, own + starts[-1]))
            starts.append(starts[-1] + len(labels))
        clusters, rows = (np.concatenate(each) for each in zip(*found, strict=True))
        sizes = np.bincount(clusters, minlength=last - first)
        return rows[np.argsort(clusters, kind="stable")], sizes, np.array(starts)

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


class Balance(Stage):
    """Writes the fate of every region; without a cap, a temperature or a threshold there is nothing to do.

    fates.npy, int8 [n]: what a region has in place of its label, 0 or more where it keeps it; starts.npy,
    int64 [slices + 1]: where each slice's regions begin there; sizes.npy, int64 [K]: regions of each cluster
    that are packed; examples.npy: those of all pieces of the stage before.
    """

    name = "balance"
    reads = ("assign",)
    whole = True
    version = 2

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        pack = job.settings.pack
        self._by_cells = pack.balance_over == "cells"
        earlier = {"duplicates": pack.near_duplicates > 0, "cluster": self._by_cells}
        self.reads_whole = tuple(name for name, wanted in earlier.items() if wanted)

    @override
    def settings(self) -> dict[str, Any]:
        pack = self.job.settings.pack
        return {
            "cluster_cap": pack.cluster_cap,
            "cluster_temperature": pack.cluster_temperature,
            "near_duplicates": pack.near_duplicates,
            "seed": self.job.settings.cluster.cluster_seed,
            **({"cells": self.job.settings.cluster.first_level} if self._by_cells else {}),
        }

    @override
    def pieces(self) -> int:
        pack = self.job.settings.pack
        return int(pack.cluster_cap > 0 or pack.cluster_temperature < 1 or pack.near_duplicates > 0)

    @override
    def needs(self, number: int) -> list[Piece]:
        others = range(1, Duplicates(self.job).pieces())
        return [*super().needs(number), *(Piece(Duplicates.name, each) for each in others)]

    @override
    def work(self, number: int, output: Output) -> None:
        pack = self.job.settings.pack
        starts = np.cumsum([0, *map(len, read_labels(self.job))], dtype=np.int64)
        output.save(STARTS, starts)
        near = self._find_twins(output, int(starts[-1])) if pack.near_duplicates else None
        before = cluster_sizes(self.job)
        distinct = cluster_sizes(self.job, self._labels(starts, near))
        shares = self._shares(distinct)
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

    def _find_twins(self, output: Output, regions: int) -> NDArray[np.bool_]:
        """Whether each region is a near-duplicate, [n], on disk; saves the examples."""
        pieces = [piece for piece in self.needs(0) if piece.stage == Duplicates.name]
        near = np.lib.format.open_memmap(output.kept("near.npy"), mode="w+", dtype=bool, shape=(regions,))
        for piece in pieces:
            near[self.job.store.load(piece, TWINS)] = True
        output.save(EXAMPLES, most_frequent([self.job.store.load(piece, EXAMPLES) for piece in pieces]))
        return near

    def _shares(self, sizes: Integers) -> NDArray[np.float64]:
        """Share of each cluster's regions that the draw keeps, [K], given how many there are."""
        temperature = self.job.settings.pack.cluster_temperature
        if not self._by_cells:
            return kept_shares(sizes, temperature)
        from megaregion.curation.embeddings import Embeddings
        from megaregion.curation.kmeans import find_cells, label_rows

        # Which centers are neighbours is asked of the last ones: passes move them out of their first cells.
        centers = self.job.store.load(Piece("cluster", 0), CENTERS)
        cells = find_cells(
            Embeddings([centers], self.job.settings.assign.chunk_memory), self.job.settings.cluster
        )
        return nested_shares(sizes, label_rows(centers, cells)[0][:, 0].numpy(), temperature)

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


def most_frequent(examples: Sequence[Integers]) -> Integers:
    """Those of the examples, [e, 3] each, whose region has most near-duplicates, [at most SHOWN, 3]."""
    every = np.concatenate(examples)
    return every[np.lexsort((every[:, 0], -every[:, 2]))[:SHOWN]]


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


def kept_shares(sizes: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Share of each cluster's regions that a draw keeps, [K], so that of n regions about n^temperature stay.

    Clusters up to the median of those that have a region keep all: with 0 the others become as large as it.
    """
    if temperature == 1 or not sizes.any():
        return np.ones(len(sizes))
    larger = np.maximum(sizes / np.median(sizes[sizes > 0]), 1)
    return np.asarray(larger ** (temperature - 1))


def nested_shares(sizes: Integers, cell_of: Integers, temperature: float) -> NDArray[np.float64]:
    """The same, [K], where clusters are evened out among those of their cell, and cells among each other."""
    shares = np.ones(len(sizes))
    for cell in np.unique(cell_of):
        own = cell_of == cell
        shares[own] = kept_shares(sizes[own], temperature)
    cells = np.bincount(cell_of, weights=sizes * shares)
    return np.asarray(shares * kept_shares(cells, temperature)[cell_of])


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
