"""Reading from storage that fails now and then: again after a pause, then without the shard that stays away.

A file server that restarts is back within a minute; a shard on a broken disk is not, and a run of weeks must
not end over it. What is skipped is no longer a function of (seed, position), so it is always told.
"""

from __future__ import annotations

import time

from megaregion.data.shards import RawSample, ShardedDataset

FORGOTTEN_AFTER = 600.0
"""Seconds after which a lost shard is tried once more."""


class LostShard(OSError):
    """A shard that cannot be read at the moment; its text is one line."""


class PatientReader:
    """Reads samples in spite of storage errors, in one process.

    Args:
        dataset: Where samples are read.
        retries: How often a read is tried again before its shard counts as lost.
        pause: Seconds before the first of these; each later pause is twice as long.
    """

    def __init__(self, dataset: ShardedDataset, retries: int, pause: float) -> None:
        self._dataset, self._retries, self._pause = dataset, retries, pause
        self._lost: dict[int, float] = {}

    def read(self, index: int) -> RawSample:
        """Read sample `index`.

        Raises:
            LostShard: Its shard cannot be read, now or a short while ago.
            UserError: The index of the shard does not fit its tar.
        """
        shard = self._dataset.shard_of(index)
        name = self._dataset.info.shards[shard].name
        if time.monotonic() < self._lost.get(shard, 0.0):
            raise LostShard(f"{name} is skipped, it could not be read")
        tries = 1 if shard in self._lost else 1 + self._retries
        for attempt in range(tries):
            try:
                sample = self._dataset.read(index)
            except OSError as error:
                # A descriptor from before the fault may stay stale for ever.
                self._dataset.close()
                if attempt == tries - 1:
                    self._lost[shard] = time.monotonic() + FORGOTTEN_AFTER
                    raise LostShard(f"{name} is skipped after {tries} tries: {error}") from error
                time.sleep(self._pause * 2**attempt)
            else:
                self._lost.pop(shard, None)
                return sample
        raise AssertionError("unreachable: the last attempt returns or raises")
