"""Random numbers as a function of what they are for, so that no state travels with the data.

A draw depends on the run's seed, a purpose and up to three numbers (position, epoch, window ...), never
on the process that makes it or on what was drawn before.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Purpose(enum.IntEnum):
    """What a draw is for; two purposes never share a stream."""

    SHARDS = 1
    WINDOW = 2
    REPLACEMENT = 3
    AUGMENTATION = 4


def generator(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
    """A generator of its own for (seed, purpose, numbers).

    Args:
        seed: The run's seed.
        purpose: What the draw is for.
        numbers: At most three numbers below 2**64 that tell this draw from others.
    """
    words = _words(seed, purpose, *numbers)
    return np.random.Generator(np.random.Philox(key=words[:2], counter=words[2:]))


class Stream:
    """The same draws as :func:`generator`, one generator set anew each time.

    Making a generator asks the system for entropy that nobody wants, which takes longer than all draws of a
    sample.

    Args:
        seed: The run's seed.
        purpose: What the draws are for.
    """

    def __init__(self, seed: int, purpose: Purpose) -> None:
        self._seed, self._purpose = seed, purpose
        self._philox = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._state: Any = self._philox.state

    def at(self, *numbers: int) -> np.random.Generator:
        """The generator of (seed, purpose, numbers), this stream's only one: draw before the next call."""
        words = _words(self._seed, self._purpose, *numbers)
        state: Any = {**self._state, "state": {"key": words[:2], "counter": words[2:]}}
        self._philox.state = state
        return self._generator


def _words(seed: int, purpose: Purpose, *numbers: int) -> NDArray[np.uint64]:
    # Philox counts up from the lowest word, so streams that differ in a higher word never meet.
    counter = [0, *numbers, *[0] * (3 - len(numbers))]
    return np.array([seed % 2**64, purpose, *counter], dtype=np.uint64)
