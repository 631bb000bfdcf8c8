"""The class-sharded head beside a PartialFC-style head and a dense softmax.

Ratios are peer / ours: more is better, for times and memory alike. The peers are written here after what
their users run: a softmax with the CosFace margin over L2-normalised rows and centers, and a dense AdamW,
as ours is with ``loss: softmax``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.measure import Stopwatch, add_clock, alone, describe_host
from benchmark.memory import PeakMemory
from benchmark.report import Case, Report, cases
from megaregion.bounds import PositiveShare
from megaregion.command_line import flag, whole
from megaregion.config import HeadConfig, HeadsConfig, LossName, RunConfig
from megaregion.heads import ClassShardedHead, GatheredFeatures
from megaregion.parallel import topology
from megaregion.parallel.topology import Topology
from megaregion.processor import product

GEMM_BLOCK = 16_384
"""Classes of one product when the bare matrix products are timed: enough for their full rate."""
MIB = 2**20


@dataclass(frozen=True)
class HeadSizes:
    """One size of the head benchmark."""

    classes: int
    dim: int
    rows: int
    sample_rate: float
    chunk_bytes: int
    loss: LossName = "softmax"

    @property
    def label(self) -> str:
        """The sizes as a case shows them."""
        return f"K={self.classes:,} D={self.dim} rows={self.rows:,} rho={self.sample_rate:g}"

    @property
    def state_bytes(self) -> int:
        """Bytes of weights and two moments."""
        return 3 * 4 * self.classes * self.dim


STANDARD = {
    "million": (
        HeadSizes(1_000_000, 256, 1024, 0.1, 112 * MIB),
        {"step": 3.0, "memory": 8.0, "gemm": 1 / 1.35},
    ),
    "full": (
        HeadSizes(100_000, 512, 2048, 1.0, 16 * MIB),
        {"passes": 1.7, "memory": 10.0, "gemm": 1 / 1.35, "dense": 1.15, "dense_memory": 10.0},
    ),
}
"""The sizes with promised ratios, by name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--case", choices=[*STANDARD, "all"], default="all", help="standard sizes with goals")
    add("--classes", type=whole(), help="classes K; given, it replaces the standard sizes")
    add("--dim", type=whole(), default=256, help="embedding width")
    add("--rows", type=whole(), default=1024, help="region features of a step")
    add("--sample-rate", type=flag(PositiveShare), default=0.1, help="share of classes drawn")
    add("--chunk-mib", type=whole(), default=64, help="memory for scores, in MiB")
    add("--loss", choices=["softmax", "separated"], default="softmax", help="our loss")
    add("--dense", action="store_true", help="run the dense softmax also where rows are sampled")
    add("--repeats", type=whole(), default=3, help="timed steps; the fastest counts")
    add_clock(parser)


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Run the sizes that were asked for."""
    watch = Stopwatch(device, options.clock == "processor")
    report = Report(describe_host(device, clock=options.clock))
    for sizes, goals in _chosen(options):
        dense = options.dense or sizes.sample_rate == 1.0
        report.cases += compare(sizes, goals, options.repeats, watch, dense)
    return report


def _chosen(options: argparse.Namespace) -> list[tuple[HeadSizes, dict[str, float]]]:
    if options.classes is None:
        names = list(STANDARD) if options.case == "all" else [options.case]
        return [STANDARD[name] for name in names]
    chunk = options.chunk_mib * MIB
    sizes = HeadSizes(options.classes, options.dim, options.rows, options.sample_rate, chunk, options.loss)
    return [(sizes, {})]


@dataclass(frozen=True)
class Measured:
    """Seconds and bytes of one head."""

    passes: float
    update: float
    memory: int
    """Peak beyond weights and moments."""

    @property
    def step(self) -> float:
        """Seconds of a whole step."""
        return self.passes + self.update


@dataclass(frozen=True)
class Contender:
    """A head with its optimizer, on fixed rows."""

    forward_backward: Callable[[], None]
    update: Callable[[], None]

    def step(self, watch: Stopwatch) -> tuple[float, float]:
        """Seconds of forward and backward, and of the update that follows."""
        return watch.seconds(self.forward_backward), watch.seconds(self.update)


def compare(
    sizes: HeadSizes, goals: dict[str, float], repeats: int, watch: Stopwatch, dense: bool
) -> list[Case]:
    """Measure all heads at one size.

    Args:
        sizes: The size.
        goals: Least ratio by name of the comparison: step, passes, update, memory,
            gemm, dense, dense_memory; what has no goal is shown with goal 0.
        repeats: Timed calls of each; the fastest counts.
        watch: The clock, on the device to run on.
        dense: Whether to run the dense softmax, whose logits need rows x classes x 4 bytes several times.
    """
    place = alone(watch.device)
    try:
        _warm_up(place)
        ours = _measure(lambda: _ours(sizes, place), sizes, repeats, watch)
        gemms, fastest = (_gemm_seconds(sizes, repeats, watch, by) for by in (_torch, _fastest))
        peer = _measure(lambda: _partial_fc(sizes, place), sizes, repeats, watch)
        plain = _measure(lambda: _dense(sizes, place), sizes, repeats, watch) if dense else None
    finally:
        topology.leave()
    found = [
        ("step", "whole step, PartialFC", ours.step, peer.step, "s"),
        ("passes", "forward + backward, PartialFC", ours.passes, peer.passes, "s"),
        ("update", "optimizer step, PartialFC", ours.update, peer.update, "s"),
        ("memory", "memory, PartialFC", ours.memory / 1e6, peer.memory / 1e6, "MB"),
        ("gemm", "forward + backward, its four GEMMs", ours.passes, gemms, "s"),
        ("", "forward + backward, its four GEMMs by the fastest library", ours.passes, fastest, "s"),
    ]
    if plain is not None:
        found += [
            ("dense", "forward + backward, dense softmax", ours.passes, plain.passes, "s"),
            ("dense_memory", "memory, dense softmax", ours.memory / 1e6, plain.memory / 1e6, "MB"),
        ]
    return cases(sizes.label, goals, found)


def _measure(build: Callable[[], Contender], sizes: HeadSizes, repeats: int, watch: Stopwatch) -> Measured:
    """Build a head, take its peak memory and its times, and let it go."""
    memory = PeakMemory(watch.device)
    before = memory.now()
    contender = build()
    contender.step(watch)
    memory.reset()
    contender.step(watch)
    beyond = memory.peak() - before - sizes.state_bytes
    passes, updates = zip(*(contender.step(watch) for _ in range(repeats)), strict=True)
    return Measured(min(passes), min(updates), beyond)


def _torch(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.mm(left, right, out=out)


def _fastest(left: Tensor, right: Tensor, out: Tensor) -> None:
    product(left, right.T)


def _gemm_seconds(
    sizes: HeadSizes, repeats: int, watch: Stopwatch, multiply: Callable[[Tensor, Tensor, Tensor], None]
) -> float:
    """Seconds of the four matrix products of a recomputing head, alone: scores twice, two gradients."""
    device = watch.device
    drawn = sizes.classes * sizes.sample_rate
    if sizes.sample_rate < 1:
        drawn += sizes.rows * (1 - sizes.sample_rate)
    block = min(GEMM_BLOCK, int(drawn))
    features = torch.randn((sizes.rows, sizes.dim), device=device)
    centers = torch.randn((block, sizes.dim), device=device)
    scores = torch.empty((sizes.rows, block), device=device)
    by_features, by_centers = torch.empty_like(features), torch.empty_like(centers)

    def products() -> None:
        for _ in range(2):
            multiply(features, centers.T, scores)
        multiply(scores, centers, by_features)
        multiply(scores.T, features, by_centers)

    products()
    return watch.fastest(products, repeats) * drawn / block


def _warm_up(place: Topology) -> None:
    """Run every head once at a small size, so that no one's memory counts the libraries' own."""
    small = HeadSizes(4096, 64, 256, 0.5, 2**20)
    for build in (_ours, _partial_fc, _dense):
        build(small, place).step(Stopwatch(place.device))


def _ours(sizes: HeadSizes, place: Topology) -> Contender:
    kind = HeadConfig(loss=sizes.loss, sample_rate=sizes.sample_rate)
    shared = HeadsConfig(embedding_dim=sizes.dim, chunk_bytes=sizes.chunk_bytes, object=kind)
    head = ClassShardedHead("object", RunConfig(head=shared), sizes.classes, place).to(place.device)
    features, labels = _rows(sizes, place.device)
    everyone = torch.ones(sizes.rows, dtype=torch.bool, device=place.device)
    steps = itertools.count()

    def forward_backward() -> None:
        features.grad = None
        rows = GatheredFeatures(features, place)
        loss = head.score(rows, head.draw(labels[:, None], everyone, next(steps)))
        (loss.sum / sizes.rows).backward()

    def update() -> None:
        head.grad_norm_squared()
        head.step(1e-3)
        head.zero_grad()

    return Contender(forward_backward, update)


def _partial_fc(sizes: HeadSizes, place: Topology) -> Contender:
    head = PartialFCHead(
        sizes.classes, sizes.dim, sizes.sample_rate, HeadConfig(), place.world_group, place.device
    )
    return _trained_densely(head, sizes, place.device)


def _dense(sizes: HeadSizes, place: Topology) -> Contender:
    return _trained_densely(
        DenseHead(sizes.classes, sizes.dim, HeadConfig(), place.device), sizes, place.device
    )


def _trained_densely(head: torch.nn.Module, sizes: HeadSizes, device: torch.device) -> Contender:
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    features, labels = _rows(sizes, device)

    def forward_backward() -> None:
        features.grad = None
        head(features, labels).backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Contender(forward_backward, update)


def _rows(sizes: HeadSizes, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((sizes.rows, sizes.dim), generator=generator).to(device)
    labels = torch.randint(0, sizes.classes, (sizes.rows,), generator=generator).to(device)
    return features.requires_grad_(), labels


class DenseHead(nn.Module):
    """All logits at once, as one would write it in five lines."""

    def __init__(self, classes: int, dim: int, config: HeadConfig, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((classes, dim), device=device).mul_(0.01))
        self._margin, self._scale = config.margin, config.scale

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of rows [R, width] with labels [R]."""
        logits = F.linear(F.normalize(features), F.normalize(self.weight))
        rows = torch.arange(len(labels), device=labels.device)
        logits[rows, labels] -= self._margin
        return F.cross_entropy(logits * self._scale, labels)


