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


def unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows scaled to length 1, [n, C]; a row of zeros stays so, and one that is not finite becomes zero."""
    vectors = np.asarray(rows, dtype=np.float32)
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    vectors = vectors if finite.all() else np.where(finite[:, None], vectors, np.float32(0))
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)


def usable(rows: NDArray[np.floating], device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit vectors of the rows that have an embedding, [m, C], and which these are, bool [n]."""
    vectors = torch.from_numpy(unit(rows)).to(device)
    some = vectors.any(1)
    return (vectors if some.all() else vectors[some]), some


def evenly(total: int, wanted: int) -> NDArray[np.int64]:
    """At most ``wanted`` different rows out of ``total``, evenly spaced, so that no order biases them."""
    count = min(total, wanted)
    return (np.arange(count, dtype=np.int64) * total) // max(count, 1)


def own_device() -> torch.device:
    """This process's GPU, if it has one."""
    return torch.device(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")


def rows_in(memory: int, channels: int) -> int:
    """Rows of a chunk that keeps within so many MiB with three float32 copies of it, as work on it makes."""
    return max(1, memory * 2**20 // (12 * channels))


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
        self.chunk = rows_in(memory, self.channels)
        on_gpu = self.device.type == "cuda"
        room = torch.cuda.mem_get_info(self.device)[0] // 2 if on_gpu else memory * 2**20
        size = len(self.own(self.total)) * self.channels * (2 if on_gpu else 4)
        self._held: list[Tensor] | None = [] if size <= room else None
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        for raw in self._raw():
            vectors, _ = usable(raw, self.device)
            counts += counts.new_tensor([len(vectors), (~np.isfinite(raw).all(axis=1)).sum()])
            if self._held is not None:
                self._held.append(vectors.half() if on_gpu else vectors)
        self.usable, self.broken = self.add(counts).tolist()
        """Rows of all ranks with an embedding, and rows that are not finite."""

    def __iter__(self) -> Iterator[Tensor]:
        """Unit vectors of this rank's part, float32 [n, C], always in the same chunks."""
        if self._held is None:
            yield from (usable(raw, self.device)[0] for raw in self._raw())
        else:
            yield from (v if v.dtype == torch.float32 else normalize(v.float()) for v in self._held)

    def own(self, total: int) -> range:
        """This rank's part of so many things."""
        return range(total * self.rank // self.ranks, total * (self.rank + 1) // self.ranks)

    def chunks(self, total: int) -> list[slice]:
        """The same, as many at once as a chunk has rows."""
        own = self.own(total)
        return [slice(row, min(row + self.chunk, own.stop)) for row in own[:: self.chunk]]

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

    def _raw(self) -> Iterator[NDArray[np.floating]]:
        return (self.read(np.arange(part.start, part.stop)) for part in self.chunks(self.total))


def _open(part: Path | NDArray[np.floating]) -> NDArray[np.floating]:
    """A part's rows, read when they are touched; a file is closed again with what was taken of it."""
    return np.load(part, mmap_mode="r", allow_pickle=False) if isinstance(part, Path) else part
