"""Our training step, and our transformer alone, beside MLCDVisionModel and beside bare matrix products."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.measure import Build, Stopwatch, Work, alone
from benchmark.part import CLOCK, Case, Row, cases, part
from megaregion.bounds import Choice, PositiveInt, Several
from megaregion.checks import check_model
from megaregion.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megaregion.data.image import Crop, fitting_grid
from megaregion.models import VisionTransformer, decays
from megaregion.models.costs import Recompute, encoder_flops, everywhere
from megaregion.models.initialisation import initial_value
from megaregion.models.layers import compile_blocks, use_float8
from megaregion.models.rotary import packed_rotation
from megaregion.planning.compiled import counted_compilation
from megaregion.processor import keep_freed_memory, product

GOALS = {"peer": 1.08, "rate": 0.82, "memory": 1 / 0.9, "regions": 1 / 1.06, "packed": 1.25, "padding": 0.97}
"""Of the default size, ViT-B/16 at 224 px."""
PRODUCT_SIDE = {"cpu": 4096, "cuda": 16_384}
"""Of matrices that are large enough for the full rate, and for a GPU to outlast what starts them."""
CONTESTANTS = (
    "ideal", "fastest-ideal", "ours", "peer", "regions", "trained", "cheap", "packed", "padded",
    "compiled", "peer-compiled", "fp8",
)  # fmt: skip
"""By the names of STEP."""
REGIONS = 10
SHAPES = (1 / 3, 0.42, 0.5, 0.62, 0.75, 0.9, 1.0, 1.0, 1.1, 1.33, 1.5, 1.6, 1.78, 2.0, 2.4, 3.0)
"""Heights over widths of a mix of images, 1:3 to 3:1."""

STEP: tuple[Row, ...] = (
    ("peer", "step, MLCDVisionModel + AdamW", "ours", "peer", "s"),
    ("rate", "step, MFU: its products at the matrix rate", "ours", "ideal", "s"),
    ("", "step, its products at the rate of the fastest library", "ours", "fastest-ideal", "s"),
    ("", "MLCDVisionModel + AdamW, MFU: its products at the matrix rate", "peer", "ideal", "s"),
    ("memory", "peak memory, MLCDVisionModel + AdamW", "ours: memory", "peer: memory", "MB"),
    ("", "step, norms and GELU made again, MLCDVisionModel", "cheap", "peer", "s"),
    ("", "its peak memory, MLCDVisionModel + AdamW", "cheap: memory", "peer: memory", "MB"),
    ("packed", "packed 1:3 to 3:1, padded to squares", "packed", "padded", "s"),
    ("padding", "tokens of a packed step, without padding", "computed tokens", "tokens", "tokens"),
    ("regions", f"step with {REGIONS} regions, without", "regions", "ours", "s"),
    ("", "the same as trained", "trained", "ours", "s"),
    ("", "step, MLCDVisionModel + compile + AdamW", "ours", "peer-compiled", "s"),
    ("", "step with train.compile, without", "compiled", "ours", "s"),
    ("", "step with train.compile, MFU: its products at the matrix rate", "compiled", "ideal", "s"),
    ("", "MLCDVisionModel + compile, MFU: its products at the matrix rate", "peer-compiled", "ideal", "s"),
    ("", "step with train.fp8, without", "fp8", "ours", "s"),
)


@part(
    ("--width", PositiveInt, 768, "width D of a token"),
    ("--depth", PositiveInt, 12, "blocks"),
    ("--heads", PositiveInt, 12, "attention heads"),
    ("--patch", PositiveInt, 16, "side of a patch, in pixels"),
    ("--size", PositiveInt, 224, "side of an image, in pixels"),
    ("--batch", PositiveInt, 8, "images of a step"),
    ("--bf16", bool, False, "bf16 instead of float32"),
    ("--compile", bool, False, "run torch.compile beside them; it compiles for minutes"),
    ("--fp8", bool, False, "also in 8-bit floats; needs torchao and a GPU of Ada, Hopper or later"),
    ("--rounds", PositiveInt, 5, "timed steps of each; the fastest counts"),
    ("--seconds", PositiveInt, None, "what is not ready by then is named and left out"),
    CLOCK,
    ("--contestants", Several(Choice(CONTESTANTS)), None, "only these, not all that the others say"),
)
def step(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Our training step beside MLCDVisionModel under AdamW, and beside bare matrix products.

    Ratios are peer / ours. All take the same images and the same loss, the pooled class token (or the region
    tokens) times a fixed direction: heads are excluded. Ours goes through the engine, clipping included, as a
    run does. Every contestant has a process of its own, and they take turns. Goals belong to the default
    size.
    """
    sizes = _sizes(options, watch.device)
    builds: dict[str, Build] = {
        "ideal": partial(_square_product, sizes),
        "fastest-ideal": partial(_square_product, sizes, fastest=True),
        "ours": partial(_our_step, sizes),
        "peer": partial(_peer_step, sizes),
        "regions": partial(_our_step, sizes, REGIONS),
        # As trained, the last block leaves out what nobody but the next block's patches would read.
        "trained": partial(_our_step, sizes, REGIONS, regions_only=True),
        "cheap": partial(_our_step, sizes, level="cheap"),
        "packed": partial(_our_packed_step, sizes),
        "padded": partial(_our_packed_step, sizes, padded=True),
        "compiled": partial(_our_step, sizes, compiled=True),
        "peer-compiled": partial(_peer_step, sizes, compiled=True),
        "fp8": partial(_our_step, sizes, fp8=True),
    }
    dear = {"compiled": options.compile, "peer-compiled": options.compile, "fp8": options.fp8}
    chosen = options.contestants or [name for name in builds if dear.get(name, True)]
    taken = {name: builds[name] for name in builds if name in chosen}
    weighed = [name for name in ("ours", "peer", "cheap") if name in chosen]
    with counted_compilation() if watch.counts else nullcontext():
        found, failed = watch.race(taken, options.rounds, weighed)
    for name in found:
        if name.endswith("ideal"):
            found[name] *= sizes.products
        elif name.endswith(": memory"):
            found[name] /= 1e6
    if "packed" in chosen:
        found["computed tokens"], found["tokens"] = _packed_tokens(sizes)
    default = sizes == Sizes(ModelConfig(), 8, False, watch.device)
    yield from cases(sizes.label, STEP, found, GOALS if default else {}, failed)


