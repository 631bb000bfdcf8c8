"""The body under DeepSpeed ZeRO: backward, one global clip, step, and its state as full tensors.

DeepSpeed owns everything between a loss and the updated body: bf16 copies and fp32 masters, reduction over
the data ranks (it averages, see heads/), partitioning by stage. This file is the only one that imports
it. Two things are ours: the gradient norm is joined with that of the heads, which live outside the
engine, so that both are clipped by one coefficient; and state is read and written as whole tensors of
one tensor rank (a :class:`Placement` says where they lie), so any stage and any number of data ranks
can go on from any other.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaregion.config import RunConfig, accumulation
from megaregion.parallel.tensor_parallel import Placement
from megaregion.parallel.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Optimizer state kept per parameter."""


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


def deepspeed_config(config: RunConfig, data_ranks: int) -> dict[str, Any]:
    """DeepSpeed's settings, derived from ours; nobody writes them by hand.

    Args:
        config: The run.
        data_ranks: Copies of the model; micro-batches of one step follow from it.
    """
    micro_steps = accumulation(config, data_ranks)
    bf16 = config.train.precision == "bf16"
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.global_batch // data_ranks // micro_steps,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16} if bf16 else {"enabled": False},
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            # Small parameters stay whole in stage 3: gathering a layer norm costs more than keeping it.
            "stage3_param_persistence_threshold": 10_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }


