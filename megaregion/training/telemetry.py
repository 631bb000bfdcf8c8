"""Where a step's time goes on this rank, and at log steps on all ranks beside each other."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from megaregion.config import RunConfig
from megaregion.data.batch import Batch
from megaregion.parallel.topology import Topology, all_gather_strings, host_name
from megaregion.training.metrics import LOG
from megaregion.training.phases import Phases, Split, gather_phases
from megaregion.training.slow import OwnTime, RankTimes, gather_times, slow_ranks
from megaregion.training.utilisation import Utilisation


class Telemetry:
    """The clocks of one rank.

    Args:
        config: The run.
        topology: This rank's place.
        classes: Classes of each head, by kind.
    """

    def __init__(self, config: RunConfig, topology: Topology, classes: Mapping[str, int]) -> None:
        self.hosts = all_gather_strings(host_name(), topology)
        """Host of every rank; learned by a collective."""
        self._slow_factor, self._topology = config.train.slow_factor, topology
        self._phases = Phases(topology.device)
        waits_inside = config.parallel.tensor > 1 or config.parallel.zero_stage == 3
        self._own_time = OwnTime(topology.device, waits_inside)
        self._utilisation = Utilisation(config, dict(classes), topology)
        self._since_log = RankTimes()
        self._spent: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()
        self._split: Split | None = None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of the step; on a GPU it marks the queue."""
        return self._phases(name)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """The same, also counting what the host spends in it, for the log line."""
        began = time.perf_counter()
        with self._phases(name):
            yield
        self._spent[name] += time.perf_counter() - began

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass of the body."""
        with self._phases("forward"), self._own_time.forward():
            yield

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._spent.clear()
        self._began = time.perf_counter()

    def see(self, batch: Batch) -> None:
        """Count the operations that a batch will take."""
        self._utilisation.see(batch)

    def end_step(self, bad: int) -> dict[str, float]:
        """Stop the clock of a step.

        Args:
            bad: Samples that this rank replaced in it.

        Returns:
            seconds, and the shares of it that the host spent with the heads and waited for data.
        """
        seconds = time.perf_counter() - self._began
        data = self._spent["data"]
        self._since_log = self._since_log.plus(self._own_time.take() + data, data, bad, seconds)
        return {
            "seconds": seconds,
            "head_share": self._spent["head"] / seconds,
            "data_share": data / seconds,
        }

    def compare(self, values: dict[str, float | int | None]) -> dict[str, Any]:
        """Add this log step's times to its values and name the slow ranks; a collective, at log steps."""
        split = gather_phases(self._phases.take(), self._topology)
        values["mfu"] = self._utilisation.take(self._since_log.seconds)
        values.update({f"time/{name}": seconds for name, seconds in split.mean().items()})
        self._split = split
        times = gather_times(self._since_log, self._topology)
        self._since_log = RankTimes()
        values["bad"] = sum(rank.bad for rank in times[:: self._topology.tensor_size])
        slow = slow_ranks(times, self._slow_factor)
        for rank, ratio in slow.items():
            LOG.warning(
                "rank %d on %s is slow: its own time is %.1f times the median (%.0f%% of it for data)",
                rank, self.hosts[rank], ratio, 100 * times[rank].data / times[rank].own,
            )  # fmt: skip
        return {
            "time_by_rank": split.rounded(),
            "slowest": split.slowest(),
            "slow": [{"rank": r, "host": self.hosts[r], "ratio": round(x, 2)} for r, x in slow.items()],
        }

    def table(self) -> str | None:
        """The times between the last two log lines; None before there are any."""
        return None if self._split is None else self._split.table(self.hosts)
