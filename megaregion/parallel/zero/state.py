"""The body's training state as whole tensors of one tensor rank, whatever ZeRO stage scatters them.

A :class:`Placement` says where each lies in the full tensor, so any stage and any number of data ranks can
go on from any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megaregion.parallel.tensor_parallel import Placement
from megaregion.parallel.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Optimizer state kept per parameter."""


class ZeroState:
    """Reads and writes masters and moments under one ZeRO stage."""

    def __init__(
        self,
        stage: int,
        optimizer: Any,
        parameters: Mapping[str, nn.Parameter],
        placements: Mapping[str, Placement],
        topology: Topology,
    ) -> None:
        """Make AdamW's state.

        Args:
            stage: ZeRO stage, 0 to 3.
            optimizer: DeepSpeed's optimizer; torch's AdamW itself at stage 0.
            parameters: The body's parameters by name.
            placements: Place of every parameter in the full model.
            topology: This rank's place.
        """
        self._stage = stage
        self._optimizer = optimizer
        self._parameters = parameters
        self._placements = placements
        self._topology = topology
        self._make_moments(0)

    def tensors(self) -> Iterator[tuple[str, Placement, Tensor]]:
        """Every tensor of the training state of this tensor rank, one at a time; a collective.

        Yields:
            Name ("weight.NAME", "exp_avg.NAME", "exp_avg_sq.NAME"), place in the full tensor, fp32 value.
        """
        for name, parameter in self._parameters.items():
            place = self._placements[name]
            yield f"weight.{name}", place, self._full(parameter, None).view(place.shape)
            for key in MOMENTS:
                yield f"{key}.{name}", place, self._full(parameter, key).view(place.shape)

    def load(self, read: Callable[[str, Placement], Tensor], step: int) -> None:
        """Put back what :meth:`tensors` gave, on any stage and any number of ranks; a collective.

        Args:
            read: Returns the fp32 value of a named tensor at a place.
            step: Optimizer steps taken so far (AdamW's bias correction).
        """
        self._make_moments(step)
        for name, parameter in self._parameters.items():
            place = self._placements[name]
            value = read(f"weight.{name}", place).to(self._topology.device)
            self._set(parameter, value, None)
            self._refresh(parameter, value)
            for key in MOMENTS:
                self._set(parameter, read(f"{key}.{name}", place).to(self._topology.device), key)

    def _full(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
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

        if self._stage == 0:
            self._full(parameter, key).copy_(value)
        elif self._stage == 3:
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
        if self._stage == 3:
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
        optimizer = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        for group in self._flat_groups():
            for master in group:
                optimizer.state[master] = {
                    "step": torch.tensor(float(step), dtype=torch.float32, device=master.device),
                    **{key: torch.zeros_like(master) for key in MOMENTS},
                }
        if self._stage in (1, 2):
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_groups(self) -> list[list[Tensor]]:
        if self._stage == 0:
            return [list(group["params"]) for group in self._optimizer.param_groups]
        if self._stage == 3:
            return [list(self._optimizer.fp32_partitioned_groups_flat)]
        return [list(self._optimizer.single_partition_of_fp32_groups)]
