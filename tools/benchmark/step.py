"""Our training step beside MLCDVisionModel under AdamW, and beside bare matrix products.

Ratios are peer / ours. All take the same images and the same loss, the pooled class token (or the region
tokens) times a fixed direction: heads are excluded. Ours goes through the engine, clipping included, as a
run does. Every contestant has a process of its own, and they take turns. Goals belong to the default
size.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.contestant import Build, Work, contestants, take_turns
from benchmark.measure import Stopwatch, add_clock, alone, describe_host
from benchmark.report import Case, Report, cases
from megaregion.checks import check_model
from megaregion.command_line import whole
from megaregion.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megaregion.data.image import Crop, fitting_grid
from megaregion.models import VisionTransformer, decays
from megaregion.models.costs import Recompute, encoder_flops, everywhere
from megaregion.models.initialisation import initial_value
from megaregion.models.rotary import packed_rotation
from megaregion.processor import keep_freed_memory, product

GOALS = {"peer": 1.08, "rate": 0.82, "memory": 1 / 0.9, "regions": 1 / 1.06, "packed": 1.25, "padding": 0.97}
PRODUCT_SIDE = 4096
"""Of matrices that are large enough for the full rate."""
BASE = ModelConfig()
"""ViT-B/16 at 224 px."""
REGIONS = 10
SHAPES = (1 / 3, 0.42, 0.5, 0.62, 0.75, 0.9, 1.0, 1.0, 1.1, 1.33, 1.5, 1.6, 1.78, 2.0, 2.4, 3.0)
"""Heights over widths of a mix of images, 1:3 to 3:1."""


@dataclass(frozen=True)
class StepSizes:
    """What a step is measured on."""

    model: ModelConfig = BASE
    batch: int = 8
    """Images of a step."""
    bf16: bool = False
    """Whether weights and activations are bf16; else float32."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def label(self) -> str:
        """The sizes as a case shows them."""
        model = self.model
        return (
            f"D={model.width} L={model.depth} /{model.patch_size} {model.image_size} px "
            f"B={self.batch} {'bf16' if self.bf16 else 'fp32'}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--width", type=whole(), default=768, help="width D of a token")
    add("--depth", type=whole(), default=12, help="blocks")
    add("--heads", type=whole(), default=12, help="attention heads")
    add("--patch", type=whole(), default=16, help="side of a patch, in pixels")
    add("--size", type=whole(), default=224, help="side of an image, in pixels")
    add("--batch", type=whole(), default=8, help="images of a step")
    add("--bf16", action="store_true", help="bf16 instead of float32")
    add("--compile", action="store_true", help="run torch.compile beside them; it compiles for minutes")
    add("--rounds", type=whole(), default=5, help="timed steps of each; the fastest counts")
    add_clock(parser)


def step_sizes(options: argparse.Namespace) -> StepSizes:
    """The size that the flags describe.

    Raises:
        UserError: The sizes do not fit each other.
    """
    model = ModelConfig(
        image_size=options.size,
        patch_size=options.patch,
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        mlp_width=4 * options.width,
        region_layers=min(4, options.depth),
    )
    check_model(model, tensor=1)
    return StepSizes(model, options.batch, options.bf16)


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Measure one size."""
    sizes = step_sizes(options)
    watch = Stopwatch(device, options.clock == "processor")
    builds = _builds(sizes, device, options.compile)
    with contestants(builds, watch) as group:
        seconds = take_turns(group, options.rounds)
        memory = {name: group[name].memory() / 1e6 for name in ("ours", "peer", "cheap")}
    found = _compare(sizes, seconds, memory, GOALS if sizes == StepSizes() else {})
    return Report(describe_host(device, clock=options.clock), found)


def _builds(sizes: StepSizes, device: torch.device, compiled: bool) -> dict[str, Build]:
    """Everybody who takes a turn, by name."""
    given = (sizes, device)
    builds: dict[str, Build] = {
        "matrix": (square_product, given),
        "fastest": (square_product, (*given, True)),
        "ours": (our_step, given),
        "peer": (peer_step, given),
        "regions": (our_step, (*given, REGIONS)),
        # As trained, the last block leaves out what nobody but the next block's patches would read.
        "trained": (our_step, (*given, REGIONS, True)),
        "cheap": (our_step, (*given, 0, False, False, "cheap")),
        "packed": (our_packed_step, given),
        "padded": (our_packed_step, (*given, True)),
    }
    if compiled:
        builds["peer compiled"] = (peer_step, (*given, True))
        builds["compiled"] = (our_step, (*given, 0, False, True))
    return builds


def _compare(
    sizes: StepSizes, seconds: Mapping[str, float], memory: Mapping[str, float], goals: Mapping[str, float]
) -> list[Case]:
    """Who is divided by whom; seconds and megabytes by name."""
    ideal, fastest = (ideal_seconds(sizes, seconds[name]) for name in ("matrix", "fastest"))
    found = [
        ("peer", "step, MLCDVisionModel + AdamW", seconds["ours"], seconds["peer"], "s"),
        ("rate", "step, its products at the matrix rate", seconds["ours"], ideal, "s"),
        ("", "step, its products at the rate of the fastest library", seconds["ours"], fastest, "s"),
        ("", "MLCDVisionModel + AdamW, its products at the matrix rate", seconds["peer"], ideal, "s"),
        ("memory", "peak memory, MLCDVisionModel + AdamW", memory["ours"], memory["peer"], "MB"),
        ("", "step, norms and GELU made again, MLCDVisionModel", seconds["cheap"], seconds["peer"], "s"),
        ("", "its peak memory, MLCDVisionModel + AdamW", memory["cheap"], memory["peer"], "MB"),
        ("packed", "packed 1:3 to 3:1, padded to squares", seconds["packed"], seconds["padded"], "s"),
        ("padding", "tokens of a packed step, without padding", *_packed_tokens(sizes), "tokens"),
        ("regions", f"step with {REGIONS} regions, without", seconds["regions"], seconds["ours"], "s"),
        ("", "the same as trained", seconds["trained"], seconds["ours"], "s"),
    ]
    if "compiled" in seconds:
        found += [
            ("", "step, MLCDVisionModel + compile + AdamW", seconds["ours"], seconds["peer compiled"], "s"),
            ("", "step with train.compile, without", seconds["compiled"], seconds["ours"], "s"),
        ]
    return cases(sizes.label, goals, found)


def ideal_seconds(sizes: StepSizes, product: float) -> float:
    """Seconds of a training step's products at the rate of one square product that took so many seconds."""
    operations = encoder_flops(sizes.model, 0, 0).training * sizes.batch
    return operations / (2 * product_side(sizes) ** 3) * product


