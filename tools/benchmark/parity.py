"""Whether a device computes in bf16 what a processor computes: encoder, heads and training step."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmark.measure import Stopwatch, alone, reason
from benchmark.part import Case, cases, part
from megaregion.bounds import PositiveInt
from megaregion.config import (
    HeadBackend,
    HeadConfig,
    HeadsConfig,
    LossName,
    ModelConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from megaregion.heads import ClassShardedHead, GatheredFeatures
from megaregion.models import RegionEncoder, decays, initialise
from megaregion.models.costs import Recompute, everywhere
from megaregion.parallel import topology

GOAL = 0.5
"""A device may be off from fp32 twice as far as a processor; what is wrong is off by more."""
DISTANCE = "distance from fp32, bf16 on a processor"
REGIONS, IMAGES, CLASSES, DIM, STEPS = 5, 4, 5_000, 128, 3

ENCODERS: tuple[tuple[str, Recompute, bool], ...] = (
    ("all kept", "keep", False),
    ("norms and GELU made again", "cheap", False),
    ("blocks made again", "full", False),
    ("packed", "keep", True),
)
"""What is told, made again, and whether images share a sequence."""
BACKENDS: dict[str, tuple[HeadBackend, ...]] = {"cpu": ("torch",), "cuda": ("torch", "triton")}
LOSSES: tuple[LossName, ...] = ("separated", "softmax")


@dataclass(frozen=True)
class Sizes:
    """The network, and in which numbers it is computed."""

    model: ModelConfig
    bf16: bool

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return torch.bfloat16 if self.bf16 else torch.float32


Grids = tuple[tuple[int, int], ...]
Outcome = list[Tensor] | str
"""What came out, in fp32 on the processor; or why nothing did."""


@part(
    ("--width", PositiveInt, 768, "width D of a token"),
    ("--depth", PositiveInt, 4, "blocks"),
)  # fmt: skip
def parity(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Encoder, heads and training step in bf16 on a device, beside a processor in bf16 and fp32.

    Each figure is a distance from fp32, relative to fp32's own length: of embeddings and gradients, and of
    how far a few steps move the weights. The peer is bf16 on the processor.
    """
    model = ModelConfig(
        image_size=96, patch_size=16, width=options.width, depth=options.depth,
        heads=max(1, options.width // 64), mlp_width=4 * options.width, region_layers=min(2, options.depth),
    )  # fmt: skip
    if watch.counts:
        works = _works(Sizes(model, True), watch.device)
        builds = {name: partial(_itself, work) for name, work in works.items()}
        counted = watch.race(builds, 0)
        for name in works:
            rows = ((name, DISTANCE, name, name, ""),)
            yield from cases(name, rows, counted.figures, {name: GOAL}, counted.failed)
        return
    exact, plain = _in_process([Sizes(model, False), Sizes(model, True)], torch.device("cpu"))
    (outcomes,) = _in_process([Sizes(model, True)], watch.device)
    for name, outcome in outcomes.items():
        # A processor has one backend.
        known = name.replace("triton", "torch")
        three = (outcome, exact[known], plain[known])
        if failed := [one for one in three if isinstance(one, str)]:
            yield Case(name, 0, 0, "", failure=failed[0])
            continue
        ours, right, other = (one for one in three if isinstance(one, list))
        yield Case(f"{name}: {DISTANCE}", _distance(ours, right), _distance(other, right), "", GOAL)


def _in_process(sizes: Sequence[Sizes], device: torch.device) -> list[dict[str, Outcome]]:
    """What comes out on a device, by name, for each of the sizes."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_prepared, sizes, device, torch.get_num_threads()).result()


def _prepared(sizes: Sequence[Sizes], device: torch.device, threads: int) -> list[dict[str, Outcome]]:
    if device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Or the ranks' group would be one of GPUs.
    torch.set_num_threads(threads)
    return [_outcomes(one, device) for one in sizes]


def _works(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    works: dict[str, Callable[[], list[Tensor]]] = {
        f"encoder, {told}": partial(_encode, sizes, device, level, packed) for told, level, packed in ENCODERS
    }
    for backend, loss, labels in itertools.product(BACKENDS[device.type], LOSSES, (1, 4)):
        kind = "object" if labels == 1 else "text"
        works[f"{kind} head, {loss}, {backend}"] = partial(_score, sizes, device, backend, loss, labels)
    works["training steps, ZeRO 1"] = partial(_train, sizes, device)
    return works


def _itself(work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    return work


def _outcomes(sizes: Sizes, device: torch.device) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for name, work in _works(sizes, device).items():
        try:
            found[name] = [tensor.detach().float().cpu() for tensor in work()]
        except Exception as error:
            found[name] = reason(error)
    return found


def _distance(found: list[Tensor], exact: list[Tensor]) -> float:
    off = sum(float((one - other).square().sum()) for one, other in zip(found, exact, strict=True))
    return (off / sum(float(other.square().sum()) for other in exact)) ** 0.5


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _built(sizes: Sizes) -> RegionEncoder:
    model = RegionEncoder(sizes.model, DIM)
    initialise(model, 0)
    return model


def _inputs(sizes: Sizes, device: torch.device, packed: bool) -> tuple[Tensor, Tensor, Grids | None]:
    """Images, regions that see every second patch, and the grids of packed images."""
    grid, side, patch = sizes.model.grid, sizes.model.image_size, sizes.model.patch_size
    grids = ((grid, grid), (grid // 2, grid), (grid, grid // 3)) if packed else None
    patches = grid**2 if grids is None else sum(rows * columns for rows, columns in grids)
    images = (
        _noise(IMAGES, 3, side, side, seed=1) if grids is None else _noise(patches, 3, patch, patch, seed=1)
    )
    visible = torch.zeros((REGIONS, patches), dtype=torch.bool)
    visible[:, ::2] = True
    if grids is None:
        visible = visible.expand(IMAGES, -1, -1)
    return images.to(device, sizes.dtype), visible.to(device), grids


def _encode(sizes: Sizes, device: torch.device, level: Recompute, packed: bool) -> list[Tensor]:
    """Embeddings, and the gradient of every weight."""
    model = _built(sizes).to(device, sizes.dtype)
    model.vit.recompute = everywhere(level, sizes.model.depth)
    embeddings = model(*_inputs(sizes, device, packed))
    (embeddings.float() * _noise(*embeddings.shape, seed=2).to(device)).sum().backward()
    return [embeddings, *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def _score(
    sizes: Sizes, device: torch.device, backend: HeadBackend, loss: LossName, slots: int
) -> list[Tensor]:
    """Loss of rows and their gradient, with a margin and a tenth of the classes drawn."""
    kind = HeadConfig(loss=loss, sample_rate=0.1)
    shared = HeadsConfig(embedding_dim=DIM, object=kind, backend=backend)
    train = TrainConfig(precision="bf16" if sizes.bf16 else "fp32")
    place = alone(device)
    try:
        head = ClassShardedHead("object", RunConfig(head=shared, train=train), CLASSES, place).to(device)
        rows = 256
        features = _noise(rows, DIM, seed=3).to(device, sizes.dtype).requires_grad_()
        labels = torch.randint(CLASSES, (rows, slots), generator=torch.Generator().manual_seed(4)).to(device)
        everyone = torch.ones(rows, dtype=torch.bool, device=device)
        found = head.score(GatheredFeatures(features, place), head.draw(labels, everyone, 0))
        (found.sum / rows).backward()
        assert features.grad is not None
        return [features.grad.float() * rows, found.sum[None] / rows]
    finally:
        topology.leave()


def _train(sizes: Sizes, device: torch.device) -> list[Tensor]:
    """How far the weights have moved after some steps through the engine, in its fp32 copies."""
    from megaregion.parallel.tensor_parallel import parallelize
    from megaregion.parallel.zero import ZeroEngine

    place = alone(device)
    try:
        model = _built(sizes)
        precision: Precision = "bf16" if sizes.bf16 else "fp32"
        train = TrainConfig(global_batch=IMAGES, micro_batch=IMAGES, precision=precision)
        config = RunConfig(model=sizes.model, train=train)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        placements = parallelize(model, {}, [], place)
        engine = ZeroEngine(model.to(device), placements, config, place, decays)
        images, visible, _ = _inputs(sizes, device, packed=False)
        nothing = torch.zeros((), device=device)
        for step in range(STEPS):
            embeddings = engine(images, visible)
            direction = _noise(*embeddings.shape, seed=10 + step).to(device)
            engine.backward((embeddings.float() * direction).sum())
            engine.norm(nothing)
            engine.update(1e-3)
        after = {name: tensor.cpu() for name, _, tensor in engine.pieces()}
        return [after[f"weight.{name}"] - weight for name, weight in before.items()]
    finally:
        topology.leave()
