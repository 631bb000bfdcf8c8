"""The plan of a run on a cluster: memory, time, traffic, and what the whole run will take.

Beside one plan: those of a run's resolutions, of more and fewer ranks, and of every legal way to spread it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megaregion.checks import check_config, divisors
from megaregion.config import ParallelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.planning import faults
from megaregion.planning.hardware import GIB, Hardware
from megaregion.planning.layout import Labels, Layout, lay_out
from megaregion.planning.memory import Memory, rank_memory
from megaregion.planning.timing import StepTime, step_time


@dataclass(frozen=True)
class Plan:
    """What is to be expected."""

    layout: Layout
    hardware: Hardware
    memory: Memory
    time: StepTime
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
        model = faults.FaultModel(
            self.hardware.gpus,
            save=max(self.time.notes["save_blocks"], 1e-3),
            write=self.time.notes["save_writes"],
        )
        interval = self.layout.config.checkpoint.every * self.time.total
        # The save's own pause is part of the step already.
        share = faults.expected(model, interval) * (interval + model.save) / interval
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
    """Plan a run of so many images, those of train.steps if None.

    Raises:
        UserError: The ranks do not suit parallel.tensor or the global batch.
    """
    layout = lay_out(config, hardware.gpus, labels, hardware.device)
    return Plan(
        layout,
        hardware,
        rank_memory(layout, hardware),
        step_time(layout, hardware),
        samples or config.train.steps * config.train.global_batch,
    )


def stage_plans(
    config: RunConfig, hardware: Hardware, labels: Labels, samples: int | None = None
) -> list[Plan]:
    """A :func:`make_plan` for each resolution that the run reaches, in their order; one without stages."""
    end = samples or config.train.steps * config.train.global_batch
    starts = [0, *(stage.from_image for stage in config.stages), end]
    spans = [min(end, after) - start for start, after in itertools.pairwise(starts)]
    return [
        make_plan(at_stage(config, number), hardware, labels, span)
        for number, span in enumerate(spans)
        if span > 0
    ]


def at_stage(config: RunConfig, number: int) -> RunConfig:
    """The run as if it had only one resolution: the first for 0, then those of its stages."""
    if number == 0:
        return dataclasses.replace(config, stages=())
    stage = config.stages[number - 1]
    model = dataclasses.replace(config.model, image_size=stage.image_size)
    micro_batch = stage.micro_batch or config.train.micro_batch
    train = dataclasses.replace(config.train, micro_batch=micro_batch)
    return dataclasses.replace(config, model=model, train=train, stages=())


def fullest(plans: Sequence[Plan]) -> Plan:
    """The resolution that needs the most memory."""
    return max(plans, key=lambda plan: plan.memory.peak)


SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def weak_scaling(plan: Plan, sizes: Sequence[int] = SIZES) -> list[Plan]:
    """Plans of the same run on more and fewer ranks, the global batch growing with them.

    Sizes that do not suit parallel.tensor, or that need parts of a node, are left out.
    """
    config, plans = plan.layout.config, []
    for gpus in sizes:
        hardware, data = plan.hardware.sized(gpus), gpus // plan.layout.tensor
        if gpus % plan.layout.tensor or gpus % hardware.gpus_per_node:
            continue
        batch, images = plan.layout.images * data, plan.layout.micro_batch * data
        train = dataclasses.replace(config.train, global_batch=batch, micro_batch=plan.layout.micro_batch)
        # Draws keep their number of rows where it divides a micro-step's, else they take the next that does.
        drawn = next((d for d in range(config.head.draw_images, images) if d and images % d == 0), 0)
        head = dataclasses.replace(config.head, draw_images=drawn)
        scaled = dataclasses.replace(config, train=train, head=head)
        with contextlib.suppress(UserError):
            plans.append(make_plan(scaled, hardware, plan.layout.labels, plan.samples))
    return plans


def all_plans(
    config: RunConfig, hardware: Hardware, labels: Labels, samples: int | None = None
) -> list[Plan]:
    """A :func:`make_plan` of every legal choice, the fastest first; whether they fit is not asked."""
    plans = []
    for choice in _choices(config, hardware):
        with contextlib.suppress(UserError):
            check_config(choice)
            plans.append(make_plan(choice, hardware, labels, samples))
    return sorted(plans, key=lambda plan: plan.time.total)


def best_plans(plans: list[Plan], count: int) -> list[Plan]:
    """At most so many that fit, in their order, one for each (tensor, sequence, ZeRO stage, recompute).

    Raises:
        UserError: None fits; the text says by how much and what would.
    """
    fitting: dict[tuple[int, bool, int, bool], Plan] = {}
    for plan in plans:
        if plan.fits:
            fitting.setdefault(_way(plan), plan)
    if not fitting:
        raise UserError(_nothing_fits(plans))
    return list(fitting.values())[:count]


def _way(plan: Plan) -> tuple[int, bool, int, bool]:
    parallel = plan.layout.config.parallel
    return parallel.tensor, parallel.sequence, parallel.zero_stage, plan.layout.config.train.recompute


def _choices(config: RunConfig, hardware: Hardware) -> Iterator[RunConfig]:
    batch, gpus = config.train.global_batch, hardware.gpus
    stages = (1, 2, 3) if config.train.bf16 else (0, 1, 2, 3)
    # More than a node's ranks would send every block's activations over the network.
    for tensor in divisors(math.gcd(gpus, min(hardware.gpus_per_node, gpus))):
        data = gpus // tensor
        images = divisors(batch // data) if batch % data == 0 else []
        ways = itertools.product(images, stages, (False, True), {tensor > 1, False})
        for micro_batch, stage, recompute, sequence in ways:
            yield dataclasses.replace(
                config,
                parallel=ParallelConfig(tensor=tensor, sequence=sequence, zero_stage=stage),
                train=dataclasses.replace(config.train, micro_batch=micro_batch, recompute=recompute),
            )


def _nothing_fits(plans: list[Plan]) -> str:
    if not plans:
        return (
            "no choice of parallel.tensor and train.micro_batch is legal on these ranks; train.global_batch "
            "must be a multiple of ranks / parallel.tensor, and parallel.tensor must divide model.heads"
        )
    least = min(plans, key=lambda plan: plan.memory.peak)
    tensor, _, stage, recompute = _way(least)
    hardware, layout = least.hardware, least.layout
    greatest = max(least.memory.kinds, key=lambda kind: least.memory.kinds[kind])
    return (
        f"no legal choice fits {hardware.name}: the smallest (parallel.tensor {tensor}, zero_stage {stage}, "
        f"micro_batch {layout.micro_batch}, recompute {str(recompute).lower()}) needs "
        f"{least.memory.peak / GIB:.1f} GiB a rank, {least.over:.1f} GiB over the "
        f"{hardware.usable_bytes / GIB:.1f} that may be used; most of it is {greatest} "
        f"({least.memory.kinds[greatest] / GIB:.1f} GiB); it would fit GPUs of "
        f"{least.memory.peak / GIB + hardware.reserve_gib:.0f} GiB{_more_gpus(least)}"
    )


def _more_gpus(least: Plan) -> str:
    """The least number of the same GPUs, in powers of two, on which the smallest choice would fit."""
    sizes = (least.hardware.gpus * 2**power for power in itertools.count(1))
    for gpus in itertools.takewhile(lambda gpus: gpus < 8192, sizes):
        with contextlib.suppress(UserError):
            plan = make_plan(least.layout.config, least.hardware.sized(gpus), least.layout.labels)
            if plan.fits:
                return f", or {gpus} of these"
    return ""
