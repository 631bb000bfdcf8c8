"""The body under DeepSpeed ZeRO: backward, one global clip, step.

DeepSpeed owns everything between a loss and the updated body: bf16 copies and fp32 masters, reduction over
the data ranks (it averages, see heads/), partitioning by stage. The gradient norm is joined with that of
the heads, which live outside the engine, so that both are clipped by one coefficient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaregion.config import RunConfig
from megaregion.parallel.tensor_parallel import Placement
from megaregion.parallel.topology import Topology
from megaregion.parallel.zero.setup import deepspeed_config, effective_stage, start_engine
from megaregion.parallel.zero.state import ZeroState


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
        reducing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Wrap the model.

        Args:
            model: The body, already cut by tensor parallelism.
            placements: Place of every parameter in the full model.
            config: The run.
            topology: This rank's place.
            decays: Whether a named parameter has weight decay.
            heads_norm_squared: Squared gradient norm of all heads over all ranks; joined into the clip norm.
            reducing: Opened around what is left of the gradients' reduction behind a backward pass.
        """
        self.placements = dict(placements)
        self.stage = effective_stage(config, topology.data_size)
        self._clip_norm = config.optimizer.clip_norm
        self._heads_norm_squared = heads_norm_squared
        self._topology = topology
        self._settings = deepspeed_config(config, topology.data_size)
        self._engine, self._optimizer = start_engine(model, config, topology, decays, self._settings)
        self._parameters = dict(self._engine.module.named_parameters())
        self.state = ZeroState(self.stage, self._optimizer, self._parameters, self.placements, topology)
        self._accept: Callable[[Tensor], bool] | None = None
        self._refused: Tensor | None = None
        self._join_norms()
        self._time_reduction(reducing)

    @property
    def settings(self) -> dict[str, Any]:
        """DeepSpeed's settings as passed to it."""
        return self._settings

    def __call__(self, *inputs: Any) -> Any:
        """Forward pass of the body."""
        if self.stage == 3:
            self._make_small_whole()
        return self._engine(*inputs)

    def _make_small_whole(self) -> None:
        """Gather the small parameters that DeepSpeed's stage 3 keeps whole, where it does not yet.

        Until it has seen the order of the modules it takes them apart as well, and what is lent to many
        modules at once (parallel/partial.py) must be there when a forward pass begins.
        """
        small = self._optimizer.persistent_parameters
        if missing := [parameter for parameter in small if parameter.data.numel() != parameter.ds_numel]:
            missing[0].all_gather(missing)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate gradients of a loss that is already divided by the whole global batch.

        Args:
            loss: The loss of a micro-step.
            last: Whether :meth:`step` then updates the body: it is the step's last micro-step.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    @property
    def took_step(self) -> bool:
        """Whether the last boundary updated the body; False if it was refused or its norm not finite."""
        return self._refused is None and not getattr(self._optimizer, "overflow", False)

    def step(self, lr: float, accept: Callable[[Tensor], bool] | None = None) -> Tensor | None:
        """End a micro-step; clip and update if it is the step's last.

        Args:
            lr: Learning rate of this step.
            accept: Asked once at the boundary, on every rank, with the norm, before anything is updated; if
                it says no, the gradients are dropped and neither parameter nor moment changes.

        Returns:
            After the last the global gradient norm over body and heads, before clipping, 0-d; else None.
        """
        self._accept, self._refused = accept, None
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        boundary = self._engine.is_gradient_accumulation_boundary()
        norm = self._clip_plain_gradients() if boundary and self.stage == 0 else None
        self._engine.step()
        if not boundary:
            return None
        if self._refused is not None:
            norm = self._refused
        elif norm is None:
            norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._topology.device)

    def clip_coefficient(self, norm: Tensor) -> Tensor:
        """Factor by which a gradient of this global norm is scaled, 0-d, at most 1."""
        if self._clip_norm == 0:
            return torch.ones_like(norm)
        return 1.0 / torch.clamp((norm + 1e-6) / self._clip_norm, min=1.0)

    def _time_reduction(self, reducing: Callable[[], AbstractContextManager[None]]) -> None:
        reduce = self._engine.allreduce_gradients
        if self.stage == 0 and self._topology.data_size == 1:
            # DeepSpeed would copy all gradients into one buffer and back, for nobody: a tenth of a step.
            self._engine.allreduce_gradients = lambda *arguments, **named: None
            return

        def timed(*arguments: Any, **named: Any) -> None:
            with reducing():
                reduce(*arguments, **named)

        self._engine.allreduce_gradients = timed

    def _join_norms(self) -> None:
        """Add the heads' norm to the one by which DeepSpeed clips, and ask there whether to go on.

        DeepSpeed drops a step whose norm is not finite, with all it has gathered; a refused step takes the
        same way. Its own search for overflow is left out: the norm finds the same.
        """
        if self.stage in (1, 2):
            body_norm = self._optimizer.scaled_global_norm
            self._optimizer.check_overflow = lambda partition_gradients=True: None
            self._optimizer.scaled_global_norm = lambda norm_type=2: self._asked(
                torch.hypot(body_norm(norm_type), self._heads_norm_squared().sqrt())
            )
        elif self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            body_norms = self._optimizer._get_norm_groups

            def norms() -> list[Tensor]:
                groups = [*body_norms(), self._heads_norm_squared().sqrt()]
                self._asked(combine_grad_norm_groups(groups))
                return groups if self._refused is None else [torch.full_like(self._refused, torch.inf)]

            self._optimizer._get_norm_groups = norms

    def _asked(self, norm: Tensor) -> Tensor:
        """The norm, or infinity if the step is refused."""
        if self._accept is None or self._accept(norm):
            return norm
        self._refused = norm.float()
        return torch.full_like(norm, torch.inf)

    def _clip_plain_gradients(self) -> Tensor:
        """Stage 0: the same clip on ordinary gradients, which AdamW scales as it reads them."""
        gradients = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        whole: list[Tensor] = []
        cut: list[Tensor] = []
        for name, gradient in gradients.items():
            place = self.placements[name]
            (whole if place.shape == place.full_shape else cut).append(gradient)
        of_cut = self._norm_squared(cut)
        dist.all_reduce(of_cut, group=self._topology.tensor_group)
        norm = (of_cut + self._norm_squared(whole) + self._heads_norm_squared()).sqrt()
        self._asked(norm)
        if self._refused is not None:
            for parameter in self._parameters.values():
                parameter.grad = None
        # AdamW divides by it; a pass of its own over all gradients would cost a third of the update.
        self._optimizer.grad_scale = 1.0 / self.clip_coefficient(norm)
        self._optimizer.found_inf = torch.zeros_like(norm)
        return norm

    def _norm_squared(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=self._topology.device)
        if self._topology.device.type == "cpu":
            # Half the time of torch's norm there, and a rounding error that is 60 times smaller.
            return torch.stack([torch.dot(flat, flat) for flat in map(torch.ravel, gradients)]).sum()
        return torch.stack(torch._foreach_norm(gradients)).square().sum()