def product_side(sizes: StepSizes) -> int:
    """Side of the square matrices whose product gives the rate; smaller for a toy, which is not to wait."""
    return min(PRODUCT_SIDE, 16 * sizes.model.width)


def square_product(sizes: StepSizes, device: torch.device, fastest: bool = False) -> Work:
    """One square matrix product: the rate that everything else is measured by.

    Args:
        sizes: Their type.
        device: Where it runs.
        fastest: As linears multiply (processor.py), which on some processors is not as torch does.
    """
    side = product_side(sizes)
    a, b = (torch.randn(side, side, device=device, dtype=sizes.dtype) for _ in range(2))
    out = torch.empty_like(a)
    return (lambda: product(a, b)) if fastest else (lambda: torch.mm(a, b, out=out))


class Pooled(nn.Module):
    """The transformer with the last norm, and nothing of the heads."""

    def __init__(self, model: ModelConfig, regions_only: bool = False) -> None:
        super().__init__()
        self.vit = VisionTransformer(model)
        self._regions_only = regions_only
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(initial_value(name, parameter.shape, model, 0))

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        grids: tuple[tuple[int, int], ...] | None = None,
    ) -> Tensor:
        """Features of the class token, [images, 1, width]; with regions theirs, [images, regions, width]."""
        only = self._regions_only and visible is not None
        tokens = self.vit(images, visible, regions_only=only, grids=grids)
        return self.vit.pool(tokens.image[:, :1] if tokens.regions is None else tokens.regions)

    def compile_blocks(self) -> None:
        """Have torch.compile compile each block."""
        for block in self.vit.blocks:
            block.compile()


def our_step(
    sizes: StepSizes,
    device: torch.device,
    regions: int = 0,
    as_trained: bool = False,
    compiled: bool = False,
    level: Recompute = "keep",
) -> Work:
    """Our step through the engine.

    Args:
        sizes: The model and the batch.
        device: Where it runs.
        regions: Region tokens of each image.
        as_trained: Leave out, as training does, what of the last block only patches need.
        compiled: Whether torch.compile compiles each block.
        level: What blocks recompute in the backward pass.
    """
    model = _pooled(sizes, device, as_trained)
    model.vit.recompute = everywhere(level, sizes.model.depth)
    if compiled:
        model.compile_blocks()
    engine = _engine(model, sizes, device, regions)
    images = square_images(sizes, device)
    inputs = (images, _visible(sizes, device, regions)) if regions else (images,)
    return _training(engine, inputs, _direction(sizes, device))


