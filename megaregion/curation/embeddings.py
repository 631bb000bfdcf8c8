"""Embeddings as k-means reads them: 16-bit rows on disk, unit vectors [n, C] in chunks that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

WORKING = 3
"""Float32 copies of a chunk that are alive at once while it is worked on."""


def unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows scaled to length 1, [n, C]; a row of zeros stays so, and one that is not finite becomes zero."""
    vectors = np.asarray(rows, dtype=np.float32)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    vectors = vectors if finite.all() else np.where(finite[:, None], vectors, np.float32(0))
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)


def evenly(total: int, wanted: int) -> NDArray[np.int64]:
    """At most ``wanted`` different rows out of ``total``, evenly spaced, so that no order biases them."""
    count = min(total, wanted)
    return (np.arange(count, dtype=np.int64) * total) // max(count, 1)


def rows_in(memory: int, channels: int) -> int:
    """Rows of a chunk that keeps within so many MiB."""
    return max(1, memory * 2**20 // (4 * channels * WORKING))


class Embeddings:
    """All embeddings, of which this rank works on a part; all ranks must make one together.

    Rows of zeros or that are not finite have no embedding and are left out.

    Args:
        parts: Files or arrays of rows, float16 [r, C], which follow one another.
        memory: MiB that embeddings may take while they are worked on; where all fit, they stay there.
        device: Where to work; embeddings stay on a GPU in 16 bits where they fit in half of what is free.
    """

    def __init__(
        self, parts: Sequence[Path | NDArray[np.floating]], memory: int, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._parts = parts
        shapes = [_open(part).shape for part in parts]
        self.channels = int(shapes[0][1])
        self._ends = np.cumsum([rows for rows, _ in shapes])
        self.total = int(self._ends[-1])
        """Rows of all ranks."""
        own = self.own(self.total)
        self.chunk = rows_in(memory, self.channels)
        self._spans = [np.arange(row, min(row + self.chunk, own.stop)) for row in own[:: self.chunk]]
        on_gpu = self.device.type == "cuda"
        room = torch.cuda.mem_get_info(self.device)[0] // 2 if on_gpu else memory * 2**20
        size = len(own) * self.channels * (2 if on_gpu else 4)
        self._held: list[Tensor] | None = [] if size <= room else None
        usable = broken = 0
        for rows in self._spans:
            raw = self.read(rows)
            vectors = self._usable(raw)
            usable += len(vectors)
            broken += len(raw) - int(np.isfinite(raw).all(axis=1).sum())
            if self._held is not None:
                self._held.append(vectors.half() if on_gpu else vectors)
        self.usable, self.broken = self.add(torch.tensor([usable, broken], device=self.device)).tolist()
        """Rows of all ranks with an embedding, and rows that are not finite."""

    def __iter__(self) -> Iterator[Tensor]:
        """Unit vectors of this rank's part, float32 [n, C], always in the same chunks."""
        if self._held is None:
            yield from (self._usable(self.read(rows)) for rows in self._spans)
        else:
            yield from (v if v.dtype == torch.float32 else normalize(v.float()) for v in self._held)

    def own(self, total: int) -> range:
        """This rank's part of so many things."""
        return range(total * self.rank // self.ranks, total * (self.rank + 1) // self.ranks)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.floating]:
        """Rising rows as they lie on disk, counted over all ranks, [len(rows), C]."""
        starts = [0, *self._ends[:-1].tolist()]
        of_parts = zip(self._parts, np.split(rows, np.searchsorted(rows, starts[1:])), starts, strict=True)
        found = [np.asarray(_open(part)[own - start]) for part, own, start in of_parts if len(own)]
        return np.concatenate(found) if found else np.zeros((0, self.channels), dtype=np.float16)

    def add(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def agree(self, values: Tensor) -> Tensor:
        """What the first rank has, in place."""
        if self.ranks > 1:
            dist.broadcast(values, 0)
        return values

    def _usable(self, raw: NDArray[np.floating]) -> Tensor:
        vectors = unit(raw)
        usable = vectors.any(axis=1)
        return torch.from_numpy(vectors if usable.all() else vectors[usable]).to(self.device)


def _open(part: Path | NDArray[np.floating]) -> NDArray[np.floating]:
    """A part's rows, read when they are touched; a file is closed again with what was taken of it."""
    return np.load(part, mmap_mode="r", allow_pickle=False) if isinstance(part, Path) else part
