"""Whether settings of a run fit each other and the number of ranks, and how ranks share a step's batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaregion.config import ModelConfig, RunConfig, StageConfig
from megaregion.errors import UserError
from megaregion.settings import check


def check_config(config: RunConfig) -> None:
    """Check every setting that can be judged without data or ranks.

    Raises:
        UserError: A value is out of bounds or contradicts another; the text says which.
    """
    check(config)
    check_model(config.model, config.parallel.tensor)
    for key in ("crop_scale", "crop_ratio"):
        low, high = getattr(config.data, key)
        if low > high:
            raise UserError(f"data.{key} must be two rising values, got {low} and {high}; swap them")
    if config.parallel.zero_stage == 0 and config.train.bf16:
        raise UserError(
            "parallel.zero_stage 0 with train.precision bf16 is refused: DeepSpeed takes a wrong "
            "first Adam step there and misses tensor-parallel gradient norms; use zero_stage 1 or fp32"
        )
    if config.parallel.zero_stage == 3 and config.optimizer.name == "muon":
        raise UserError(
            "optimizer.name muon needs parallel.zero_stage 0, 1 or 2, got 3, whose masters lie in pieces of "
            "their own; use zero_stage 1, or optimizer.name adamw"
        )
    if config.optimizer.name == "muon":
        _check_multiple("model.width", config.model.width, "optimizer.name muon's", 8)
    if config.train.fp8 and not (config.train.bf16 and config.parallel.tensor == 1):
        raise UserError(
            f"train.fp8 needs train.precision bf16 and parallel.tensor 1, got {config.train.precision} and "
            f"{config.parallel.tensor}; megatron's cut linears multiply in bf16"
        )
    if config.distill.teacher and config.data.packing == "native":
        raise UserError(
            "distill.teacher needs data.packing square, got native: a teacher sees images of one size; use "
            "square, or leave distill.teacher empty"
        )
    if config.optimizer.warmup_steps > config.train.steps:
        raise UserError(
            f"optimizer.warmup_steps must lie in [0, train.steps = {config.train.steps}], "
            f"got {config.optimizer.warmup_steps}"
        )
    if config.head.text.near_classes:
        raise UserError(
            f"head.text.near_classes must be 0, got {config.head.text.near_classes}: tokens have no centers"
        )
    evaluate = config.evaluate
    _check_multiple("evaluate.every", evaluate.every, "checkpoint.every", config.checkpoint.every)
    if evaluate.every and not evaluate.scenes:
        raise UserError(
            f"evaluate.every is {evaluate.every}, but evaluate.scenes names no scene set; make one with "
            "tools/make_scenes.py, or set evaluate.every 0"
        )
    _check_stages(config)


def _check_stages(config: RunConfig) -> None:
    before = 0
    for number, stage in enumerate(config.stages):
        key, batch = f"stages[{number}]", config.train.global_batch
        if stage.from_image <= before or stage.from_image % batch:
            raise UserError(
                f"{key}.from_image must be a multiple of train.global_batch {batch} above {before}, got "
                f"{stage.from_image}; use {max(before // batch + 1, round(stage.from_image / batch)) * batch}"
            )
        before = stage.from_image
        _check_multiple(f"{key}.image_size", stage.image_size, "model.patch_size", config.model.patch_size)


def check_model(model: ModelConfig, tensor: int) -> None:
    """Check the transformer's sizes.

    Raises:
        UserError: One is out of range or contradicts another.
    """
    check(model, "model")
    _check_multiple("model.image_size", model.image_size, "model.patch_size", model.patch_size)
    if model.width % model.heads or model.head_dim % 4:
        raise UserError(
            f"model.heads must divide model.width {model.width} into heads whose width is a multiple "
            f"of 4 (2D rotary pairs), got {model.heads}"
        )
    if model.heads % tensor:
        raise UserError(
            f"parallel.tensor must divide model.heads {model.heads}, got {tensor}; "
            f"use one of {', '.join(map(str, divisors(model.heads)))}"
        )
    if model.mlp_width % tensor:
        raise UserError(f"parallel.tensor must divide model.mlp_width {model.mlp_width}, got {tensor}")
    if model.region_layers > model.depth:
        raise UserError(
            f"model.region_layers must lie in [1, model.depth = {model.depth}], got {model.region_layers}"
        )


def _check_multiple(key: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        near = max(1, round(value / unit)) * unit
        raise UserError(f"{key} must be a multiple of {of} {unit}, got {value}; use {near}")


@dataclass(frozen=True)
class Batching:
    """How one data-parallel rank takes its share of a step's global batch."""

    micro_batch: int
    """Images that the rank passes through the model at once."""
    micro_steps: int
    """How often it does so before the optimizer moves."""
    draw_images: int
    """Images, over all data ranks, that share one draw of negatives."""


def batching(config: RunConfig, data_ranks: int, stage: StageConfig | None = None) -> Batching:
    """Divide the global batch, which is the same on any number of ranks, at a resolution, the first if None.

    Where the wanted micro-batch does not divide a rank's share of it, the next smaller number of images that
    does is taken.

    Raises:
        UserError: The global batch cannot be spread over the ranks, or no micro-batch fits head.draw_images.
    """
    batch, heads = config.train.global_batch, tuple(config.head.by_kind.values())
    # A draw of all classes is the same for any images that share it.
    drawn = config.head.draw_images if min(head.sample_rate for head in heads) < 1 else 0
    most = (stage.micro_batch if stage else 0) or config.train.micro_batch
    if batch % data_ranks:
        raise UserError(
            f"train.global_batch must be a multiple of the {data_ranks} data-parallel ranks, got "
            f"{batch}; data-parallel sizes that work: {', '.join(map(str, divisors(batch)[:24]))}"
        )
    images = batch // data_ranks
    fitting = [d for d in divisors(images) if d <= most and (not drawn or d * data_ranks % drawn == 0)]
    if not fitting:
        micro_step = _largest_divisor(images, most) * data_ranks
        raise UserError(
            f"head.draw_images must divide the {micro_step} images of a micro-step over all "
            f"{data_ranks} data-parallel ranks, got {drawn}; use {_largest_divisor(micro_step, drawn)}"
        )
    return Batching(fitting[-1], images // fitting[-1], drawn or fitting[-1] * data_ranks)


def check_batching(config: RunConfig, data_ranks: int) -> None:
    """Check that the global batch can be divided at every resolution of the run.

    Raises:
        UserError: As :func:`batching`.
    """
    for stage in (None, *config.stages):
        batching(config, data_ranks, stage)


def fitting_nodes(config: RunConfig, nodes: int, ranks_per_node: int) -> int:
    """The most nodes, of those of the allocation, on which this run can go on with the same global batch.

    Raises:
        UserError: Not even one node fits; the text is that of the whole allocation.
    """
    refusal = None
    for count in range(nodes, 0, -1):
        ranks = count * ranks_per_node
        try:
            if ranks % config.parallel.tensor:
                raise UserError(
                    f"parallel.tensor must divide the number of ranks {ranks}, got {config.parallel.tensor}"
                )
            check_batching(config, ranks // config.parallel.tensor)
        except UserError as error:
            refusal = refusal or error
        else:
            return count
    raise refusal or UserError(f"--fit-nodes must be at least 1, got {nodes}")


def divisors(number: int) -> list[int]:
    """All divisors, rising."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in divisors(number) if d <= max(1, limit))
