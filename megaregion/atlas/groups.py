"""What one pass over all regions tells of every cluster and token: its size, and the members that pages show.

Shapes: K clusters, V tokens, r regions of a batch, G groups (clusters or tokens), n members of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.settings import AtlasSettings
from megaregion.atlas.source import Integers, Rows, Source, rank_within
from megaregion.data.order import mix

Priority = NDArray[np.uint32]
NOBODY = np.iinfo(np.uint32).max
"""Priority of an empty place."""
MEMBER = np.dtype(
    [("priority", np.uint32), ("sample", np.int64), ("region", np.int32), ("closeness", np.float32)]
)
WHOLE = np.dtype((np.void, MEMBER.itemsize))
"""A member as plain bytes: numpy moves these three times as fast as field by field."""
EMPTY = np.array((NOBODY, -1, 0, 0), MEMBER)


class Members:
    """The n regions of lowest priority in each of G groups; memory depends on G and n alone."""

    def __init__(self, groups: int, wanted: int) -> None:
        self.table = np.full((groups, wanted), EMPTY)
        """The best first, [G, n] of :data:`MEMBER`; empty places come last."""

    def add(self, rows: Rows, priority: Priority) -> None:
        """Take in a batch in the order of the dataset; of equal priorities, [r], the first one wins."""
        wanted = self.table.shape[1]
        if not wanted:
            return
        order = np.lexsort((priority, rows["label"]))
        rank = rank_within(rows["label"][order])
        order, rank = order[rank < wanted], rank[rank < wanted]
        found = np.empty(len(order), MEMBER)
        found["priority"] = np.minimum(priority[order], NOBODY - 1)
        for name in ("sample", "region", "closeness"):
            found[name] = rows[name][order]
        groups, place = np.unique(rows["label"][order], return_inverse=True)
        news = np.full((len(groups), wanted), EMPTY)
        news[place, rank] = found
        table = self.table.view(WHOLE)
        both = np.concatenate([table[groups], news.view(WHOLE)], axis=1)
        best = np.argsort(both.view(MEMBER)["priority"], axis=1, kind="stable")[:, :wanted]
        table[groups] = np.take_along_axis(both, best, axis=1)


def by_distance(rows: Rows) -> Priority:
    """Priority of the regions nearest to their center."""
    cosine = np.clip(np.nan_to_num(rows["closeness"].astype(np.float64), nan=-1), -1, 1)
    return ((1 - cosine) / 2 * (NOBODY - 1)).astype(np.uint32)


def by_chance(rows: Rows, seed: int) -> Priority:
    """A priority that is a hash of seed, sample and region: the same draw in any order of reading."""
    return (mix(rows["sample"] * 65_536 + rows["region"], seed) >> np.uint64(32)).astype(np.uint32)


class Groups:
    """The G clusters, or tokens; what is told of them holds once all batches were added.

    Without ``closeness``, where cosines are not known, no member is among the nearest.
    """

    def __init__(self, groups: int, settings: AtlasSettings, closeness: bool) -> None:
        self._settings = settings
        self._sums = np.zeros(groups, dtype=np.float64)
        self._nearest = Members(groups, settings.members if closeness else 0)
        self._random = Members(groups, settings.members)
        self.sizes = np.zeros(groups, dtype=np.int64)
        """Regions of each, [G]."""

    def add(self, rows: Rows) -> None:
        """Take in a batch."""
        groups = len(self.sizes)
        self.sizes += np.bincount(rows["label"], minlength=groups)
        self._sums += np.bincount(rows["label"], weights=rows["closeness"], minlength=groups)
        self._random.add(rows, by_chance(rows, self._settings.seed))
        self._nearest.add(rows, by_distance(rows))

    @property
    def members(self) -> tuple[NDArray[np.void], NDArray[np.void]]:
        """The nearest and random ones, each [G, n] of :data:`MEMBER`."""
        return self._nearest.table, self._random.table

    @cached_property
    def closeness(self) -> NDArray[np.float64]:
        """Mean cosine of each group's regions to the center, [G]; NaN where it is not known."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sums / self.sizes

    @cached_property
    def cropped(self) -> NDArray[np.bool_]:
        """Whether a group's members are cropped, [G]."""
        cropped = np.zeros(len(self.sizes), dtype=bool)
        cropped[np.argsort(-self.sizes, kind="stable")[: self._settings.sheets or None]] = True
        return cropped & (self.sizes > 0)

    @cached_property
    def shown(self) -> Integers:
        """How many of the nearest and of the random members are shown, [G, 2].

        A group so small that the nearest are all there are has no random ones beside them.
        """
        nearest, random = (np.minimum(self.sizes, table.shape[1]) for table in self.members)
        return np.stack([nearest, random * (self.sizes > nearest)], axis=1)

    def wants(self) -> Integers:
        """Every crop to make: sample, region, group, slot, [m, 4]; slots count the shown ones of a group."""
        counts = (self.shown * self.cropped[:, None]).T
        wants = []
        for table, count, first in zip(self.members, counts, (0 * counts[0], counts[0]), strict=True):
            group = np.repeat(np.arange(len(count)), count)
            place = rank_within(group)
            own = table[group, place]
            wants.append(np.stack([own["sample"], own["region"], group, first[group] + place], axis=1))
        return np.concatenate(wants)


def count_regions(
    source: Source, settings: AtlasSettings, clusters: int, tick: Callable[[int], object]
) -> tuple[Groups, Groups, int]:
    """The K clusters, the tokens and the number of regions, by one pass; ``tick`` gets the samples just read.

    Memory depends on the numbers of clusters and tokens alone.
    """
    objects = Groups(clusters, settings, source.knows_closeness)
    texts = Groups(len(source.pieces()), settings, closeness=False)
    regions = 0
    for batch in source.batches():
        objects.add(batch.objects)
        texts.add(batch.texts)
        own = np.unique(batch.texts["sample"] * 65_536 + batch.texts["region"])
        regions += len(batch.objects) + len(own)
        tick(batch.samples)
    return objects, texts, regions
