"""The order of samples: position p of an endless stream is a pure function of (seed, p).

Epoch p // n shuffles the shards, cuts them into windows of a few shards, and shuffles the samples inside
each window, so that reads stay near each other on disk while neighbours in the stream are mixed. Nothing
is replayed on resume, and ranks and workers only choose which positions they take.

Several datasets share the stream as nearly in the ratio of their weights as whole samples allow, at every
position and not only on average: the first takes position p where floor((p + 1) w / W) grows, and the others
share what is left in the same way. So a dataset's part, and how much of it went by, are sums of a few whole
numbers, whatever was drawn before.

Random numbers follow the same rule: they depend on the run's seed, a purpose and up to three numbers
(position, epoch, window ...), never on the process that draws them or on what was drawn before.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

CACHED_EPOCHS, CACHED_WINDOWS = 2, 4
"""A step touches one window, or two at a border; prefetching workers may be a little ahead."""

Indices = NDArray[np.int64]


class Purpose(enum.IntEnum):
    """What random numbers are for; two purposes never share a sequence."""

    SHARDS = 1
    WINDOW = 2
    REPLACEMENT = 3
    AUGMENTATION = 4
    LABELS = 5
    DEPTH = 6


def seeded_rng(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
    """A generator of its own for (seed, purpose, numbers): at most three numbers below 2**64."""
    words = _words(seed, purpose, *numbers)
    return np.random.Generator(np.random.Philox(key=words[:2], counter=words[2:]))


class SeededRng:
    """The generators of :func:`seeded_rng` for one seed and purpose, one object set anew each time.

    Making a generator asks the system for entropy that nobody wants, which takes longer than all random
    numbers of a sample.
    """

    def __init__(self, seed: int, purpose: Purpose) -> None:
        self._seed, self._purpose = seed, purpose
        self._philox = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._state: Any = self._philox.state

    def at(self, *numbers: int) -> np.random.Generator:
        """The generator of (seed, purpose, numbers); the next call sets the same object anew."""
        words = _words(self._seed, self._purpose, *numbers)
        state: Any = {**self._state, "state": {"key": words[:2], "counter": words[2:]}}
        self._philox.state = state
        return self._generator


def _words(seed: int, purpose: Purpose, *numbers: int) -> NDArray[np.uint64]:
    # Philox counts up from the lowest word, so sequences that differ in a higher word never meet.
    counter = [0, *numbers, *[0] * (3 - len(numbers))]
    return np.array([seed % 2**64, purpose, *counter], dtype=np.uint64)


def kept_branches(seed: int, positions: Sequence[int], rates: Sequence[float]) -> NDArray[np.float32]:
    """Factors of the residual branches of the samples at positions, by stochastic depth, [B, 2 L].

    Each block drops its attention and its MLP at its own rate, apart from each other: 0 if a branch of a
    sample is dropped, 1 / (1 - rate) if not, so that its mean stays. A stage, a rank or a step that is taken
    again changes no draw. (Huang et al., Deep Networks with Stochastic Depth, 2016; by image as in DINOv2.)
    """
    rng, stays = SeededRng(seed, Purpose.DEPTH), 1 - np.repeat(np.asarray(rates), 2)
    drawn = np.array([rng.at(position).random(len(stays)) for position in positions])
    return np.where(drawn < stays, 1 / stays, 0).astype(np.float32)


def mix(numbers: Indices, seed: int) -> NDArray[np.uint64]:
    """Hash numbers, [r], with a seed: splitmix64's finisher, each bit of which depends on each of theirs."""
    with np.errstate(over="ignore"):
        word = numbers.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(word ^ (word >> np.uint64(31)), dtype=np.uint64)


