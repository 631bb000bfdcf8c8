"""The head benchmark: ours, a dense softmax and a PartialFC-style head on the same rows in one run."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmark.head_peers import DenseHead, PartialFCHead
from benchmark.measure import PeakMemory, Stopwatch
from benchmark.report import Case
from megaregion.config import HeadConfig, LossName
from megaregion.heads import ClassShardedHead
from megaregion.products import product

GEMM_BLOCK = 16_384
"""Classes of one product when the bare matrix products are timed: enough for their full rate."""


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
    device = watch.device
    with group_of_one(device) as group:
        _warm_up(group, device)
        ours = measure(lambda: _ours(sizes, group, device), sizes, repeats, watch)
        products, fastest = (gemm_seconds(sizes, repeats, watch, library) for library in (_torch, _fastest))
        peer = measure(lambda: _partial_fc(sizes, group, device), sizes, repeats, watch)
        plain = measure(lambda: _dense(sizes, device), sizes, repeats, watch) if dense else None
    found = [
        ("step", "whole step, PartialFC", ours.step, peer.step, "s"),
        ("passes", "forward + backward, PartialFC", ours.passes, peer.passes, "s"),
        ("update", "optimizer step, PartialFC", ours.update, peer.update, "s"),
        ("memory", "memory, PartialFC", ours.memory / 1e6, peer.memory / 1e6, "MB"),
        ("gemm", "forward + backward, its four GEMMs", ours.passes, products, "s"),
        ("", "forward + backward, its four GEMMs by the fastest library", ours.passes, fastest, "s"),
    ]
    if plain is not None:
        found += [
            ("dense", "forward + backward, dense softmax", ours.passes, plain.passes, "s"),
            ("dense_memory", "memory, dense softmax", ours.memory / 1e6, plain.memory / 1e6, "MB"),
        ]
    return [
        Case(f"{sizes.label}: {text}", own, other, goals.get(name, 0.0), unit)
        for name, text, own, other, unit in found
    ]


def measure(build: Callable[[], Contender], sizes: HeadSizes, repeats: int, watch: Stopwatch) -> Measured:
    """Build a head, take its peak memory and its times, and let it go."""
    memory = PeakMemory(watch.device)
    before = memory.now()
    contender = build()
    timed_step(contender, watch)
    memory.reset()
    timed_step(contender, watch)
    beyond = memory.peak() - before - sizes.state_bytes
    times = [timed_step(contender, watch) for _ in range(repeats)]
    return Measured(min(first for first, _ in times), min(second for _, second in times), beyond)


def timed_step(contender: Contender, watch: Stopwatch) -> tuple[float, float]:
    """Seconds of forward and backward, and of the update that follows."""
    return watch.seconds(contender.forward_backward), watch.seconds(contender.update)


def _torch(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.mm(left, right, out=out)


def _fastest(left: Tensor, right: Tensor, out: Tensor) -> None:
    product(left, right.T)


def gemm_seconds(
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
    return min(watch.seconds(products) for _ in range(repeats)) * drawn / block


def _warm_up(group: dist.ProcessGroup, device: torch.device) -> None:
    """Run every head once at a small size, so that no one's memory counts the libraries' own."""
    small = HeadSizes(4096, 64, 256, 0.5, 2**20)
    for contender in (_ours(small, group, device), _partial_fc(small, group, device), _dense(small, device)):
        contender.forward_backward()
        contender.update()


def _ours(sizes: HeadSizes, group: dist.ProcessGroup, device: torch.device) -> Contender:
    config = HeadConfig(loss=sizes.loss, sample_rate=sizes.sample_rate)
    head = ClassShardedHead(
        config,
        sizes.classes,
        sizes.dim,
        world_group=group,
        data_group=group,
        seed=0,
        name="object",
        chunk_bytes=sizes.chunk_bytes,
    ).to(device)
    features, labels = _rows(sizes, device)
    everyone = torch.ones(sizes.rows, dtype=torch.bool, device=device)
    steps = itertools.count()

    def forward_backward() -> None:
        features.grad = None
        loss = head.loss(features, labels[:, None], everyone, next(steps))
        (loss.sum / sizes.rows).backward()

    def update() -> None:
        head.grad_norm_squared()
        head.step(1e-3)
        head.zero_grad()

    return Contender(forward_backward, update)


def _partial_fc(sizes: HeadSizes, group: dist.ProcessGroup, device: torch.device) -> Contender:
    config = HeadConfig()
    head = PartialFCHead(
        sizes.classes, sizes.dim, sizes.sample_rate, config.margin, config.scale, group, device
    )
    return _trained_densely(head, sizes, device)


def _dense(sizes: HeadSizes, device: torch.device) -> Contender:
    config = HeadConfig()
    return _trained_densely(
        DenseHead(sizes.classes, sizes.dim, config.margin, config.scale, device), sizes, device
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


@contextmanager
def group_of_one(device: torch.device) -> Iterator[dist.ProcessGroup]:
    """The process group of this run: torchrun's if there is one, else this process alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            assert dist.group.WORLD is not None
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()