class PartialFCHead(nn.Module):
    """Sampled softmax over class shards in the manner of PartialFC.

    Kept from it: every rank samples its own rate of its classes with all positives among them, the sampled
    centers are taken by index (so their gradient is dense), the fp32 logits are stored, and the cross-entropy
    turns them into probabilities in place. Not kept, since it only slows it down: the dense one-hot matrix of
    its backward and the ``.item()`` there.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        sample_rate: float,
        config: HeadConfig,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__()
        share = -(-classes // group.size())
        self._start = min(group.rank() * share, classes)
        local = min(share, classes - self._start)
        self.weight = nn.Parameter(torch.randn((local, dim), device=device).mul_(0.01))
        self._sampled = max(1, int(sample_rate * local))
        self._margin, self._scale, self._group = config.margin, config.scale, group

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of all ranks' rows; this rank's features [r, width], labels [r]."""
        features = _Gather.apply(features, self._group)
        gathered = labels.new_empty(len(labels) * self._group.size())
        dist.all_gather_single(gathered, labels, group=self._group)
        here = (gathered >= self._start) & (gathered < self._start + len(self.weight))
        columns = torch.where(here, gathered - self._start, -1)
        weight: Tensor = self.weight
        if self._sampled < len(self.weight):
            index, columns = self._sample(columns, here)
            weight = self.weight[index]
        logits = F.linear(F.normalize(features), F.normalize(weight)).clamp(-1, 1)
        rows = here.nonzero().squeeze(1)
        logits[rows, columns[rows]] -= self._margin
        return _CrossEntropy.apply(logits * self._scale, columns, rows, self._group)

    def _sample(self, columns: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        positives = columns[here].unique()
        index = positives
        if len(positives) <= self._sampled:
            order = torch.rand(len(self.weight), device=columns.device)
            order[positives] = 2.0
            index = order.topk(self._sampled).indices.sort().values
        columns = columns.clone()
        columns[here] = torch.searchsorted(index, columns[here])
        return index, columns


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty((len(rows) * group.size(), rows.shape[1]))
        dist.all_gather_single(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group: dist.ProcessGroup = ctx.group
        dist.all_reduce(gradient, group=group)
        own = gradient.chunk(group.size())[group.rank()]
        return own * group.size(), None


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over class shards; the logits are overwritten by their probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        top = logits.amax(1, keepdim=True)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        logits.sub_(top).exp_()
        mass = logits.sum(1, keepdim=True)
        dist.all_reduce(mass, group=group)
        logits.div_(mass)
        found = logits.new_zeros(len(logits))
        found[rows] = logits[rows, columns[rows]]
        dist.all_reduce(found, group=group)
        ctx.save_for_backward(logits, columns, rows)
        return -found.clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, columns, rows = ctx.saved_tensors
        logits[rows, columns[rows]] -= 1
        return logits.mul_(by_loss / len(logits)), None, None, None
