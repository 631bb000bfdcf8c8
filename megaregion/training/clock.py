"""One clock for a rank: a span marks a phase, and everything that is said of time is read from the spans.

The watchdog, the log line, metrics.jsonl, the report on slow ranks, the ranges of a profile and the
faults of a drill (faults.py) all go by ``with clock.span("forward")``.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megaregion.config import RunConfig
from megaregion.data.batch import Batch
from megaregion.errors import UserError
from megaregion.models.costs import encoder_flops, head_flops
from megaregion.parallel.topology import Topology, all_gather
from megaregion.processor import is_narrow, product
from megaregion.schemas.evaluation import aligned
from megaregion.training.faults import Faults
from megaregion.training.metrics import LOG

PHASES = ("data", "forward", "head", "backward", "communication", "optimizer", "save")
"""Parts of a step whose times are kept; a run also starts and loads. communication is what a rank waits for
others outside of forward, head and backward: gradients reduced behind the backward pass, and the agreement
on the step. What overlaps with computing costs nothing."""

LEAST_SHARE = 0.05
"""Share of a step that a rank must lose to be called slow; jitter of short steps is no news."""
PROFILED_STEPS = 3
"""Steps that are profiled when none are named."""
LISTED = 50
"""Operations listed in a profile's memory file, by what they allocate."""


@dataclass(frozen=True)
class RankTimes:
    """What one rank says of its steps since the last log line, in seconds."""

    phases: dict[str, float]
    """Time of each phase; one inside another is not counted in both."""
    own: float
    """Waiting for data, and its own forward passes."""
    data: float
    """The part of these that went to waiting for data."""
    steps: float
    """Length of the steps."""
    bad: int = 0
    """Samples that it replaced; ranks that share a model all say the same."""
    memory: int = 0
    """Peak of its process, or of what it allocated on its GPU, in bytes."""


@dataclass(frozen=True)
class StepTimes:
    """One step of this rank, as the host sees it."""

    seconds: float
    """Its length."""
    head_share: float
    """Share of it spent with the heads."""
    data_share: float
    """Share of it spent waiting for data."""


class Clock:
    """What this rank does now, and where its steps' time goes.

    All ranks of a run pass the same spans, so the number of turns says who is behind.
    """

    def __init__(
        self, device: torch.device, waits_inside: bool = False, faults: Faults | None = None
    ) -> None:
        """Start the clock in the phase "start".

        Where the forward pass ``waits_inside`` for other ranks (tensor parallelism, ZeRO 3), a rank's own
        time on a processor is its thread's; on a GPU a slow rank shows as all that share its model.
        """
        self.phase = "start"
        """What the rank is doing."""
        self.step = 0
        """The step it is in, from 1; 0 before the first."""
        self.turns = 0
        """Spans begun so far."""
        self.since = time.monotonic()
        """When the last span began or an inner one ended, on the monotonic clock, in seconds."""
        self.faults = faults or Faults([])
        self._device, self._on_gpu = device, device.type == "cuda"
        self._by_thread = waits_inside and not self._on_gpu
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []
        self._open: list[str] = []
        self._host: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()
        self._thread_seconds = self._data_seconds = self._step_seconds = 0.0
        self._bad = 0

    @classmethod
    def of_run(cls, config: RunConfig, topology: Topology) -> Clock:
        """The clock of a rank of a run, with the faults that the environment asks of it (:class:`Faults`)."""
        waits_inside = config.parallel.tensor > 1 or config.parallel.zero_stage == 3
        return cls(topology.device, waits_inside, Faults.of_rank(topology.rank))

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Mark a phase; one inside another takes its time from it."""
        self._open.append(phase)
        self._turn(phase)
        self.turns += 1
        began, thread = time.perf_counter(), time.thread_time()
        try:
            with record_function(phase):
                self.faults.strike(phase, self.step)
                yield
        finally:
            self._host[phase] += time.perf_counter() - began
            if phase == "forward":
                self._thread_seconds += time.thread_time() - thread
            self._open.pop()
            if self._open:
                self._turn(self._open[-1])
            else:
                self._mark(None)

    def begin_step(self, step: int) -> None:
        """Start the clock of a step, from 1; one that was refused is begun again."""
        self.step = step
        self.faults.begin_step(step)
        self._host.clear()
        self._began = time.perf_counter()

    def end_step(self, bad: int) -> StepTimes:
        """Stop the clock of a step, in which this rank replaced some bad samples."""
        seconds = time.perf_counter() - self._began
        self._step_seconds += seconds
        self._data_seconds += self._host["data"]
        self._bad += bad
        return StepTimes(seconds, self._host["head"] / seconds, self._host["data"] / seconds)

    def take(self) -> RankTimes:
        """The times since the last call; a GPU's queue has to be past the last mark."""
        phases = dict.fromkeys(PHASES, 0.0)
        for (name, began), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            if name in phases:
                phases[name] += _between(began, ended)
        forward, data = self._thread_seconds if self._by_thread else phases["forward"], self._data_seconds
        memory = peak_bytes(self._device)
        times = RankTimes(phases, forward + data, data, self._step_seconds, self._bad, memory)
        self._marks.clear()
        self._thread_seconds = self._data_seconds = self._step_seconds = 0.0
        self._bad = 0
        return times

    def _turn(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()
        self._mark(phase)

    def _mark(self, phase: str | None) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))


