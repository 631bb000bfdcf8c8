"""Embeddings on disk: float16 files, read as unit vectors in parts that fit in memory.

Shapes: r rows of a file, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.kmeans.kmeans import Vectors
from megaregion.curation.types import unit

WORKING = 3
"""Float32 copies of a chunk that are alive at once while it is worked on."""


def open_rows(path: Path) -> NDArray[np.float16]:
    """A file of embeddings [r, C], of which only what is touched is read."""
    rows: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    return rows


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


def rows_in(memory: int, channels: int) -> int:
    """Rows of a chunk that keeps within so many MiB."""
    return max(1, memory * 2**20 // (4 * channels * WORKING))


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