def our_packed_step(sizes: StepSizes, device: torch.device, padded: bool = False) -> Work:
    """Our step on images of many shapes, with regions as trained.

    Args:
        sizes: The model and the batch.
        device: Where it runs.
        padded: Pad each image to a square of its own longer side, as images that are to be square must be.
    """
    grids = _native_grids(sizes)
    if padded:
        grids = tuple((max(grid), max(grid)) for grid in grids)
    engine = _engine(_pooled(sizes, device, regions_only=True), sizes, device, REGIONS)
    patches, side = sum(rows * columns for rows, columns in grids), sizes.model.patch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(patches, 3, side, side, generator=generator).to(device, sizes.dtype)
    visible = (torch.rand(REGIONS, patches, generator=generator) < 0.25).to(device)
    return _training(engine, (images, visible, grids), _direction(sizes, device))


def _training(engine: Any, inputs: tuple[Any, ...], direction: Tensor) -> Work:
    """The work of a step: forward, backward, norm and update."""
    no_heads = torch.zeros((), device=direction.device)

    def step() -> None:
        engine.backward((engine(*inputs).float() * direction).sum())
        engine.norm(no_heads)
        engine.update(1e-4)

    return step


def _pooled(sizes: StepSizes, device: torch.device, regions_only: bool) -> Pooled:
    """Our model in a process that keeps freed memory, as a run does."""
    if device.type == "cpu":
        keep_freed_memory()
    return Pooled(sizes.model, regions_only)


def _engine(model: Pooled, sizes: StepSizes, device: torch.device, regions: int) -> Any:
    """Our engine around a model."""
    from megaregion.parallel.tensor_parallel import parallelize
    from megaregion.parallel.zero import ZeroEngine

    place = alone(device)
    config = RunConfig(
        model=sizes.model,
        data=DataConfig(regions_per_image=max(1, regions)),
        optimizer=OptimizerConfig(),
        parallel=ParallelConfig(zero_stage=1),
        train=TrainConfig(
            global_batch=sizes.batch, micro_batch=sizes.batch, precision="bf16" if sizes.bf16 else "fp32"
        ),
    )
    placements = parallelize(model, {}, [], place)
    return ZeroEngine(model.to(device), placements, config, place, decays)


def peer_step(sizes: StepSizes, device: torch.device, compiled: bool = False) -> Work:
    """Transformers' MLCDVisionModel under torch's AdamW, as a user would write it.

    Args:
        sizes: The model and the batch.
        device: Where it runs.
        compiled: Whether torch.compile compiles the model.
    """
    model = mlcd_model(sizes, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.2)
    forward: Any = torch.compile(model) if compiled else model
    images, direction = square_images(sizes, device), _direction(sizes, device)

    def step() -> None:
        features = forward(pixel_values=images).pooler_output[:, None]
        (features.float() * direction).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def mlcd_model(sizes: StepSizes, device: torch.device) -> nn.Module:
    """Transformers' MLCDVisionModel of the same sizes."""
    from transformers import MLCDVisionConfig, MLCDVisionModel

    from megaregion.export.layouts import mlcd_config

    torch.manual_seed(0)
    built = MLCDVisionModel(MLCDVisionConfig(**mlcd_config(sizes.model, sizes.dtype)))
    model: nn.Module = built.to(device, sizes.dtype).train()
    return model


def square_images(sizes: StepSizes, device: torch.device) -> Tensor:
    """Images of noise, [batch, 3, side, side]."""
    side = sizes.model.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sizes.batch, 3, side, side, generator=generator).to(device, sizes.dtype)


def _native_grids(sizes: StepSizes) -> tuple[tuple[int, int], ...]:
    """Rows and columns of patches of the mix, each about as many as the model's square has."""
    shapes = [SHAPES[image * len(SHAPES) // sizes.batch] for image in range(sizes.batch)]
    return tuple(fitting_grid(Crop(0, 0, 1000, 1000 * shape), sizes.model.grid**2) for shape in shapes)


def _packed_tokens(sizes: StepSizes) -> tuple[float, float]:
    """Tokens that a packed step computes with, and those that are patches or class tokens of an image."""
    grids = _native_grids(sizes)
    computed = packed_rotation(torch.zeros(sizes.model.head_dim // 2), grids, 1e4).cos.shape[0]
    return float(computed), float(sum(1 + rows * columns for rows, columns in grids))


def _direction(sizes: StepSizes, device: torch.device) -> Tensor:
    return torch.randn(sizes.model.width, generator=torch.Generator().manual_seed(1)).to(device)


def _visible(sizes: StepSizes, device: torch.device, regions: int) -> Tensor:
    """Regions of about a quarter of the image, [batch, regions, patches]."""
    grid = sizes.model.grid
    visible = torch.zeros(sizes.batch, regions, grid, grid, dtype=torch.bool)
    for n in range(regions):
        first = n * grid // (2 * max(1, regions))
        visible[:, n, first : first + grid // 2, first : first + grid // 2] = True
    return visible.flatten(2).to(device)