def peak_bytes(device: torch.device) -> int:
    """The most that this process held, or allocated on its GPU; the host asks its own counters."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _between(began: Any, ended: Any) -> float:
    """Seconds between two marks of a clock."""
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3


@dataclass(frozen=True)
class Times:
    """The times of all ranks over the steps since the last log line."""

    by_rank: tuple[RankTimes, ...]
    """In rank order."""

    def mean(self) -> dict[str, float]:
        """Mean seconds of each phase over the ranks."""
        return {name: sum(r.phases[name] for r in self.by_rank) / len(self.by_rank) for name in PHASES}

    def slowest(self) -> dict[str, int]:
        """The rank that spent most time in each phase; phases without time have none."""
        ranks = range(len(self.by_rank))
        found = {name: max(ranks, key=lambda rank: self.by_rank[rank].phases[name]) for name in PHASES}
        return {name: rank for name, rank in found.items() if self.by_rank[rank].phases[name] > 0}

    def rounded(self) -> list[dict[str, float]]:
        """Phases by rank, to milliseconds, as metrics.jsonl keeps them."""
        return [{name: round(s, 3) for name, s in rank.phases.items()} for rank in self.by_rank]

    def slow_ranks(self, factor: float) -> dict[int, float]:
        """Ranks that take more than ``factor`` times the median, with how many; a factor 0 finds none."""
        usual = statistics.median(rank.own for rank in self.by_rank)
        return {
            number: rank.own / max(usual, 1e-9)
            for number, rank in enumerate(self.by_rank)
            if factor and rank.own > factor * usual and rank.own - usual > LEAST_SHARE * rank.steps
        }

    def table(self, hosts: Sequence[str]) -> str:
        """Aligned text: mean share of each phase, and the slowest rank with its host."""
        total, slowest = sum(self.mean().values()) or 1.0, self.slowest()
        rows = [("phase", "seconds", "share", "slowest rank")]
        for name, seconds in self.mean().items():
            rank = slowest.get(name)
            last = (
                f"{rank} on {hosts[rank]}: {self.by_rank[rank].phases[name]:.3f} s"
                if rank is not None
                else ""
            )
            rows.append((name, f"{seconds:.3f}", f"{seconds / total:.1%}", last))
        return aligned(rows, left=(0, 3))


def gather_times(own: RankTimes, topology: Topology) -> Times:
    """The times of all ranks; a collective."""
    numbers = [own.phases[name] for name in PHASES] + [own.own, own.data, own.steps, own.bad, own.memory]
    told = torch.tensor(numbers, dtype=torch.float64).to(topology.device)
    gathered = told.new_empty(topology.world_size * len(told))
    all_gather(gathered, told, group=topology.world_group)
    found = []
    for row in gathered.view(topology.world_size, len(told)).tolist():
        phases = dict(zip(PHASES, row[: len(PHASES)], strict=True))
        own_time, data, steps, bad, memory = row[len(PHASES) :]
        found.append(RankTimes(phases, own_time, data, steps, int(bad), int(memory)))
    return Times(tuple(found))


class Utilisation:
    """Model FLOPs utilisation: counted operations of the steps against what bare matrix products reach here.

    Only what the method needs counts: forward and backward of the encoder and the scores of the heads once
    each way; what recomputing adds is no work done, nor is a teacher's forward pass. See models/costs.py for
    the count.
    """

    def __init__(
        self, config: RunConfig, classes: dict[str, int], topology: Topology, teacher_width: int = 0
    ) -> None:
        """Measure the matrix rate; ``classes`` are those of each head."""
        self._config, self._tensor_size, self._teacher_width = config, topology.tensor_size, teacher_width
        dtype = torch.bfloat16 if config.train.bf16 else torch.float32
        narrow = is_narrow(config.train.precision, topology.device)
        self._rate = matrix_rate(topology.device, dtype, narrow)
        self._operations = 0.0
        heads = config.head.by_kind
        self._scored = sum(count * heads[kind].sample_rate for kind, count in classes.items())

    def see(self, batch: Batch) -> None:
        """Count a micro-batch."""
        model, regions = self._config.model, self._config.data.regions_per_image
        patch, dim, width = model.patch_size, self._config.head.embedding_dim, self._teacher_width
        if batch.grids is None:
            side = batch.pixels.shape[-2] // patch, batch.pixels.shape[-1] // patch
            grids = Counter({side: len(batch.keys)})
        else:
            grids = Counter(batch.grids)
        for grid, images in grids.items():
            self._operations += encoder_flops(model, regions, dim, grid, width).training * images
        self._operations += head_flops(len(batch.keys) * regions, self._scored, dim)

    def take(self, seconds: float) -> float:
        """Utilisation over the seconds since the last call, of ranks that share a model together."""
        share = self._operations / self._tensor_size / seconds / self._rate
        self._operations = 0.0
        return share


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype, narrow: bool = False) -> float:
    """Operations per second of a square matrix product of random numbers on this rank, the fastest of three.

    A GPU multiplies ones faster: it draws less power, and its clock stays high.
    """
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1024
    drawn = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=drawn, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(4):  # The first one is slower.
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        product(a, b, narrow=narrow)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def parse_window(text: str) -> tuple[int, int]:
    """First and last step of ``FIRST`` or ``FIRST:LAST``.

    Raises:
        UserError: It is neither.
    """
    first, _, last = text.partition(":")
    try:
        window = int(first), int(last) if last else int(first) + PROFILED_STEPS - 1
    except ValueError:
        raise UserError(f"--profile must be a step or FIRST:LAST, got {text}") from None
    if not 1 <= window[0] <= window[1]:
        raise UserError(f"--profile must name rising steps from 1 on, got {text}")
    return window


class StepProfiler:
    """What the processor and the GPU did in a window of steps, as files that other tools show.

    rank-00.trace.json.gz     for Chrome (chrome://tracing), Perfetto, TensorBoard
    rank-00.memory.json       memory by operation; the peak of the process or of its GPU
    rank-00.snapshot.pickle   every allocation of a GPU, for pytorch.org/memory_viz
    """

    def __init__(self, window: tuple[int, int] | None, run: Path, rank: int, device: torch.device) -> None:
        """Profile nothing yet; without a window, never."""
        self._window = window
        self._stem = run / "profile" / f"rank-{rank:02d}"
        self._device, self._on_gpu = device, device.type == "cuda"
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Call it before a step (from 1): starts where the window does."""
        if self._profile is None and self._window and self._window[0] <= step <= self._window[1]:
            activities = [ProfilerActivity.CPU]
            if self._on_gpu:
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history()
            self._profile = profile(activities=activities, profile_memory=True, record_shapes=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Call it after a step: writes the files behind the window's last."""
        if self._window and step >= self._window[1]:
            self.close()

    def close(self) -> None:
        """Write what was profiled, also where the run ends inside the window."""
        if self._profile is None:
            return
        self._profile.stop()
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(f"{self._stem}.trace.json.gz")
        Path(f"{self._stem}.memory.json").write_text(json.dumps(self._memory(), indent=1) + "\n")
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(f"{self._stem}.snapshot.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        LOG.info("profile written to %s.*", self._stem)
        self._profile = self._window = None

    def _memory(self) -> dict[str, Any]:
        size = "self_device_memory_usage" if self._on_gpu else "self_cpu_memory_usage"
        found = [
            (int(getattr(event, size)), event.key, event.count) for event in self._profile.key_averages()
        ]
        return {
            "peak_bytes": peak_bytes(self._device),
            "operations": [
                {"name": name, "bytes": size, "calls": calls}
                for size, name, calls in sorted(found, reverse=True)[:LISTED]
            ],
        }