class SampleOrder:
    """Which sample of the dataset stands at which position of the stream.

    Args:
        shard_sizes: Samples of each shard, in the order of the dataset.
        seed: The run's seed.
        window_shards: Shards whose samples are shuffled together.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window_shards: int) -> None:
        self._arguments = (tuple(shard_sizes), seed, window_shards)
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        if window_shards < 1 or not self._sizes.size or self._sizes.min() < 1:
            raise ValueError(
                f"shards and windows must not be empty: {shard_sizes}, window of {window_shards}"
            )
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed, self._window_shards = seed, window_shards
        self.samples = int(self._sizes.sum())
        self._epoch: Callable[[int], tuple[Indices, list[int]]]
        self._epoch = lru_cache(CACHED_EPOCHS)(self._shuffle_shards)
        self._window: Callable[[int, int], Indices] = lru_cache(CACHED_WINDOWS)(self._shuffle_window)

    def __reduce__(self) -> tuple[type[SampleOrder], tuple[tuple[int, ...], int, int]]:
        return SampleOrder, self._arguments

    def sample(self, position: int) -> int:
        """Index in the dataset of the sample at a position, 0 <= position < 2**64."""
        epoch, window, place = self._find(position)
        return int(self._window(epoch, window)[place])

    def replacement(self, position: int, attempt: int) -> int:
        """Index of the sample that stands in, at this attempt, when that of a position cannot be used.

        It is drawn from the whole dataset, and never the sample that it replaces (unless there is no other).
        """
        original = self.sample(position)
        if self.samples == 1:
            return original
        rng = seeded_rng(self._seed, Purpose.REPLACEMENT, position, attempt)
        other = int(rng.integers(self.samples - 1))
        return other + (other >= original)

    def windows(self, position: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shards of the window that holds a position, and of the next, which may be the next epoch's."""
        epoch, window, _ = self._find(position)
        last = window + 1 == len(self._epoch(epoch)[1])
        following = (epoch + 1, 0) if last else (epoch, window + 1)
        return self._shards_of(epoch, window), self._shards_of(*following)

    def _find(self, position: int) -> tuple[int, int, int]:
        """Epoch, window and place inside the window."""
        epoch, place = divmod(position, self.samples)
        starts = self._epoch(epoch)[1]
        window = bisect_right(starts, place) - 1
        return epoch, window, place - starts[window]

    def _shards_of(self, epoch: int, window: int) -> tuple[int, ...]:
        first = window * self._window_shards
        return tuple(self._epoch(epoch)[0][first : first + self._window_shards].tolist())

    def _shuffle_shards(self, epoch: int) -> tuple[Indices, list[int]]:
        """Shards of an epoch in order, [shards], and the place where each window begins, [windows]."""
        shards = seeded_rng(self._seed, Purpose.SHARDS, epoch).permutation(self._sizes.size)
        ends = np.cumsum(self._sizes[shards])
        return shards, (ends - self._sizes[shards])[:: self._window_shards].tolist()

    def _shuffle_window(self, epoch: int, window: int) -> Indices:
        """Dataset indices of a window's samples in order, [samples of the window]."""
        indices = [
            np.arange(self._starts[shard], self._starts[shard] + self._sizes[shard])
            for shard in self._shards_of(epoch, window)
        ]
        return seeded_rng(self._seed, Purpose.WINDOW, epoch, window).permutation(np.concatenate(indices))


class MixedOrder:
    """Which sample of the datasets, numbered one dataset after the other, stands at which position.

    Args:
        orders: The order of each dataset, in its own positions.
        weights: Shares of the stream, relative to each other.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[Fraction]) -> None:
        self.orders = tuple(orders)
        scale = lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        self._splits = [(own, sum(whole[number:])) for number, own in enumerate(whole)]
        self._firsts = list(accumulate((order.samples for order in orders), initial=0))
        self.samples = self._firsts[-1]

    def sample(self, position: int) -> int:
        """Index of the sample at a position, 0 <= position < 2**64."""
        number, own = self._place(position)
        return self._firsts[number] + self.orders[number].sample(own)

    def replacement(self, position: int, attempt: int) -> int:
        """As that of the dataset at a position: what stands in is of the same one, which keeps the ratio."""
        number, own = self._place(position)
        return self._firsts[number] + self.orders[number].replacement(own, attempt)

    def reached(self, position: int) -> list[int]:
        """Samples of each dataset before a position; also the position in its own order where it goes on."""
        counts = []
        for own, total in self._splits:
            counts.append(position * own // total)
            position -= counts[-1]
        return counts

    def _place(self, position: int) -> tuple[int, int]:
        """Number of the dataset at a position, and the position in its own order."""
        for number, (own, total) in enumerate(self._splits):
            before = position * own // total
            if (position + 1) * own // total > before:
                return number, before
            position -= before
        raise AssertionError("unreachable: the last dataset takes all that is left")


Orders = SampleOrder | MixedOrder


def step_positions(
    step: int, global_batch: int, micro_step: int, micro_steps: int, data_rank: int, data_ranks: int
) -> range:
    """Positions that one data-parallel rank takes in one micro-step.

    Step s of G images covers [s * G, (s + 1) * G); micro-step m its m-th part; each rank a contiguous slice
    of that. Steps, micro-steps and ranks count from 0.

    Raises:
        ValueError: The global batch cannot be divided into equal slices.
    """
    images, rest = divmod(global_batch, micro_steps * data_ranks)
    if rest or not images:
        raise ValueError(
            f"{global_batch} images do not split over {micro_steps} micro-steps of {data_ranks} ranks"
        )
    start = step * global_batch + (micro_step * data_ranks + data_rank) * images
    return range(start, start + images)
