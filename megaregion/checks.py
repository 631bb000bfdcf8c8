"""Whether settings are in range and fit each other; whatever can be judged without data or ranks."""

from __future__ import annotations

import math

from megaregion.batching import divisors
from megaregion.config import DataConfig, HeadConfig, MachinesConfig, ModelConfig, RunConfig
from megaregion.errors import UserError


def check_config(config: RunConfig) -> None:
    """Check every setting that can be judged without data or ranks.

    Raises:
        UserError: A value is out of range or contradicts another; the text says which.
    """
    check_model(config.model, config.parallel.tensor)
    _check_data(config.data)
    for kind, head in (("object", config.head.object), ("text", config.head.text)):
        _check_head(f"head.{kind}", head)
    for key, value in (
        ("head.embedding_dim", config.head.embedding_dim),
        ("head.chunk_bytes", config.head.chunk_bytes),
        ("head.idle_steps", config.head.idle_steps),
        ("train.steps", config.train.steps),
        ("train.global_batch", config.train.global_batch),
        ("train.micro_batch", config.train.micro_batch),
        ("train.log_every", config.train.log_every),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep_last", config.checkpoint.keep_last),
        ("guard.window", config.guard.window),
        ("guard.rollback_after", config.guard.rollback_after),
    ):
        if value < 1:
            raise UserError(f"{key} must be at least 1, got {value}")
    if not 0 <= config.train.activation_gib < math.inf:
        raise UserError(
            f"train.activation_gib must be 0 (no bound) or more, got {config.train.activation_gib}"
        )
    if config.head.census_every < 0:
        raise UserError(f"head.census_every must be 0 or more, got {config.head.census_every}")
    for key in ("keep_every", "keep_best"):
        if getattr(config.checkpoint, key) < 0:
            raise UserError(
                f"checkpoint.{key} must be 0 (off) or more, got {getattr(config.checkpoint, key)}"
            )
    if config.train.slow_factor != 0 and not 1 < config.train.slow_factor < math.inf:
        raise UserError(f"train.slow_factor must be 0 (off) or above 1, got {config.train.slow_factor}")
    if not 0 <= config.train.watchdog_seconds < math.inf:
        raise UserError(
            "train.watchdog_seconds must be 0 (off) or a number of seconds, "
            f"got {config.train.watchdog_seconds}"
        )
    if config.parallel.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"parallel.zero_stage must be 0, 1, 2 or 3, got {config.parallel.zero_stage}")
    if config.parallel.zero_stage == 0 and config.train.precision == "bf16":
        raise UserError(
            "parallel.zero_stage 0 with train.precision bf16 is refused: DeepSpeed takes a wrong "
            "first Adam step there and misses tensor-parallel gradient norms; use zero_stage 1 or fp32"
        )
    if config.train.fp8 and (config.train.precision != "bf16" or config.parallel.tensor > 1):
        raise UserError(
            f"train.fp8 needs train.precision bf16 and parallel.tensor 1, got {config.train.precision} and "
            f"{config.parallel.tensor}; megatron's cut linears multiply in bf16"
        )
    for key, least in (("spike", config.guard.spike), ("max_rollbacks", config.guard.max_rollbacks)):
        if not 0 <= least < math.inf:
            raise UserError(f"guard.{key} must be a number of at least 0, got {least}")
    _check_evaluate(config)
    _check_machines(config.machines)
    _check_stages(config)
    _check_optimizer(config)


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
        if stage.micro_batch < 0:
            raise UserError(
                f"{key}.micro_batch must be 0 (train.micro_batch) or more, got {stage.micro_batch}"
            )
        if not 0 < stage.lr_scale < math.inf:
            raise UserError(f"{key}.lr_scale must be positive, got {stage.lr_scale}")
        if stage.image_size < 1 or stage.image_size % config.model.patch_size:
            near = max(1, round(stage.image_size / config.model.patch_size)) * config.model.patch_size
            raise UserError(
                f"{key}.image_size must be a multiple of model.patch_size {config.model.patch_size}, got "
                f"{stage.image_size}; use {near}"
            )


def _check_machines(machines: MachinesConfig) -> None:
    if machines.slow_factor != 0 and not 1 < machines.slow_factor < math.inf:
        raise UserError(f"machines.slow_factor must be 0 (off) or above 1, got {machines.slow_factor}")
    for key in ("inside_gbytes", "across_gbytes", "clock_skew", "free_checkpoints"):
        if not 0 <= getattr(machines, key) < math.inf:
            raise UserError(f"machines.{key} must be a number of at least 0, got {getattr(machines, key)}")


