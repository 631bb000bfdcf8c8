"""The training step, heads excluded, beside transformers' model under plain AdamW and beside bare products.

All take the same images and the same loss: the pooled class token (or the region tokens) times a fixed
direction. Ours goes through the engine, clipping included, as a run does.

Shapes: B images, N regions, P patches, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.contestant import Work
from megaregion.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megaregion.models.recompute import Level, everywhere
from megaregion.products import product

PRODUCT_SIDE = 4096
BASE = ModelConfig()
"""ViT-B/16 at 224 px."""


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


class Pooled(nn.Module):
    """The transformer with the last norm, and nothing of the heads."""

    def __init__(self, model: ModelConfig, regions_only: bool) -> None:
        super().__init__()
        from megaregion.models import VisionTransformer

        self.vit = VisionTransformer(model)
        self._regions_only = regions_only

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        grids: tuple[tuple[int, int], ...] | None = None,
    ) -> Tensor:
        """Features of the class token, [B, 1, D]; with regions theirs, [B, N, D]."""
        only = self._regions_only and visible is not None
        tokens = self.vit(images, visible, regions_only=only, grids=grids)
        return self.vit.pool(tokens.image[:, :1] if tokens.regions is None else tokens.regions)


def our_step(
    sizes: StepSizes,
    device: str,
    regions: int = 0,
    as_trained: bool = False,
    compiled: bool = False,
    level: Level = "keep",
) -> Work:
    """Our step through the engine.

    Args:
        sizes: The model and the batch.
        device: Where it runs.
        regions: Region tokens N of each image.
        as_trained: Leave out, as training does, what of the last block only patches need.
        compiled: Whether torch.compile compiles each block.
        level: What blocks recompute in the backward pass.
    """
    engine = _engine(sizes, device, regions, as_trained, compiled, level)
    images, visible = _images(sizes, device), _visible(sizes, device, regions)
    direction, no_heads = _direction(sizes, device), torch.zeros((), device=device)

    def step() -> None:
        features = engine(images, visible) if regions else engine(images)
        engine.backward((features.float() * direction).sum())
        engine.norm(no_heads)
        engine.update(1e-4)

    return step


def _engine(
    sizes: StepSizes, device: str, regions: int, as_trained: bool, compiled: bool, level: Level
) -> Any:
    from megaregion.heap import keep_freed_memory
    from megaregion.models import decays
    from megaregion.models.initialisation import initial_value
    from megaregion.parallel.tensor_parallel import parallelize
    from megaregion.parallel.zero import ZeroEngine

    place = alone(device)
    if place.device.type == "cpu":
        keep_freed_memory()
    config = RunConfig(
        model=sizes.model,
        data=DataConfig(regions_per_image=max(1, regions)),
        optimizer=OptimizerConfig(),
        parallel=ParallelConfig(zero_stage=1),
        train=TrainConfig(
            global_batch=sizes.batch, micro_batch=sizes.batch, precision="bf16" if sizes.bf16 else "fp32"
        ),
    )
    model = Pooled(sizes.model, as_trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, sizes.model, 0))
    model.vit.levels = everywhere(level, sizes.model.depth)
    if compiled:
        for block in model.vit.blocks:
            block.compile()
    placements = parallelize(model, {}, [], place)
    return ZeroEngine(model.to(place.device), placements, config, place, decays)


SHAPES = (1 / 3, 0.42, 0.5, 0.62, 0.75, 0.9, 1.0, 1.0, 1.1, 1.33, 1.5, 1.6, 1.78, 2.0, 2.4, 3.0)
"""Heights over widths of a mix of images, 1:3 to 3:1."""


def native_grids(sizes: StepSizes) -> tuple[tuple[int, int], ...]:
    """Rows and columns of patches of the mix, each about as many as the model's square has."""
    from megaregion.data.image import Crop, fitting_grid

    shapes = [SHAPES[image * len(SHAPES) // sizes.batch] for image in range(sizes.batch)]
    return tuple(fitting_grid(Crop(0, 0, 1000, 1000 * shape), sizes.model.grid**2) for shape in shapes)


def our_packed_step(sizes: StepSizes, device: str, padded: bool = False) -> Work:
    """Our step on images of many shapes, with regions as trained.

    Args:
        sizes: The model and the batch.
        device: Where it runs.
        padded: Pad each image to a square of its own longer side, as images that are to be square must be.
    """
    grids = native_grids(sizes)
    if padded:
        grids = tuple((max(grid), max(grid)) for grid in grids)
    engine = _engine(sizes, device, 10, True, False, "keep")
    patches, side = sum(rows * columns for rows, columns in grids), sizes.model.patch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(patches, 3, side, side, generator=generator).to(device, sizes.dtype)
    visible = (torch.rand(10, patches, generator=generator) < 0.25).to(device)
    direction, no_heads = _direction(sizes, device), torch.zeros((), device=device)

    def step() -> None:
        features = engine(images, visible, grids)
        engine.backward((features.float() * direction).sum())
        engine.norm(no_heads)
        engine.update(1e-4)

    return step


def alone(device: str) -> Any:
    """The topology of this process alone."""
    from megaregion.parallel import topology

    for key in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        os.environ.pop(key, None)
    threads = torch.get_num_threads()
    place = topology.join(1)
    torch.set_num_threads(threads)
    return replace(place, device=torch.device(device))


def peer_step(sizes: StepSizes, device: str, compiled: bool = False) -> Work:
    """Transformers' MLCDVisionModel under torch's AdamW, as a user would write it.

    Args:
        sizes: The model and the batch.
        device: Where it runs.
        compiled: Whether torch.compile compiles the model.
    """
    from transformers import MLCDVisionConfig, MLCDVisionModel

    from megaregion.export.layouts import mlcd_config

    torch.manual_seed(0)
    built = MLCDVisionModel(MLCDVisionConfig(**mlcd_config(sizes.model, sizes.dtype)))
    model = built.to(device, sizes.dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.2)
    forward: Any = torch.compile(model) if compiled else model
    images, direction = _images(sizes, device), _direction(sizes, device)

    def step() -> None:
        features = forward(pixel_values=images).pooler_output[:, None]
        (features.float() * direction).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def products(sizes: StepSizes, device: str, fastest: bool = False) -> Work:
    """One square matrix product: the rate that everything else is measured by.

    Args:
        sizes: Their type.
        device: Where it runs.
        fastest: As linears multiply (products.py), which on some processors is not as torch does.
    """
    side = PRODUCT_SIDE
    a, b = (torch.randn(side, side, device=device, dtype=sizes.dtype) for _ in range(2))
    out = torch.empty_like(a)
    return (lambda: product(a, b)) if fastest else (lambda: torch.mm(a, b, out=out))


def _images(sizes: StepSizes, device: str) -> Tensor:
    side = sizes.model.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sizes.batch, 3, side, side, generator=generator).to(device, sizes.dtype)


def _direction(sizes: StepSizes, device: str) -> Tensor:
    return torch.randn(sizes.model.width, generator=torch.Generator().manual_seed(1)).to(device)


def _visible(sizes: StepSizes, device: str, regions: int) -> Tensor:
    """Regions of about a quarter of the image, [B, N, P]."""
    grid = sizes.model.grid
    visible = torch.zeros(sizes.batch, regions, grid, grid, dtype=torch.bool)
    for n in range(regions):
        first = n * grid // (2 * max(1, regions))
        visible[:, n, first : first + grid // 2, first : first + grid // 2] = True
    return visible.flatten(2).to(device)


def our_model(sizes: StepSizes, device: str, backward: bool, compiled: bool = False) -> Work:
    """Our transformer alone: forward, or forward and backward."""
    from megaregion.models.initialisation import initial_value

    model = Pooled(sizes.model, False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, sizes.model, 0))
    model = model.to(device, sizes.dtype)
    if compiled:
        for block in model.vit.blocks:
            block.compile()
    return _passes(model, model, _images(sizes, device), backward)


def peer_model(sizes: StepSizes, device: str, backward: bool, compiled: bool = False) -> Work:
    """Transformers' MLCDVisionModel alone: forward, or forward and backward."""
    from transformers import MLCDVisionConfig, MLCDVisionModel

    from megaregion.export.layouts import mlcd_config

    torch.manual_seed(0)
    built = MLCDVisionModel(MLCDVisionConfig(**mlcd_config(sizes.model, sizes.dtype)))
    model = built.to(device, sizes.dtype).train()
    forward: Any = torch.compile(model) if compiled else model
    return _passes(
        model, lambda images: forward(pixel_values=images).pooler_output, _images(sizes, device), backward
    )


def _passes(model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, backward: bool) -> Work:
    def infer() -> None:
        with torch.inference_mode():
            forward(images)

    def learn() -> None:
        forward(images).float().square().sum().backward()
        model.zero_grad()

    return learn if backward else infer
