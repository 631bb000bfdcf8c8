"""Whether settings of a run fit each other, as far as that can be judged without data or ranks."""

from __future__ import annotations

from megaregion.batching import divisors
from megaregion.config import DataConfig, ModelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.settings import check


def check_config(config: RunConfig) -> None:
    """Check every setting that can be judged without data or ranks.

    Raises:
        UserError: A value is out of bounds or contradicts another; the text says which.
    """
    check(config)
    check_model(config.model, config.parallel.tensor)
    _check_crops(config.data)
    if config.parallel.zero_stage == 0 and config.train.bf16:
        raise UserError(
            "parallel.zero_stage 0 with train.precision bf16 is refused: DeepSpeed takes a wrong "
            "first Adam step there and misses tensor-parallel gradient norms; use zero_stage 1 or fp32"
        )
    if config.train.fp8 and not (config.train.bf16 and config.parallel.tensor == 1):
        raise UserError(
            f"train.fp8 needs train.precision bf16 and parallel.tensor 1, got {config.train.precision} and "
            f"{config.parallel.tensor}; megatron's cut linears multiply in bf16"
        )
    if config.optimizer.warmup_steps > config.train.steps:
        raise UserError(
            f"optimizer.warmup_steps must lie in [0, train.steps = {config.train.steps}], "
            f"got {config.optimizer.warmup_steps}"
        )
    _check_evaluate(config)
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


def _check_crops(data: DataConfig) -> None:
    for key in ("crop_scale", "crop_ratio"):
        low, high = getattr(data, key)
        if low > high:
            raise UserError(f"data.{key} must be two rising values, got {low} and {high}; swap them")


def _check_evaluate(config: RunConfig) -> None:
    evaluate = config.evaluate
    _check_multiple("evaluate.every", evaluate.every, "checkpoint.every", config.checkpoint.every)
    if evaluate.every and not evaluate.scenes:
        raise UserError(
            f"evaluate.every is {evaluate.every}, but evaluate.scenes names no scene set; make one with "
            "tools/make_scenes.py, or set evaluate.every 0"
        )


def _check_multiple(key: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        near = max(1, round(value / unit)) * unit
        raise UserError(f"{key} must be a multiple of {of} {unit}, got {value}; use {near}")
