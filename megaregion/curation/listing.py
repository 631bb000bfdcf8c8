"""A list that may be too long for memory: one JSON object a line on disk, and where each line begins."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Listing:
    """Reads any part of a listing; a process holds no more than that part.

    Args:
        path: The file of lines; where they begin lies beside it as PATH.offsets.npy.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Lines start to stop - 1, in order."""
        stop = min(stop, len(self))
        if start >= stop:
            return
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[start]))
            for _ in range(stop - start):
                yield json.loads(file.readline())

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        offsets: NDArray[np.int64] = np.load(_beside(self.path), mmap_mode="r", allow_pickle=False)
        return offsets


def write_listing(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a listing; it takes its name when it is complete.

    Args:
        path: The file of lines.
        rows: JSON objects; 8 bytes of memory are spent on each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    offsets = array("q", [0])
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for row in rows:
            line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
    beside = path.with_name(f".{path.name}.offsets.partial")
    with beside.open("wb") as file:
        np.save(file, np.frombuffer(offsets, dtype=np.int64), allow_pickle=False)
    partial.replace(path)
    beside.replace(_beside(path))


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.offsets.npy")
