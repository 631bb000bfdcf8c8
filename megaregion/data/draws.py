"""Random numbers as a function of what they are for, so that no state travels with the data.

A draw depends on the run's seed, a purpose and up to three numbers (position, epoch, window ...), never
on the process that makes it or on what was drawn before.
"""

from __future__ import annotations

import enum

import numpy as np


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
    # Philox counts up from the lowest word, so streams that differ in a higher word never meet.
    counter = [0, *numbers, *[0] * (3 - len(numbers))]
    words = np.array([seed % 2**64, purpose, *counter], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words[:2], counter=words[2:]))
