"""DeepSpeed's optimizers, one adapter a ZeRO stage: where norms, masters and moments lie.

DeepSpeed has no public way to join other gradients' norm to its own, nor to set a state that a checkpoint of
another topology holds. Each adapter names the private parts that it uses. They were read in VERSION; another
version is refused at start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaregion.errors import UserError
from megaregion.parallel.tensor_parallel import Placement
from megaregion.parallel.topology import Topology

VERSION = "0.19.8"
"""Of DeepSpeed, whose private parts these are."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Optimizer state kept per parameter; Muon's momentum is the first, and it has no second."""
AVERAGE = "ema"
"""The moving average of a master, if the run keeps one; AdamW leaves it alone among its own state."""


class Stage(ABC):
    """DeepSpeed's optimizer, made of torch's AdamW (perhaps with Muon), under one ZeRO stage."""

    gives_whole = True
    """Whether :meth:`get` gives every rank the whole tensor."""

    def __init__(
        self,
        optimizer: Any,
        parameters: Mapping[str, nn.Parameter],
        placements: Mapping[str, Placement],
        topology: Topology,
        averages: bool = False,
    ) -> None:
        import deepspeed

        if deepspeed.__version__.partition("+")[0] != VERSION:
            raise UserError(
                f"deepspeed {deepspeed.__version__} is installed, but megaregion knows the inside of "
                f"{VERSION} alone; install the version of requirements.txt"
            )
        self._optimizer = optimizer
        self._parameters = parameters
        self._placements = placements
        self._topology = topology
        self._averages = averages

    @abstractmethod
    def norm(self, heads_norm_squared: Tensor) -> Tensor:
        """Global gradient norm over body and heads, 0-d; DeepSpeed's next step clips by it; a collective."""

    @abstractmethod
    def refuse(self) -> None:
        """Make DeepSpeed's next step drop all gradients and change nothing."""

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The fp32 values that this rank updates, flat where they are partitioned."""

    @abstractmethod
    def get(self, parameter: nn.Parameter, key: str | None) -> tuple[int, Tensor]:
        """A parameter's fp32 master, or its moment of this name; a collective.

        Whole if :attr:`gives_whole`, else the part in this rank's partition, flat, with its place there.
        """

    @abstractmethod
    def set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Put back a whole one; a master is also copied into the model's own (perhaps bf16) parameter."""

    def kept(self, muon: bool) -> tuple[str, ...]:
        """Names of the state of a master that Muon moves, or AdamW."""
        return (*MOMENTS[: 1 if muon else 2], *((AVERAGE,) if self._averages else ()))

    def before_update(self, clip_coefficient: Tensor) -> None:  # noqa: B027 - most need nothing
        """Called before DeepSpeed's step, which clips by itself."""

    def before_forward(self) -> None:  # noqa: B027 - most need nothing
        """Called before each forward pass."""

    def adamw(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps."""
        inner: torch.optim.Optimizer = self._optimizer.optimizer
        return inner

    def gradients(self) -> list[Tensor]:
        """Gradients that wait for the next micro-step or for the update."""
        return [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Move the masters' averages by this share of the way to the masters."""
        masters = self.masters()
        torch._foreach_lerp_([self.adamw().state[one][AVERAGE] for one in masters], masters, share)

    def make_moments(self, step: int) -> None:
        """Create AdamW's state after some steps, moments zero, and averages that are the masters.

        Left to itself AdamW makes it in its first step. DeepSpeed would then link only the first parameter
        group's state to the parameters, and there would be nothing to load into.
        """
        groups = self.adamw().param_groups
        by_muon = {id(one) for group in groups if group["muon"] for one in group["params"]}
        for master in self.masters():
            self.adamw().state[master] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=master.device),
                **{key: torch.zeros_like(master) for key in self.kept(id(master) in by_muon)},
            }
            if self._averages:
                self.adamw().state[master][AVERAGE].copy_(master.detach())