class ZeroEngine:
    """The body, its optimizer and its gradients under one ZeRO stage."""

    def __init__(
        self,
        model: nn.Module,
        placements: Mapping[str, Placement],
        config: RunConfig,
        topology: Topology,
        decays: Callable[[str, nn.Parameter], bool],
        heads_norm_squared: Callable[[], Tensor],
    ) -> None:
        """Wrap the model.

        Args:
            model: The body, already cut by tensor parallelism.
            placements: Place of every parameter in the full model.
            config: The run.
            topology: This rank's place.
            decays: Whether a named parameter has weight decay.
            heads_norm_squared: Squared gradient norm of all heads over all ranks; joined into the clip norm.
        """
        self.placements = dict(placements)
        self.stage = config.parallel.zero_stage
        self._clip_norm = config.optimizer.clip_norm
        self._heads_norm_squared = heads_norm_squared
        self._topology = topology
        self._settings = deepspeed_config(config, topology.data_size)
        self._engine, self._optimizer = _initialize(model, config, topology, decays, self._settings)
        self._parameters = dict(self._engine.module.named_parameters())
        self._join_norms()
        self._make_moments(0)

    @property
    def settings(self) -> dict[str, Any]:
        """DeepSpeed's settings as passed to it."""
        return self._settings

    def __call__(self, *inputs: Any) -> Any:
        """Forward pass of the body."""
        return self._engine(*inputs)

    def train(self, mode: bool = True) -> None:
        """Switch the body between training and evaluation."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a loss that is already divided by the whole global batch."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor | None:
        """End a micro-step; at the accumulation boundary clip and update.

        Args:
            lr: Learning rate of this step.

        Returns:
            At the boundary the global gradient norm over body and heads, before clipping, 0-d; else None.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        boundary = self._engine.is_gradient_accumulation_boundary()
        norm = self._clip_plain_gradients() if boundary and self.stage == 0 else None
        self._engine.step()
        if not boundary:
            return None
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._topology.device)

    def clip_coefficient(self, norm: Tensor) -> Tensor:
        """Factor by which a gradient of this global norm is scaled, 0-d, at most 1."""
        if self._clip_norm == 0:
            return torch.ones_like(norm)
        return 1.0 / torch.clamp((norm + 1e-6) / self._clip_norm, min=1.0)

    def gathered(self, names: Iterable[str] | None = None) -> Any:
        """Context in which this rank can read whole parameters (a stage 3 body is scattered otherwise)."""
        import deepspeed

        parameters = [self._parameters[n] for n in names] if names else list(self._parameters.values())
        return deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3)

    def state(self) -> Iterator[tuple[str, Placement, Tensor]]:
        """Every tensor of the training state of this tensor rank, one at a time; a collective.

        Yields:
            Name ("weight.NAME", "exp_avg.NAME", "exp_avg_sq.NAME"), place in the full tensor, fp32 value.
        """
        for name, parameter in self._parameters.items():
            place = self.placements[name]
            yield f"weight.{name}", place, self._full(parameter, None).view(place.shape)
            for key in MOMENTS:
                yield f"{key}.{name}", place, self._full(parameter, key).view(place.shape)

    def load(self, read: Callable[[str, Placement], Tensor], step: int) -> None:
        """Put back what :meth:`state` gave, on any stage and any number of ranks; a collective.

        Args:
            read: Returns the fp32 value of a named tensor at a place.
            step: Optimizer steps taken so far (AdamW's bias correction).
        """
        self._make_moments(step)
        for name, parameter in self._parameters.items():
            place = self.placements[name]
            value = read(f"weight.{name}", place).to(self._topology.device)
            self._set(parameter, value, None)
            self._refresh(parameter, value)
            for key in MOMENTS:
                self._set(parameter, read(f"{key}.{name}", place).to(self._topology.device), key)

    def _full(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return parameter.data if key is None else self._optimizer.state[parameter][key]
        if key is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.stage == 0:
            self._full(parameter, key).copy_(value)
        elif self.stage == 3:
            # The full-tensor setters of stage 3 fail on sizes that the data ranks do not divide.
            part = self._own_part(parameter, value)
            if key is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _refresh(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Copy a new master into the model's own (perhaps bf16, perhaps scattered) parameter."""
        if self.stage == 3:
            parameter.ds_tensor.data.copy_(self._own_part(parameter, value))  # type: ignore[attr-defined]
        if parameter.data.numel() == value.numel():
            # In stage 3 these are the small ones, which DeepSpeed keeps whole between steps.
            parameter.data.copy_(value)

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This data rank's slice of a flattened stage 3 parameter, padded as DeepSpeed pads it."""
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = value.new_zeros(length * self._topology.data_size)
        padded[: value.numel()] = value.flatten()
        return padded.narrow(0, length * self._topology.data_rank, length)

    def _make_moments(self, step: int) -> None:
        """Create AdamW's state, all zero.

        Left to itself AdamW makes it in its first step. DeepSpeed would then link only the first parameter
        group's state to the parameters (0.19.8), and there would be nothing to load into.
        """
        optimizer = self._optimizer if self.stage == 0 else self._optimizer.optimizer
        for group in self._flat_groups():
            for master in group:
                optimizer.state[master] = {
                    "step": torch.tensor(float(step), dtype=torch.float32, device=master.device),
                    **{key: torch.zeros_like(master) for key in MOMENTS},
                }
        if self.stage in (1, 2):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_groups(self) -> list[list[Tensor]]:
        if self.stage == 0:
            return [list(group["params"]) for group in self._optimizer.param_groups]
        if self.stage == 3:
            return [list(self._optimizer.fp32_partitioned_groups_flat)]
        return [list(self._optimizer.single_partition_of_fp32_groups)]

    def _join_norms(self) -> None:
        """Add the heads' norm to the one by which DeepSpeed clips."""
        if self.stage in (1, 2):
            body_norm = self._optimizer.scaled_global_norm
            self._optimizer.scaled_global_norm = lambda norm_type=2: torch.hypot(
                body_norm(norm_type), self._heads_norm_squared().sqrt()
            )
        elif self.stage == 3:
            body_norms = self._optimizer._get_norm_groups
            self._optimizer._get_norm_groups = lambda: [*body_norms(), self._heads_norm_squared().sqrt()]

    def _clip_plain_gradients(self) -> Tensor:
        """Stage 0: the same clip on ordinary gradients."""
        gradients = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        cut = torch.zeros((), device=self._topology.device)
        whole = torch.zeros((), device=self._topology.device)
        for name, gradient in gradients.items():
            place = self.placements[name]
            square = gradient.float().pow(2).sum()
            if place.shape == place.full_shape:
                whole += square
            else:
                cut += square
        dist.all_reduce(cut, group=self._topology.tensor_group)
        norm = (cut + whole + self._heads_norm_squared()).sqrt()
        for gradient in gradients.values():
            gradient.mul_(self.clip_coefficient(norm))
        return norm


def _initialize(
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
    engine, wrapped, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={**settings, "gradient_clipping": 0.0} if config.parallel.zero_stage == 0 else settings,
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
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if device.type == "cpu":
        # Its shared-memory all-reduce would be compiled for a minute at the first start.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
