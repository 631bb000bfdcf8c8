"""Where an atlas comes from: label spaces, labelled regions in one pass, and any sample by its number.

Shapes: r regions of a batch, K centers of C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.data.sample import SampleRecord

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """A batch of labelled regions; a text region gives one row for each of its tokens."""

    label: Integers
    """Cluster or token, [r]."""
    sample: Integers
    """Number of the sample in the dataset, [r]."""
    region: Integers
    """Place of the region in its sample's record, [r]."""
    closeness: Floats
    """Cosine to the cluster's center, [r]; NaN where it is not known."""


@dataclass(frozen=True)
class Batch:
    """The regions of some consecutive samples."""

    samples: int
    objects: Rows
    texts: Rows


@dataclass(frozen=True)
class Sample:
    """One sample, its image decoded to RGB."""

    key: str
    image: Image.Image
    record: SampleRecord


class Source(Protocol):
    """Gives everything that an atlas shows; picklable, so that workers can read too."""

    @property
    def title(self) -> str:
        """What the atlas is of, in a few words."""
        ...

    @property
    def identity(self) -> str:
        """Hash of the content: equal sources give equal atlases."""
        ...

    @property
    def samples(self) -> int:
        """Number of samples."""
        ...

    @property
    def knows_closeness(self) -> bool:
        """Whether the cosine of each region to its center is known."""
        ...

    def centers(self) -> Floats:
        """The centers, [K, C]; may be mapped from a file."""
        ...

    def pieces(self) -> Sequence[str]:
        """The text of each token; empty without text."""
        ...

    def batches(self) -> Iterator[Batch]:
        """All regions, in the order of the samples."""
        ...

    def read(self, number: int) -> Sample:
        """Read a sample.

        Raises:
            BadSample: It is damaged.
        """
        ...


def make_rows(rows: Sequence[tuple[int, int, int, float]]) -> Rows:
    """Rows from (label, sample, region, closeness) of each."""
    numbers = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3)
    return Rows(
        numbers[:, 0], numbers[:, 1], numbers[:, 2], np.array([row[3] for row in rows], dtype=np.float32)
    )


def mix(numbers: Integers, seed: int) -> NDArray[np.uint64]:
    """Hash numbers, [r], with a seed: splitmix64's finisher, each bit of which depends on each of theirs."""
    with np.errstate(over="ignore"):
        word = numbers.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(word ^ (word >> np.uint64(31)), dtype=np.uint64)
