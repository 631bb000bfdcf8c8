"""The members that pages show: of every group the best few by a priority, kept while all regions pass by.

Shapes: r regions of a batch, G groups (clusters or tokens), n members of each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.source import Floats, Integers, Rows

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


def mix(numbers: Integers, seed: int) -> NDArray[np.uint64]:
    """Hash numbers, [r], with a seed: splitmix64's finisher, each bit of which depends on each of theirs."""
    with np.errstate(over="ignore"):
        word = numbers.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(word ^ (word >> np.uint64(31)), dtype=np.uint64)
