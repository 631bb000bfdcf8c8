"""What one pass over all regions tells of every cluster and token: its size and the members to show.

Shapes: K clusters, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.members import Members, by_chance, by_distance
from megaregion.atlas.settings import AtlasSettings
from megaregion.atlas.source import Integers, Rows, Source


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

    def shown(self, group: int) -> tuple[slice, slice]:
        """Which of the nearest and of the random members of a group are shown.

        A group so small that the nearest are all there are has no random ones beside them.
        """
        wanted = self.random.sample.shape[1]
        size = min(int(self.sizes[group]), wanted)
        if self.nearest is None:
            return slice(0, 0), slice(0, size)
        return slice(0, size), slice(0, size if self.sizes[group] > wanted else 0)

    def wants(self) -> NDArray[np.int64]:
        """Every crop to make: sample, region, group, slot, [m, 4]; slots count the shown ones of a group."""
        wanted = self.random.sample.shape[1]
        size = np.minimum(self.sizes, wanted) * self.cropped
        first = np.zeros_like(size) if self.nearest is None else size
        rows = [] if self.nearest is None else [_listed(self.nearest, first, np.zeros_like(size))]
        second = size if self.nearest is None else size * (self.sizes > wanted)
        return np.concatenate([*rows, _listed(self.random, second, first)])


@dataclass(frozen=True)
class Census:
    """The outcome of the pass."""

    clusters: Groups
    tokens: Groups
    regions: int
    """Object regions and text regions."""


def take_census(
    source: Source, settings: AtlasSettings, clusters: int, tick: Callable[[int], object]
) -> Census:
    """Read all regions once; memory depends on the numbers of clusters and tokens alone.

    Args:
        source: What to read.
        settings: How many members to keep.
        clusters: Number of clusters, K.
        tick: Called with the number of samples that were read.
    """
    objects = _Count(clusters, settings, source.knows_closeness)
    texts = _Count(len(source.pieces()), settings, False)
    regions = 0
    for batch in source.batches():
        objects.add(batch.objects)
        texts.add(batch.texts)
        regions += len(batch.objects.label) + len(np.unique(batch.texts.sample * 65_536 + batch.texts.region))
        tick(batch.samples)
    return Census(objects.finish(), texts.finish(), regions)


class _Count:
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