@dataclass(frozen=True)
class Sizes:
    """What is measured, on which device."""

    model: ModelConfig
    batch: int
    """Images of a step."""
    bf16: bool
    """Whether weights and activations are bf16; else float32."""
    device: torch.device

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

    @property
    def product_side(self) -> int:
        """Side of the square matrices whose product gives the rate; smaller for a toy, which is quick."""
        return min(PRODUCT_SIDE[self.device.type], 16 * self.model.width)

    @property
    def products(self) -> float:
        """Products of such matrices that have as many operations as a training step."""
        return encoder_flops(self.model, 0, 0).training * self.batch / (2 * self.product_side**3)

    def draw(self, *shape: int) -> Tensor:
        """Noise on the device."""
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self.device, self.dtype)

    def images(self) -> Tensor:
        """Images of noise, [batch, 3, side, side]."""
        return self.draw(self.batch, 3, self.model.image_size, self.model.image_size)

    def direction(self) -> Tensor:
        """What features are multiplied by for a loss, [width], float32."""
        return torch.randn(self.model.width, generator=torch.Generator().manual_seed(1)).to(self.device)


def _sizes(options: argparse.Namespace, device: torch.device) -> Sizes:
    """The sizes that the flags describe.

    Raises:
        UserError: They do not fit each other.
    """
    model = ModelConfig(
        image_size=options.size, patch_size=options.patch, width=options.width, depth=options.depth,
        heads=options.heads, mlp_width=4 * options.width, region_layers=min(4, options.depth),
    )  # fmt: skip
    check_model(model, tensor=1)
    return Sizes(model, options.batch, options.bf16, device)


