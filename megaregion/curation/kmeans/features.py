"""Embeddings as k-means reads them: float16 rows on disk, unit vectors in parts that fit in memory.

Shapes: r rows of a file, n vectors, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.types import unit

Vectors = NDArray[np.float32]

WORKING = 3
"""Float32 copies of a chunk that are alive at once while it is worked on."""

Number = TypeVar("Number", np.float16, np.float32)


def to_unit(rows: NDArray[np.float16]) -> Vectors:
    """Rows as unit vectors, float32; half precision had bent their length.

    A row that is not finite becomes zero, as one without embedding is.
    """
    vectors = np.asarray(rows, dtype=np.float32)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    if not finite.all():
        vectors = np.where(finite[:, None], vectors, np.float32(0))
    return unit(vectors)


def count_broken(rows: NDArray[np.float16]) -> int:
    """How many rows are not finite."""
    return int((~np.isfinite(rows).all(axis=1)).sum())


def evenly(total: int, wanted: int) -> NDArray[np.int64]:
    """At most ``wanted`` different rows out of ``total``, evenly spaced, so that no order biases them."""
    count = min(total, wanted)
    return (np.arange(count, dtype=np.int64) * total) // max(count, 1)


def rows_in(memory: int, channels: int) -> int:
    """Rows of a chunk that keeps within so many MiB."""
    return max(1, memory * 2**20 // (4 * channels * WORKING))


def in_chunks(vectors: NDArray[Number], rows: int) -> Iterator[NDArray[Number]]:
    """Consecutive parts of at most ``rows`` vectors."""
    for start in range(0, len(vectors), rows):
        yield vectors[start : start + rows]


def chunks(parts: Sequence[NDArray[np.float16]], rows: int) -> Iterator[Vectors]:
    """Unit vectors of several arrays after one another, ``rows`` at a time whatever the arrays' lengths."""
    waiting: list[NDArray[np.float16]] = []
    held = 0
    for part in parts:
        start = 0
        while start < len(part):
            taken = part[start : start + rows - held]
            waiting.append(taken)
            held, start = held + len(taken), start + len(taken)
            if held == rows:
                yield to_unit(np.concatenate(waiting))
                waiting, held = [], 0
    if held:
        yield to_unit(np.concatenate(waiting))


def pick(parts: Sequence[NDArray[np.float16]], rows: NDArray[np.int64]) -> NDArray[np.float16]:
    """Rising rows of several arrays, counted from the first array's first, [len(rows), C]."""
    ends = np.cumsum([len(part) for part in parts])
    starts = [0, *ends[:-1].tolist()]
    own = np.split(rows, np.searchsorted(rows, ends[:-1]))
    return np.concatenate([part[mine - start] for part, mine, start in zip(parts, own, starts, strict=True)])
