"""Brings a remote dataset's next shards while those of the window in use are read."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from megaregion.data.info import ShardEntry
from megaregion.data.mirror import Mirror
from megaregion.data.order import SampleOrder
from megaregion.errors import UserError


class ReadAhead:
    """One thread of a reading process; of several processes each brings what no other is bringing.

    Args:
        mirror: The dataset's local side.
        order: Which shards a window has.
    """

    def __init__(self, mirror: Mirror, order: SampleOrder) -> None:
        self._mirror, self._order = mirror, order
        self._thread: threading.Thread | None = None
        self._begun: tuple[int, ...] = ()

    def reached(self, position: int) -> None:
        """Tell where the process reads; returns at once.

        What cannot be had is not told here: the read that needs it finds out, waits and tells.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        here, following = self._order.windows(position)
        if here == self._begun:
            return
        self._begun = here
        shards = self._mirror.info.shards
        # What follows must not push out what is in use.
        wanted = [shards[number] for number in here]
        for number in following:
            if self._mirror.fits([*wanted, shards[number]]):
                wanted.append(shards[number])
        # A daemon: the process may end in the middle of a shard, whose part is nobody's then and makes room.
        self._thread = threading.Thread(target=self._bring, args=(wanted,), name="read-ahead", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until what was begun is there."""
        if self._thread is not None:
            self._thread.join()

    def _bring(self, shards: Sequence[ShardEntry]) -> None:
        for shard in shards:
            with contextlib.suppress(OSError, UserError):
                self._mirror.shard(shard, wait=False)