class Stage0(Stage):
    """Nothing is partitioned: DeepSpeed's optimizer is torch's AdamW itself, which has no clip.

    Uses of torch's fused AdamW: ``grad_scale`` and ``found_inf``, as GradScaler sets them.
    """

    def norm(self, heads_norm_squared: Tensor) -> Tensor:
        """Tensor ranks add up what is cut; what is whole is the same on all."""
        whole: list[Tensor] = []
        cut: list[Tensor] = []
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                place = self._placements[name]
                (whole if place.shape == place.full_shape else cut).append(parameter.grad)
        of_cut = self._norm_squared(cut)
        dist.all_reduce(of_cut, group=self._topology.tensor_group)
        return (of_cut + self._norm_squared(whole) + heads_norm_squared).sqrt()

    def refuse(self) -> None:
        """AdamW passes over parameters without a gradient."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def before_update(self, clip_coefficient: Tensor) -> None:
        """AdamW divides by it; a pass of its own over all gradients would cost a third of the update."""
        self._optimizer.grad_scale = 1.0 / clip_coefficient
        self._optimizer.found_inf = torch.zeros_like(clip_coefficient)

    def adamw(self) -> torch.optim.Optimizer:
        """DeepSpeed wraps nothing."""
        inner: torch.optim.Optimizer = self._optimizer
        return inner

    def masters(self) -> list[Tensor]:
        """The parameters themselves."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def get(self, parameter: nn.Parameter, key: str | None) -> tuple[int, Tensor]:
        """The live tensor."""
        return 0, parameter.data if key is None else self._optimizer.state[parameter][key]

    def set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Copy into it."""
        self.get(parameter, key)[1].copy_(value)

    def _norm_squared(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=self._topology.device)
        if self._topology.device.type == "cpu":
            # Half the time of torch's norm there, and a rounding error that is 60 times smaller.
            return torch.stack([torch.dot(flat, flat) for flat in map(torch.ravel, gradients)]).sum()
        return torch.stack(torch._foreach_norm(gradients)).square().sum()


class _Partitioned(Stage):
    """What stages 1 to 3 share. A step whose norm is not finite is dropped with all that it has gathered."""

    def gradients(self) -> list[Tensor]:
        """Those of parameters, their sums in another type, and what is reduced already."""
        found = super().gradients()
        sums = (getattr(parameter, "grad_accum", None) for parameter in self._parameters.values())
        found += [gradient for gradient in sums if gradient is not None]
        for parts in ("all_grad_tensors", "averaged_gradients"):
            for group in getattr(self._optimizer, parts, {}).values():
                found += group or []
        return found


class Stage1And2(_Partitioned):
    """Masters and moments are partitioned, in stage 2 gradients too (DeepSpeedZeroOptimizer).

    Replaces ``scaled_global_norm`` and ``check_overflow``, whose search the norm makes needless; uses
    ``single_partition_of_fp32_groups``, ``all_grad_tensors``, ``averaged_gradients``,
    ``_lazy_init_hp_params_optimizer_state`` with its flag ``_hp_optimizer_states_linked``, and of parameters
    ``_hp_mapping``.
    """

    gives_whole = False

    def __init__(self, optimizer: Any, *rest: Any) -> None:
        super().__init__(optimizer, *rest)
        self._body_norm = optimizer.scaled_global_norm
        self._joined = torch.zeros((), device=self._topology.device)
        optimizer.scaled_global_norm = lambda norm_type=2: self._joined
        optimizer.check_overflow = lambda partition_gradients=True: None

    def norm(self, heads_norm_squared: Tensor) -> Tensor:
        """DeepSpeed's own, joined with the heads'."""
        self._joined = torch.hypot(self._body_norm(), heads_norm_squared.sqrt())
        return self._joined

    def refuse(self) -> None:
        """By a norm that is not finite."""
        self._joined = torch.full_like(self._joined, torch.inf)

    def masters(self) -> list[Tensor]:
        """One a parameter group."""
        return list(self._optimizer.single_partition_of_fp32_groups)

    def get(self, parameter: nn.Parameter, key: str | None) -> tuple[int, Tensor]:
        """What this rank holds: nothing is gathered."""
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return 0, torch.empty(0)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)

    def set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Scatter it over the data ranks."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is not None:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)

    def make_moments(self, step: int) -> None:
        """Link them to the parameters too."""
        super().make_moments(step)
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()


class Stage3(_Partitioned):
    """Parameters are partitioned too (DeepSpeedZeroOptimizer_Stage3).

    Replaces ``_get_norm_groups``; uses ``fp32_partitioned_groups_flat``, ``persistent_parameters``,
    ``averaged_gradients``, and of parameters ``ds_tensor``, ``ds_numel`` and ``all_gather``.
    """

    def __init__(self, optimizer: Any, *rest: Any) -> None:
        super().__init__(optimizer, *rest)
        self._body_norms = optimizer._get_norm_groups
        self._groups: list[Tensor] = []
        optimizer._get_norm_groups = lambda: self._groups

    def norm(self, heads_norm_squared: Tensor) -> Tensor:
        """DeepSpeed joins the heads' norm as if it were one more group of parameters."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self._groups = [*self._body_norms(), heads_norm_squared.sqrt()]
        return combine_grad_norm_groups(self._groups)

    def refuse(self) -> None:
        """By a norm that is not finite."""
        self._groups = [torch.full_like(self._groups[-1], torch.inf)]

    def masters(self) -> list[Tensor]:
        """One a group of parameters that are updated together; AdamW is lent them for the update only."""
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def before_forward(self) -> None:
        """Gather the small parameters that stay whole, where they are not yet.

        Until DeepSpeed has seen the order of the modules it takes them apart as well, and what is lent to
        many modules at once (tensor_parallel.sum_over_ranks) must be there when a forward pass begins.
        """
        small = self._optimizer.persistent_parameters
        if missing := [parameter for parameter in small if parameter.data.numel() != parameter.ds_numel]:
            missing[0].all_gather(missing)

    def get(self, parameter: nn.Parameter, key: str | None) -> tuple[int, Tensor]:
        """Gather it: a file with a part of every small tensor from every rank would be all names."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key is None:
            return 0, safe_get_full_fp32_param(parameter)
        return 0, safe_get_full_optimizer_state(parameter, key)

    def set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Set this rank's part: the setters of whole tensors fail on sizes that data ranks do not divide."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        part = self._own_part(parameter, value)
        if key is not None:
            safe_set_local_optimizer_state(parameter, part, key)
            return
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)  # type: ignore[attr-defined]
        if parameter.data.numel() == value.numel():
            # Small ones are kept whole between steps.
            parameter.data.copy_(value)

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This data rank's slice of a flattened parameter, padded as DeepSpeed pads it."""
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = value.new_zeros(length * self._topology.data_size)
        padded[: value.numel()] = value.flatten()
        return padded.narrow(0, length * self._topology.data_rank, length)


STAGES: tuple[type[Stage], ...] = (Stage0, Stage1And2, Stage1And2, Stage3)
"""The adapter of each stage."""
