"""The class-sharded head beside a PartialFC-style head and a dense softmax."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.measure import Stopwatch, Work, alone
from benchmark.memory import PeakMemory
from benchmark.part import CLOCK, Case, Row, cases, part
from megaregion.bounds import Choice, PositiveInt, PositiveShare
from megaregion.config import HeadConfig, HeadsConfig, LossName, RunConfig, TrainConfig
from megaregion.heads import ClassShardedHead, GatheredFeatures
from megaregion.heads.sampling import DrawRule, NearClasses, build_targets
from megaregion.parallel import topology
from megaregion.parallel.topology import Topology
from megaregion.processor import product

GEMM_BLOCK = 16_384
"""Classes of one product when the bare matrix products are timed: enough for their full rate."""
MIB = 2**20
NEAR = "near"
SCALE, MARGIN = HeadConfig().scale, HeadConfig().margin


@dataclass(frozen=True)
class HeadSizes:
    """One size of the head benchmark."""

    classes: int
    dim: int
    rows: int
    sample_rate: float
    chunk_mib: int
    """Memory for scores."""
    loss: LossName = "softmax"
    bf16: bool = False
    """bf16 features and, on a GPU, bf16 operands of the products; else float32."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the features."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def label(self) -> str:
        """The sizes as a case shows them."""
        sizes = f"K={self.classes:,} D={self.dim} rows={self.rows:,} rho={self.sample_rate:g}"
        return f"{sizes} bf16" if self.bf16 else sizes


STANDARD = {
    "million": (HeadSizes(1_000_000, 256, 1024, 0.1, 112), {"step": 3.0, "memory": 8.0, "gemm": 1 / 1.35}),
    "full": (
        HeadSizes(100_000, 512, 2048, 1.0, 16),
        {"passes": 1.7, "memory": 10.0, "gemm": 1 / 1.35, "dense": 1.15, "dense_memory": 10.0},
    ),
}
"""The sizes with promised ratios, by name."""
ROWS: tuple[Row, ...] = (
    ("step", "whole step, PartialFC", "our step", "PartialFC step", "s"),
    ("passes", "forward + backward, PartialFC", "our passes", "PartialFC passes", "s"),
    ("update", "optimizer step, PartialFC", "our update", "PartialFC update", "s"),
    ("memory", "memory, PartialFC", "our memory", "PartialFC memory", "MB"),
    ("gemm", "forward + backward, its four GEMMs", "our passes", "GEMMs", "s"),
    ("", "forward + backward, its four GEMMs by the fastest library", "our passes", "fastest GEMMs", "s"),
    ("dense", "forward + backward, dense softmax", "our passes", "dense passes", "s"),
    ("dense_memory", "memory, dense softmax", "our memory", "dense memory", "MB"),
)


