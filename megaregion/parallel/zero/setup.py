"""DeepSpeed's engine around a model: its settings, its process groups, its start on a CPU or a GPU."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megaregion.batching import batching
from megaregion.config import RunConfig
from megaregion.parallel.topology import Topology

REDUCE_BUCKET = 50_000_000
"""Elements of gradients that are reduced together; DeepSpeed's own 500 million hold all of a ViT-L, whose
reduction would then begin when the backward pass is over."""


class _ModelParallelUnit:
    """The interface that DeepSpeed asks for process groups; a missing one only makes the loss wrong."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_model_parallel_rank(self) -> int:
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tensor_size

    def get_model_parallel_group(self) -> Any:
        return self._topology.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._topology.data_rank * self._topology.tensor_size

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data_size

    def get_data_parallel_group(self) -> Any:
        return self._topology.data_group


def effective_stage(config: RunConfig, data_ranks: int) -> int:
    """The ZeRO stage that runs: a single copy of the model has nobody to share its state with.

    ZeRO would then only copy it: parameters into masters and back, gradients into buffers. In bf16 it stays,
    for it keeps the fp32 masters.
    """
    alone = data_ranks == 1 and config.train.precision == "fp32"
    return 0 if alone else config.parallel.zero_stage


def deepspeed_config(config: RunConfig, data_ranks: int) -> dict[str, Any]:
    """DeepSpeed's settings, derived from ours; nobody writes them by hand.

    Args:
        config: The run.
        data_ranks: Copies of the model; micro-batches of one step follow from it.
    """
    cut = batching(config, data_ranks)
    bf16 = config.train.precision == "bf16"
    return {
        "train_batch_size": config.train.global_batch,
        # Those of the first resolution; the engine is told with each micro-step which is a step's last.
        "train_micro_batch_size_per_gpu": cut.micro_batch,
        "gradient_accumulation_steps": cut.micro_steps,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16} if bf16 else {"enabled": False},
        "zero_optimization": {
            "stage": effective_stage(config, data_ranks),
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": REDUCE_BUCKET,
            # Small parameters stay whole in stage 3: gathering a layer norm costs more than keeping it.
            "stage3_param_persistence_threshold": 10_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }


def start_engine(
    model: nn.Module,
    config: RunConfig,
    topology: Topology,
    decays: Callable[[str, nn.Parameter], bool],
    settings: dict[str, Any],
) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer around the model."""
    _prepare_deepspeed(topology.device)
    import deepspeed

    if config.train.precision == "bf16":
        model = model.to(torch.bfloat16)
    named = list(model.named_parameters())
    groups = [
        {
            "params": [p for n, p in named if decays(n, p)],
            "weight_decay": config.optimizer.weight_decay,
        },
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.optimizer.lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        fused=True,
    )
    plain = effective_stage(config, topology.data_size) == 0
    engine, wrapped, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={**settings, "gradient_clipping": 0.0} if plain else settings,
        mpu=_ModelParallelUnit(topology),
        dist_init_required=False,
    )
    return engine, wrapped


def _prepare_deepspeed(device: torch.device) -> None:
    """Tell DeepSpeed which device it runs on, and keep it from compiling what is not needed."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    # DeepSpeed insists on it; srun and plain python do not set it.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # It calls collectives by names that torch 2.13 warns about at every step of every rank.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if device.type == "cpu":
        # Its shared-memory all-reduce would be compiled for a minute at the first start.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