def check_model(model: ModelConfig, tensor: int) -> None:
    """Check the transformer's sizes.

    Raises:
        UserError: One is out of range or contradicts another.
    """
    for key in ("image_size", "patch_size", "width", "depth", "heads", "mlp_width"):
        if getattr(model, key) < 1:
            raise UserError(f"model.{key} must be at least 1, got {getattr(model, key)}")
    if model.image_size % model.patch_size:
        near = max(1, round(model.image_size / model.patch_size)) * model.patch_size
        raise UserError(
            f"model.image_size must be a multiple of model.patch_size {model.patch_size}, "
            f"got {model.image_size}; use {near}"
        )
    if model.width % model.heads or model.head_dim % 4:
        raise UserError(
            f"model.heads must divide model.width {model.width} into heads whose width is a multiple "
            f"of 4 (2D rotary pairs), got {model.heads}"
        )
    if tensor < 1 or model.heads % tensor:
        raise UserError(
            f"parallel.tensor must divide model.heads {model.heads}, got {tensor}; "
            f"use one of {', '.join(map(str, divisors(model.heads)))}"
        )
    if model.mlp_width % tensor:
        raise UserError(f"parallel.tensor must divide model.mlp_width {model.mlp_width}, got {tensor}")
    if not 1 <= model.region_layers <= model.depth:
        raise UserError(
            f"model.region_layers must lie in [1, model.depth = {model.depth}], got {model.region_layers}"
        )


def _check_data(data: DataConfig) -> None:
    for key in ("regions_per_image", "max_text_tokens", "prefetch", "window_shards", "cache_bytes"):
        if getattr(data, key) < 1:
            raise UserError(f"data.{key} must be at least 1, got {getattr(data, key)}")
    if data.read_retries < 0:
        raise UserError(f"data.read_retries must be 0 or more, got {data.read_retries}")
    if not 0 <= data.read_pause < math.inf:
        raise UserError(f"data.read_pause must be a number of seconds, got {data.read_pause}")
    if data.workers < 0:
        raise UserError(f"data.workers must be 0 or more, got {data.workers}")
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"data.crop_scale must be two rising values in (0, 1], got {low}, {high}")
    low, high = data.crop_ratio
    if not 0 < low <= high:
        raise UserError(f"data.crop_ratio must be two rising positive values, got {low}, {high}")
    for key in ("flip", "min_visible", "patch_coverage", "max_bad_share", "color_jitter"):
        if not 0 <= getattr(data, key) <= 1:
            raise UserError(f"data.{key} must lie in [0, 1], got {getattr(data, key)}")


def _check_head(key: str, head: HeadConfig) -> None:
    if not 0 < head.sample_rate <= 1:
        raise UserError(
            f"{key}.sample_rate must lie in (0, 1], got {head.sample_rate}; use 1.0 to score every class"
        )
    if head.min_negatives < 0:
        raise UserError(f"{key}.min_negatives must be 0 or more, got {head.min_negatives}")
    if head.scale <= 0 or not math.isfinite(head.scale):
        raise UserError(f"{key}.scale must be a positive number, got {head.scale}")
    if not 0 <= head.margin < 1:
        raise UserError(f"{key}.margin must lie in [0, 1), got {head.margin}")
    if head.weight < 0:
        raise UserError(f"{key}.weight must be 0 or more, got {head.weight}")


def _check_evaluate(config: RunConfig) -> None:
    evaluate, saves = config.evaluate, config.checkpoint.every
    for key, least in (("every", 0), ("limit", 0), ("threads", 1)):
        if getattr(evaluate, key) < least:
            raise UserError(f"evaluate.{key} must be at least {least}, got {getattr(evaluate, key)}")
    if evaluate.every % saves:
        nearest = max(1, round(evaluate.every / saves)) * saves
        raise UserError(
            f"evaluate.every must be a multiple of checkpoint.every {saves}, got {evaluate.every}; "
            f"use {nearest}"
        )
    if evaluate.every and not evaluate.scenes:
        raise UserError(
            f"evaluate.every is {evaluate.every}, but evaluate.scenes names no scene set; make one with "
            "tools/make_scenes.py, or set evaluate.every 0"
        )


def _check_optimizer(config: RunConfig) -> None:
    optimizer = config.optimizer
    if optimizer.lr <= 0:
        raise UserError(f"optimizer.lr must be positive, got {optimizer.lr}")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, key) < 1:
            raise UserError(f"optimizer.{key} must lie in [0, 1), got {getattr(optimizer, key)}")
    for key in ("weight_decay", "head_weight_decay", "clip_norm", "eps"):
        if getattr(optimizer, key) < 0:
            raise UserError(f"optimizer.{key} must be 0 or more, got {getattr(optimizer, key)}")
    if not 0 <= optimizer.warmup_steps <= config.train.steps:
        raise UserError(
            f"optimizer.warmup_steps must lie in [0, train.steps = {config.train.steps}], "
            f"got {optimizer.warmup_steps}"
        )