@part(
    (
        "--case",
        Choice((*STANDARD, NEAR, "all")),
        "all",
        "standard sizes, or draws with near classes",
    ),
    ("--classes", PositiveInt, None, "classes K; given, it replaces the standard sizes"),
    ("--dim", PositiveInt, 256, "embedding width"),
    ("--rows", PositiveInt, 1024, "region features of a step"),
    ("--sample-rate", PositiveShare, 0.1, "share of classes drawn"),
    ("--chunk-mib", PositiveInt, 64, "memory for scores, in MiB"),
    ("--loss", LossName, "softmax", "our loss"),
    ("--bf16", bool, False, "bf16 instead of float32"),
    ("--dense", bool, False, "run the dense softmax also where rows are sampled"),
    ("--repeats", PositiveInt, 3, "timed steps; the fastest counts"),
    CLOCK,
)
def head(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """The class-sharded head beside a PartialFC-style head and a dense softmax.

    Ratios are peer / ours: more is better, for times and memory alike. The peers are written here after what
    their users run: a softmax with the CosFace margin over L2-normalised rows and centers, and a dense AdamW,
    as ours is with ``loss: softmax``.
    """
    chosen = [found for name, found in STANDARD.items() if options.case in (name, "all")]
    if options.case in (NEAR, "all") and options.classes is None:
        yield _near_case(watch, options.repeats)
    if options.classes is not None:
        asked = (
            getattr(options, name) for name in ("dim", "rows", "sample_rate", "chunk_mib", "loss", "bf16")
        )
        chosen = [(HeadSizes(options.classes, *asked), {})]
    for sizes, goals in chosen:
        dense = options.dense or sizes.sample_rate == 1.0
        yield from compare(sizes, goals, options.repeats, watch, dense)


def _near_case(watch: Stopwatch, repeats: int) -> Case:
    """Host time of a micro-step's draw on one of 64 ranks at the paper's size, with near classes and without.

    48 classes are near one, and ten times as many for a hundredth of the classes.
    """
    classes, ranks, rows = 1_000_000, 64, 64 * 105 * 10
    generator = torch.Generator().manual_seed(0)
    counts = torch.full((classes,), 48 / ranks).masked_fill_(torch.arange(classes) % 100 == 0, 480 / ranks)
    counts = torch.poisson(counts, generator).long()
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    near = torch.randint(0, classes // ranks, (int(starts[-1]),), generator=generator)
    alone = DrawRule("object", classes, range(classes // ranks), ranks, 0, 0.1, 0)
    labels = torch.randint(0, classes, (rows, 1), generator=generator)
    rules = {"with": replace(alone, near=NearClasses(starts, near)), "without": alone}
    steps = itertools.count()

    def draw(rule: DrawRule) -> None:
        build_targets(labels, torch.ones(rows, dtype=torch.bool), rule, next(steps), 0, 0)

    found = watch.fastest({name: partial(draw, rule) for name, rule in rules.items()}, repeats)
    told = f"a rank's draw of K={classes:,} on {ranks} ranks, rows={rows:,}: near classes, none"
    return Case(told, 1e3 * found["with"], 1e3 * found["without"], "ms")


def compare(
    sizes: HeadSizes, goals: dict[str, float], repeats: int, watch: Stopwatch, dense: bool
) -> list[Case]:
    """Measure all heads at one size, with least ratios by the names of ``ROWS``.

    The dense softmax needs rows x classes x 4 bytes several times.
    """
    place = alone(watch.device)
    builds = {"our": _ours, "PartialFC": _partial_fc, **({"dense": _dense} if dense else {})}
    found: dict[str, float] = {}
    try:
        # Every head once at a small size, so that no one's memory counts the libraries' own.
        for build in (_ours, _partial_fc, _dense):
            _call(build(HeadSizes(4096, 64, 256, 0.5, 1), place))
        for name, build in builds.items():
            found |= _figures(name, build, sizes, place, watch, repeats)
        found |= _gemm_seconds(sizes, repeats, watch)
    finally:
        topology.leave()
    return list(cases(sizes.label, ROWS, found, goals))


Works = dict[str, Work]
"""A head on fixed rows: the passes (forward and backward) and the optimizer's update."""


def _call(works: Works) -> None:
    for work in works.values():
        work()


def _figures(
    name: str,
    build: Callable[[HeadSizes, Topology], Works],
    sizes: HeadSizes,
    place: Topology,
    watch: Stopwatch,
    repeats: int,
) -> dict[str, float]:
    """Build a head, take its times and its peak beyond weights and moments, and let it go."""
    memory = PeakMemory(watch.device)
    before = memory.now() + 3 * 4 * sizes.classes * sizes.dim
    works = {f"{name} {what}": work for what, work in build(sizes, place).items()}
    _call(works)
    beyond = memory.of(lambda: _call(works)) - before
    seconds = watch.fastest(works, repeats, left_out=0)
    return {**seconds, f"{name} step": sum(seconds.values()), f"{name} memory": beyond / 1e6}


def _gemm_seconds(sizes: HeadSizes, repeats: int, watch: Stopwatch) -> dict[str, float]:
    """Seconds of the four matrix products of a recomputing head, alone: scores twice, two gradients.

    By torch, and by the library that heads multiply with (processor.py).
    """
    device = watch.device
    drawn = sizes.classes * sizes.sample_rate
    if sizes.sample_rate < 1:
        drawn += sizes.rows * (1 - sizes.sample_rate)
    block = min(GEMM_BLOCK, int(drawn))
    features = torch.randn((sizes.rows, sizes.dim), device=device, dtype=sizes.dtype)
    centers = torch.randn((block, sizes.dim), device=device, dtype=sizes.dtype)
    scores = features.new_empty((sizes.rows, block))
    by_features, by_centers = torch.empty_like(features), torch.empty_like(centers)

    products = (
        (features, centers.T, scores),
        (features, centers.T, scores),
        (scores, centers, by_features),
        (scores.T, features, by_centers),
    )
    works: Works = {
        "GEMMs": lambda: [torch.mm(left, right, out=out) for left, right, out in products],
        "fastest GEMMs": lambda: [product(left, right.T) for left, right, _ in products],
    }
    return {name: each * drawn / block for name, each in watch.fastest(works, repeats).items()}


def _ours(sizes: HeadSizes, place: Topology) -> Works:
    kind = HeadConfig(loss=sizes.loss, sample_rate=sizes.sample_rate)
    shared = HeadsConfig(embedding_dim=sizes.dim, chunk_bytes=sizes.chunk_mib * MIB, object=kind)
    config = RunConfig(head=shared, train=TrainConfig(precision="bf16" if sizes.bf16 else "fp32"))
    head = ClassShardedHead("object", config, sizes.classes, place).to(place.device)
    features, labels = _rows(sizes, place.device)
    everyone = torch.ones(sizes.rows, dtype=torch.bool, device=place.device)
    steps = itertools.count()

    def passes() -> None:
        features.grad = None
        rows = GatheredFeatures(features, place)
        loss = head.score(rows, head.draw(labels[:, None], everyone, next(steps)))
        (loss.sum / sizes.rows).backward()

    def update() -> None:
        head.grad_norm_squared()
        head.step(1e-3)
        head.zero_grad()

    return {"passes": passes, "update": update}


def _partial_fc(sizes: HeadSizes, place: Topology) -> Works:
    return _trained_densely(PartialFCHead(sizes, place.device), sizes)


def _dense(sizes: HeadSizes, place: Topology) -> Works:
    return _trained_densely(DenseHead(sizes, place.device), sizes)


def _trained_densely(head: DenseHead, sizes: HeadSizes) -> Works:
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    features, labels = _rows(sizes, head.weight.device)

    def passes() -> None:
        features.grad = None
        head(features, labels).backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return {"passes": passes, "update": update}


def _rows(sizes: HeadSizes, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((sizes.rows, sizes.dim), generator=generator).to(device, sizes.dtype)
    labels = torch.randint(0, sizes.classes, (sizes.rows,), generator=generator).to(device)
    return features.requires_grad_(), labels


class DenseHead(nn.Module):
    """All logits at once, as one would write it in five lines."""

    def __init__(self, sizes: HeadSizes, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((sizes.classes, sizes.dim), device=device).mul_(0.01))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of rows [R, width] with labels [R]."""
        logits = _cosines(features, self.weight)
        return F.cross_entropy(_with_margin(logits, labels), labels)


class PartialFCHead(DenseHead):
    """Sampled softmax in the manner of PartialFC, on the one rank that is measured.

    Kept from it: the rank samples its rate of the classes with all positives among them, the sampled
    centers are taken by index (so their gradient is dense), the fp32 logits are stored, and the cross-entropy
    turns them into probabilities in place. Not kept, since it only slows it down: the dense one-hot matrix of
    its backward, the ``.item()`` there, and the collectives of one rank.
    """

    def __init__(self, sizes: HeadSizes, device: torch.device) -> None:
        super().__init__(sizes, device)
        self._sampled = max(1, int(sizes.sample_rate * sizes.classes))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of rows [R, width] with labels [R]."""
        weight: Tensor = self.weight
        if self._sampled < len(weight):
            index, labels = self._sample(labels)
            weight = weight[index]
        logits = _cosines(features, weight).clamp(-1, 1)
        return _CrossEntropy.apply(_with_margin(logits, labels), labels)

    def _sample(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Classes that enter the step, and the labels as places among them."""
        index = positives = labels.unique()
        if len(positives) <= self._sampled:
            order = torch.rand(len(self.weight), device=labels.device)
            order[positives] = 2.0
            index = order.topk(self._sampled).indices.sort().values
        return index, torch.searchsorted(index, labels)


def _cosines(features: Tensor, weight: Tensor) -> Tensor:
    """In float32; their product takes operands of the features' type, as under autocast."""
    return F.linear(F.normalize(features), F.normalize(weight).to(features.dtype)).float()


def _with_margin(logits: Tensor, labels: Tensor) -> Tensor:
    logits[torch.arange(len(labels), device=labels.device), labels] -= MARGIN
    return logits * SCALE


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy; the logits are overwritten by their probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits.sub_(logits.amax(1, keepdim=True)).exp_()
        logits.div_(logits.sum(1, keepdim=True))
        ctx.save_for_backward(logits, labels)
        return -logits.gather(1, labels[:, None]).clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        logits[torch.arange(len(labels), device=labels.device), labels] -= 1
        return logits.mul_(by_loss / len(logits)), None
