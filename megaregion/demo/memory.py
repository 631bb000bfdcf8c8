"""Peak memory of a command and all that it starts, watched from outside."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")


class PeakMemory:
    """Greatest sum over this process's descendants while the block runs; Linux only, else 0.

    Memory that processes share counts once: each is charged its proportional share (PSS).
    """

    def __init__(self, root: int, seconds: float = 1.0) -> None:
        """Prepare.

        Args:
            root: Process whose descendants are watched.
            seconds: Pause between two looks; a shorter peak can be missed.
        """
        self._root, self._seconds = root, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self.peak = 0
        """Bytes."""

    def __enter__(self) -> PeakMemory:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self.peak = max(self.peak, sum(_pss(process) for process in _descendants(self._root)))


def _descendants(root: int) -> list[int]:
    """Processes below a process, by the kernel's lists of children."""
    found, waiting = [], [root]
    while waiting:
        process = waiting.pop()
        for file in (PROC / str(process) / "task").glob("*/children"):
            children = [int(child) for child in _read(file).split()]
            found += children
            waiting += children
    return found


def _pss(process: int) -> int:
    for line in _read(PROC / str(process) / "smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(file: Path) -> str:
    """Content of a file of /proc; empty when the process has just ended."""
    try:
        return file.read_text()
    except OSError:
        return ""
