"""A process in which a GPU seems to be there: fake tensors on it, and what libraries ask of it, answered."""

from __future__ import annotations

import contextlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from megaregion.data import batch as pixels
from megaregion.heads import grouped
from megaregion.heads.centers import ClassGradient
from megaregion.heads.sampling import GatheringLabels, Targets
from megaregion.heads.sharded import ClassShardedHead
from megaregion.models import rotary
from megaregion.planning.kernels import count_launch
from megaregion.training.losses import KINDS

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)
"""Of an H100."""


@contextmanager
def fake_cuda(labels: Tensor | None = None) -> Iterator[None]:
    """Make every new tensor a fake one; those of ``DEVICE`` behave as on a GPU, and none holds a number.

    Classes are drawn on the host's real tensors, since how many they are depends on the labels.

    Args:
        labels: Labels of a micro-step's regions over all data ranks, their kinds behind them, [R, T + 1];
            without them a draw is for random ones, of as many rows as it is asked for.
    """
    import torch.distributed._tools.fake_collectives

    _answer_deepspeed()
    arrive, draw = GatheringLabels.arrive, ClassShardedHead.draw

    def arrive_real(sent: GatheringLabels) -> Tensor:
        found = arrive(sent)
        return found if labels is None else labels

    def draw_real(head: ClassShardedHead, given: Tensor, rows: Tensor, *numbers: int) -> Targets:
        with real_tensors(), patch.object(Targets, "to", lambda targets, device: targets):
            if labels is None:
                generator = torch.Generator().manual_seed(0)
                own = torch.randint(head.classes, tuple(given.shape), generator=generator)
                targets = draw(head, own, torch.ones(len(own), dtype=torch.bool), *numbers)
            else:
                targets = draw(head, labels[:, :-1], labels[:, -1] == KINDS[head.name], *numbers)
        return targets.to(DEVICE)

    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        # Nothing can be tried here.
        (grouped, "try_draws", lambda *_: grouped.GroupedDraws),
        (grouped, "launch", count_launch),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_stream", _Stream),
        (Tensor, "record_stream", lambda tensor, stream: None),
        (GatheringLabels, "arrive", arrive_real),
        (ClassShardedHead, "draw", draw_real),
        # How many classes took part is a number on the device: all of them.
        (ClassGradient, "_ask", lambda own: (False, 0 if own._marks is None else len(own._marks))),
    )
    with ExitStack() as stack:
        for place, name, stand_in in stand_ins:
            stack.enter_context(patch.object(place, name, stand_in))
        # DeepSpeed moves the model to the device of this number.
        stack.enter_context(patch.dict(os.environ, {"LOCAL_RANK": str(DEVICE.index)}))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # Real tables are of no use in here, nor fake ones outside.
        for table in (rotary._patch_table, pixels._statistics, pixels._copying):
            table.cache_clear()
            stack.callback(table.cache_clear)
        stack.enter_context(fake_gpu())
        yield


@contextmanager
def fake_gpu() -> Iterator[None]:
    """The same for networks that only infer."""
    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (F, "scaled_dot_product_attention", _attention),
        (Tensor, "pin_memory", lambda tensor, *device: tensor),
        (Tensor, "new_empty", _without_pinning(Tensor.new_empty)),
        (nn.Module, "_apply", _apply),
        (torch.cuda, "Event", _Stream),
        (torch.cuda, "synchronize", lambda device=None: None),
        # Nothing is taken.
        (torch.cuda, "reset_peak_memory_stats", lambda device=None: None),
        (torch.cuda, "memory_allocated", lambda device=None: math.nan),
        (torch.cuda, "max_memory_allocated", lambda device=None: math.nan),
        (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
    )
    with ExitStack() as stack:
        for place, name, stand_in in stand_ins:
            stack.enter_context(patch.object(place, name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def real_tensors() -> AbstractContextManager[Any]:
    """Inside of the others: a place where tensors hold numbers."""
    return _disable_current_modes()


class _Stream:
    """A stream or an event that has nothing to wait for."""

    def __init__(self, *_: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> Tensor:
    """What a build for GPUs picks: flash attention, and the memory-efficient kernel where there is a mask."""
    ops: Any = torch.ops.aten
    out: Tensor
    if attn_mask is None:
        out = ops._scaled_dot_product_flash_attention(query, key, value, 0.0, False)[0]
        return out
    # The kernel wants rows of the mask to begin at multiples of 16.
    if any(stride % 16 for stride in attn_mask.stride()[:-1]):
        attn_mask = F.pad(attn_mask, (0, pad := -attn_mask.shape[-1] % 16))[..., : -pad or None]
    mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    out = ops._scaled_dot_product_efficient_attention(query, key, value, mask, True)[0]
    return out


def _without_pinning(new_empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def unpinned(tensor: Tensor, *size: Any, pin_memory: bool = False, **named: Any) -> Tensor:
        return new_empty(tensor, *size, **named)

    return unpinned


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Module._apply with new parameters, since the data of fake ones cannot be exchanged."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            changed = change(parameter)
        if (changed.dtype, changed.device) != (parameter.dtype, parameter.device):
            other = nn.Parameter(changed, parameter.requires_grad)
            # Marks that libraries have left on it; not what a fake tensor has of its own.
            vars(other).update(
                {key: value for key, value in vars(parameter).items() if key not in vars(other)}
            )
            module._parameters[name] = other
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def _answer_deepspeed() -> None:
    """Answer what DeepSpeed asks of CUDA."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Or it would look for a device and say what it found.
    import deepspeed.ops
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    # Nothing is compiled for it.
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    answers = {
        "current_device": 0, "current_device_name": str(DEVICE), "device_count": 1, "is_available": True,
        "is_bf16_supported": True, "communication_backend_name": "nccl", "is_synchronized_device": False,
        "use_host_timers": False, "resolves_data_dependency": False, "handles_memory_backpressure": False,
        "set_device": None, "synchronize": None, "Stream": _Stream(), "Event": _Stream(),
        "current_stream": _Stream(), "default_stream": _Stream(),
        "stream": contextlib.nullcontext(), "device": contextlib.nullcontext(),
    }  # fmt: skip

    class FakeCuda(CPU_Accelerator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._name = "cuda"

        def device_name(self, device_index: int | None = None) -> str:
            return self._name if device_index is None else f"{self._name}:{device_index}"

        def on_accelerator(self, tensor: Tensor) -> bool:
            return tensor.is_cuda

    for name, answer in answers.items():
        setattr(FakeCuda, name, lambda own, *_, _answer=answer, **__: _answer)
    set_accelerator(FakeCuda())