def _square_product(sizes: Sizes, fastest: bool = False) -> Work:
    """The rate that everything else is measured by; ``fastest`` as linears multiply (processor.py)."""
    side = sizes.product_side
    a, b = (torch.randn(side, side, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
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
        self, images: Tensor, visible: Tensor | None = None, grids: tuple[tuple[int, int], ...] | None = None
    ) -> Tensor:
        """Features of the class token, [images, 1, width]; with regions theirs, [images, regions, width]."""
        tokens = self.vit(images, visible, regions_only=self._regions_only, grids=grids)
        return self.vit.pool(tokens.image[:, :1] if tokens.regions is None else tokens.regions)


def _pooled(sizes: Sizes, regions_only: bool) -> Pooled:
    """Our model in a process that keeps freed memory, as a run does."""
    if sizes.device.type == "cpu":
        keep_freed_memory()
    return Pooled(sizes.model, regions_only)


def _our_step(
    sizes: Sizes,
    regions: int = 0,
    regions_only: bool = False,
    compiled: bool = False,
    fp8: bool = False,
    level: Recompute = "keep",
) -> Work:
    """Our step through the engine, with so many region tokens of each image."""
    model = _pooled(sizes, regions_only)
    model.vit.recompute = everywhere(level, sizes.model.depth)
    if fp8:
        use_float8(model.vit.blocks, sizes.device)
    if compiled:
        compile_blocks(model.vit.blocks)
    images = (sizes.images(),)
    return _training(model, sizes, (*images, _visible(sizes, regions)) if regions else images)


def _our_packed_step(sizes: Sizes, padded: bool = False) -> Work:
    """Our step on images of many shapes with regions as trained; ``padded`` to squares of longer sides."""
    grids = _native_grids(sizes)
    if padded:
        grids = tuple((max(grid), max(grid)) for grid in grids)
    patches, side = sum(rows * columns for rows, columns in grids), sizes.model.patch_size
    generator = torch.Generator().manual_seed(0)
    visible = (torch.rand(REGIONS, patches, generator=generator) < 0.25).to(sizes.device)
    inputs = (sizes.draw(patches, 3, side, side), visible, grids)
    return _training(_pooled(sizes, regions_only=True), sizes, inputs)


def _training(model: Pooled, sizes: Sizes, inputs: tuple[Any, ...]) -> Work:
    """Forward, backward, norm and update through the engine."""
    from megaregion.parallel.tensor_parallel import parallelize
    from megaregion.parallel.zero import ZeroEngine

    place = alone(sizes.device)
    config = RunConfig(
        model=sizes.model,
        parallel=ParallelConfig(zero_stage=1),
        train=TrainConfig(
            global_batch=sizes.batch, micro_batch=sizes.batch, precision="bf16" if sizes.bf16 else "fp32"
        ),
    )
    placements = parallelize(model, {}, [], place)
    engine: Any = ZeroEngine(model.to(sizes.device), placements, config, place, decays)
    direction, no_heads = sizes.direction(), torch.zeros((), device=sizes.device)

    def train() -> None:
        engine.backward((engine(*inputs).float() * direction).sum())
        engine.norm(no_heads)
        engine.update(1e-4)

    return train


def _peer_step(sizes: Sizes, compiled: bool = False) -> Work:
    """Transformers' MLCDVisionModel under torch's AdamW, as a user would write it."""
    model, features = _peer(sizes, compiled)
    # As torch takes it by itself on a GPU, but not where tensors are fake.
    several = True if sizes.device.type == "cuda" else None
    rule = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.2, foreach=several)
    optimizer = rule(model.parameters())
    images, direction = sizes.images(), sizes.direction()

    def train() -> None:
        (features(images)[:, None].float() * direction).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def _peer(sizes: Sizes, compiled: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Transformers' MLCDVisionModel of the same sizes, and its pooled features of images."""
    from transformers import MLCDVisionConfig, MLCDVisionModel

    from megaregion.export.layouts import mlcd_config

    torch.manual_seed(0)
    built = MLCDVisionModel(MLCDVisionConfig(**mlcd_config(sizes.model, sizes.dtype)))
    model: nn.Module = built.to(sizes.device, sizes.dtype).train()
    forward: Any = torch.compile(model) if compiled else model
    return model, lambda images: forward(pixel_values=images).pooler_output


def _native_grids(sizes: Sizes) -> tuple[tuple[int, int], ...]:
    """Rows and columns of patches of the mix, each about as many as the model's square has."""
    shapes = [SHAPES[image * len(SHAPES) // sizes.batch] for image in range(sizes.batch)]
    return tuple(fitting_grid(Crop(0, 0, 1000, 1000 * shape), sizes.model.grid**2) for shape in shapes)


def _packed_tokens(sizes: Sizes) -> tuple[float, float]:
    """Tokens that a packed step computes with, and those that are patches or class tokens of an image."""
    grids = _native_grids(sizes)
    computed = packed_rotation(torch.zeros(sizes.model.head_dim // 2), grids, 1e4).cos.shape[0]
    return float(computed), float(sum(1 + rows * columns for rows, columns in grids))


def _visible(sizes: Sizes, regions: int) -> Tensor:
    """Regions of about a quarter of the image, [batch, regions, patches]."""
    grid = sizes.model.grid
    visible = torch.zeros(sizes.batch, regions, grid, grid, dtype=torch.bool)
    for n in range(regions):
        first = n * grid // (2 * regions)
        visible[:, n, first : first + grid // 2, first : first + grid // 2] = True
    return visible.flatten(2).to(sizes.device)
