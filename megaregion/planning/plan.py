"""The plan of a run on a cluster: memory, time, traffic, and what the whole run will take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaregion.config import RunConfig
from megaregion.planning import faults
from megaregion.planning.hardware import GIB, Hardware
from megaregion.planning.layout import Labels, Layout, lay_out
from megaregion.planning.memory import Memory, rank_memory
from megaregion.planning.timing import StepTime, step_time
from megaregion.planning.traffic import Transfer, list_transfers


@dataclass(frozen=True)
class Plan:
    """What is to be expected."""

    layout: Layout
    hardware: Hardware
    memory: Memory
    time: StepTime
    transfers: tuple[Transfer, ...]
    samples: int
    """Images of the whole run."""

    @property
    def fits(self) -> bool:
        """Whether the peak fits a rank."""
        return self.memory.peak <= self.hardware.usable_bytes

    @property
    def images_per_second(self) -> float:
        """Over all ranks."""
        return self.layout.config.train.global_batch / self.time.total

    @property
    def mfu(self) -> float:
        """Counted operations over what the matrix rate would allow."""
        return self.time.flops / (self.time.total * self.hardware.matrix_tflops * 1e12)

    @property
    def goodput(self) -> float:
        """Share of the wall time that is left when machines fail as Llama 3's did."""
        cluster = faults.Cluster(
            self.hardware.gpus,
            save=max(self.time.notes["save_blocks"], 1e-3),
            write=self.time.notes["save_writes"],
        )
        interval = self.layout.config.checkpoint.every * self.time.total
        # The save's own pause is part of the step already.
        share = faults.expected(cluster, interval) * (interval + cluster.save) / interval
        return min(1.0, share) if math.isfinite(share) else 0.0

    @property
    def days(self) -> float:
        """Days of the whole run, faults included."""
        return self.samples / self.images_per_second / max(self.goodput, 1e-9) / 86_400

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.days * 24 * self.hardware.gpus

    @property
    def over(self) -> float:
        """GiB by which the peak is over what a rank may use; negative where it fits."""
        return (self.memory.peak - self.hardware.usable_bytes) / GIB


def make_plan(config: RunConfig, hardware: Hardware, labels: Labels, samples: int | None = None) -> Plan:
    """Plan a run.

    Args:
        config: The run.
        hardware: The cluster.
        labels: The label spaces.
        samples: Images of the whole run; those of train.steps if None.

    Raises:
        UserError: The ranks do not suit parallel.tensor or the global batch.
    """
    layout = lay_out(config, hardware.gpus, labels, hardware.device)
    return Plan(
        layout,
        hardware,
        rank_memory(layout, hardware),
        step_time(layout, hardware),
        tuple(list_transfers(layout, hardware)),
        samples or config.train.steps * config.train.global_batch,
    )
