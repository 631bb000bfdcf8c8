"""What one pass over all regions tells of every cluster and token: its size, and the members that pages show.

Shapes: K clusters, V tokens, r regions of a batch, G groups (clusters or tokens), n members of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.settings import AtlasSettings
from megaregion.atlas.source import Floats, Integers, Rows, Source, mix

Priority = NDArray[np.uint32]
NOBODY = np.iinfo(np.uint32).max
"""Priority of an empty place."""


class Members:
    """The n regions of lowest priority in every group; memory depends on G and n alone.

    Args:
        groups: Number of groups, G.
        wanted: Members of each, n.
    """

    def __init__(self, groups: int, wanted: int) -> None:
        shape = (groups, wanted)
        self._priority = np.full(shape, NOBODY, dtype=np.uint32)
        self.sample = np.full(shape, -1, dtype=np.int64)
        """Sample of each member, [G, n]; -1 in empty places, which come last."""
        self.region = np.zeros(shape, dtype=np.int32)
        self.closeness = np.zeros(shape, dtype=np.float32)

    def add(self, rows: Rows, priority: Priority) -> None:
        """Take in a batch.

        Args:
            rows: Regions, in the order of the dataset; of equal priorities the first one wins.
            priority: [r], lower is better.
        """
        if not len(rows.label):
            return
        order = np.lexsort((priority, rows.label))
        label = rows.label[order]
        starts = np.flatnonzero(np.diff(label, prepend=-1))
        rank = np.arange(len(label)) - np.repeat(starts, np.diff(starts, append=len(label)))
        wanted = self.sample.shape[1]
        chosen = rank < wanted
        order, rank = order[chosen], rank[chosen]
        groups, place = np.unique(rows.label[order], return_inverse=True)
        news = np.full((len(groups), wanted), NOBODY, dtype=np.uint32)
        news[place, rank] = np.minimum(priority[order], NOBODY - 1)
        both = np.concatenate([self._priority[groups], news], axis=1)
        best = np.argsort(both, axis=1, kind="stable")[:, :wanted]
        for table, values in (
            (self.sample, rows.sample),
            (self.region, rows.region),
            (self.closeness, rows.closeness),
        ):
            fresh = np.full((len(groups), wanted), -1, dtype=table.dtype)
            fresh[place, rank] = values[order]
            table[groups] = np.take_along_axis(np.concatenate([table[groups], fresh], axis=1), best, axis=1)
        self._priority[groups] = np.take_along_axis(both, best, axis=1)


def by_distance(closeness: Floats) -> Priority:
    """Priority of the regions nearest to their center, from cosines [r]."""
    cosine = np.clip(np.nan_to_num(closeness.astype(np.float64), nan=-1), -1, 1)
    return ((1 - cosine) / 2 * (NOBODY - 1)).astype(np.uint32)


def by_chance(rows: Rows, seed: int) -> Priority:
    """A priority that is a hash of seed, sample and region: the same draw in any order of reading."""
    return (mix(rows.sample * 65_536 + rows.region, seed) >> np.uint64(32)).astype(np.uint32)


@dataclass(frozen=True)
class Groups:
    """The clusters, or the tokens: sizes, and members in two rows."""

    sizes: Integers
    """Regions of each, [K]."""
    closeness: NDArray[np.float64]
    """Mean cosine of its regions to the center, [K]; NaN where it is not known."""
    nearest: Members | None
    """None where no cosine is known."""
    random: Members
    cropped: NDArray[np.bool_]
    """Whether its members are cropped, [K]."""

    @cached_property
    def shown(self) -> Integers:
        """How many of the nearest and of the random members are shown, [K, 2].

        A group so small that the nearest are all there are has no random ones beside them.
        """
        wanted = self.random.sample.shape[1]
        size = np.minimum(self.sizes, wanted)
        if self.nearest is None:
            return np.stack([np.zeros_like(size), size], axis=1)
        return np.stack([size, size * (self.sizes > wanted)], axis=1)

    def wants(self) -> Integers:
        """Every crop to make: sample, region, group, slot, [m, 4]; slots count the shown ones of a group."""
        nearest, random = (self.shown * self.cropped[:, None]).T
        rows = [] if self.nearest is None else [_listed(self.nearest, nearest, np.zeros_like(nearest))]
        return np.concatenate([*rows, _listed(self.random, random, nearest)])


@dataclass(frozen=True)
class Counts:
    """The outcome of the pass."""

    clusters: Groups
    tokens: Groups
    regions: int
    """Object regions and text regions."""


def count_regions(
    source: Source, settings: AtlasSettings, clusters: int, tick: Callable[[int], object]
) -> Counts:
    """Read all regions once; memory depends on the numbers of clusters and tokens alone.

    Args:
        source: What to read.
        settings: How many members to keep.
        clusters: Number of clusters, K.
        tick: Called with the number of samples that were read.
    """
    objects = _Counter(clusters, settings, source.knows_closeness)
    texts = _Counter(len(source.pieces()), settings, False)
    regions = 0
    for batch in source.batches():
        objects.add(batch.objects)
        texts.add(batch.texts)
        regions += len(batch.objects.label) + len(np.unique(batch.texts.sample * 65_536 + batch.texts.region))
        tick(batch.samples)
    return Counts(objects.finish(), texts.finish(), regions)


class _Counter:
    def __init__(self, groups: int, settings: AtlasSettings, closeness: bool) -> None:
        self._settings = settings
        self._sizes = np.zeros(groups, dtype=np.int64)
        self._sums = np.zeros(groups, dtype=np.float64)
        self._nearest = Members(groups, settings.members) if closeness else None
        self._random = Members(groups, settings.members)

    def add(self, rows: Rows) -> None:
        groups = len(self._sizes)
        self._sizes += np.bincount(rows.label, minlength=groups)
        self._sums += np.bincount(rows.label, weights=rows.closeness, minlength=groups)
        self._random.add(rows, by_chance(rows, self._settings.seed))
        if self._nearest is not None:
            self._nearest.add(rows, by_distance(rows.closeness))

    def finish(self) -> Groups:
        with np.errstate(invalid="ignore", divide="ignore"):
            means = self._sums / self._sizes
        limit = self._settings.sheets or len(self._sizes)
        cropped = np.zeros(len(self._sizes), dtype=bool)
        cropped[np.argsort(-self._sizes, kind="stable")[:limit]] = True
        return Groups(self._sizes, means, self._nearest, self._random, cropped & (self._sizes > 0))


def _listed(members: Members, count: Integers, start: Integers) -> NDArray[np.int64]:
    """The first `count` members of each group, with slots from `start`."""
    group = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
    columns = (members.sample[group, place], members.region[group, place], group, start[group] + place)
    return np.stack([np.asarray(column, dtype=np.int64) for column in columns], axis=1)
