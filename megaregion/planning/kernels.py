"""Counts what a GPU would be asked to do: kernels, bytes they move, FLOPs, and where the host waits."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from megaregion.parallel.tensor_parallel import OPERATORS

NO_KERNEL = frozenset({"_unsafe_view", "lift_fresh", "set_", "is_same_size"})
"""Operations that start no kernel and that their schema does not tell from others."""
OVERWRITES = frozenset({"zero_", "fill_", "copy_", "exponential_", "uniform_", "normal_"})
"""In-place operations that do not read what they replace."""
READS_ROWS = frozenset({"index_select", "gather", "index", "embedding"})
"""Operations that read as much of their first operand as they return."""
WRITES_ROWS = frozenset({"index_copy_", "index_add_", "scatter_add_", "index_put_"})
"""Operations that touch as much of their first operand as their last one holds."""
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "score", "pull_rows", "pull_centers"})
ROOM, HOUSE, ROOT = (str(folder) for folder in list(Path(__file__).parents)[:3])
TOOLS = str(Path(ROOT, "tools"))


@dataclass
class Tally:
    """What was asked of the device."""

    kernels: Counter[str] = field(default_factory=Counter)
    """Calls by operation."""
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes read and written by operation; what is expanded counts once."""
    flops: int = 0
    """Operations of matrix products and attention, a multiply-add counted as 2."""
    of_scores: int = 0
    """Bytes moved of the exponentials of the heads' scores."""
    waits: list[str] = field(default_factory=list)
    """Where the host waits for the device or copies while it waits, as file:line."""

    @property
    def calls(self) -> int:
        """Kernels in all."""
        return self.kernels.total()

    @property
    def other_bytes(self) -> int:
        """Bytes moved by what is no matrix product."""
        return sum(size for name, size in self.moved.items() if name.split(".")[0] not in PRODUCTS)


class KernelCounter(TorchDispatchMode):
    """Adds every operation on CUDA tensors to a tally while it is entered; without one it only answers."""

    def __init__(self, tally: Tally | None) -> None:
        super().__init__()
        self.tally = tally
        self.paused = False
        """Whether what runs is counted in another way."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled part counts where it runs, not where it is made."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        space, _, name = func._schema.name.partition("::")
        # What a compiled block leaves whole, and inside of it what autograd does not see, are their parts.
        whole = {"megaregion": OPERATORS, "aten": {"linear": func.decompose, "matmul": func.decompose}}
        if (parts := whole.get(space, {}).get(name)) is not None:
            with self:
                return parts(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if self.tally is not None and args[0].is_cuda:
                self.tally.waits.append(_caller())
            # No number is there: every flag is down, and every norm is 1.
            return 1.0 if args[0].is_floating_point() else 0
        out = self._without_numbers(func, args)
        if out is not None:
            return out
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:  # Some come whole there that are several operations elsewhere.
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if self.tally is None:
            return out
        given, made = _tensors((args, kwargs)), _tensors(out)
        kinds = {tensor.device.type for tensor in (*given, *made)}
        allocates = name.startswith(("empty", "new_empty"))
        if "cuda" not in kinds or space == "prim" or func.is_view or allocates or name in NO_KERNEL:
            return out
        if "cpu" in kinds and not kwargs.get("non_blocking") and _copies(name, given, args):
            self.tally.waits.append(_caller())
        self.tally.kernels[name] += 1
        self.tally.moved[name] += _bytes_moved(func, name, given, made)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            if name in PRODUCTS:  # Their overloads take types and factors too.
                args, kwargs = tuple(_tensors(args)), {}
            self.tally.flops += count(*args, **kwargs, out_val=out)
        return out

    def _without_numbers(self, func: Any, args: tuple[Any, ...]) -> Any:
        """The result of a fake operation whose size is a number on the device; None of all others.

        Every flag is down, so no place is found; and all elements are distinct.
        """
        ops, given = torch.ops.aten, args[0] if args else None
        if not isinstance(given, FakeTensor) or given.device.type != "cuda":
            return None
        if func is ops.nonzero.default:
            out: Any = given.new_empty((0, given.dim()), dtype=torch.int64)
        elif func is ops._unique2.default:
            out = given.flatten(), *(given.new_empty(given.shape, dtype=torch.int64) for _ in range(2))
        elif func is ops.index.Tensor and any(at is not None and at.dtype == torch.bool for at in args[1]):
            nowhere = given.new_empty(0, dtype=torch.int64)
            out = func(given, [nowhere if at is not None else at for at in args[1]])
        else:
            return None
        if self.tally is not None:
            self.tally.waits.append(_caller())
            self.tally.kernels[func._schema.name.partition("::")[2]] += 1
        return out


def count_launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Count the launch of a kernel of the heads, as ``heads.grouped.launch`` starts it.

    A kernel's first operand is its largest; ``weigh`` touches as many of it as there are labels.
    """
    tensors, name = _tensors(arguments), kernel.__name__
    moved = _size(tensors[1:]) if name == "weigh" else _size(tensors)
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, KernelCounter) and mode.tally is not None and all(grid):
            mode.tally.kernels[name] += 1
            mode.tally.moved[name] += moved
            if name in PRODUCTS:
                mode.tally.flops += 2 * tensors[0].numel() * constants["DIM"]
                mode.tally.of_scores += _size(tensors[:1])


def counters() -> list[KernelCounter]:
    """Those that are entered."""
    return [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, KernelCounter)]


def count_nodes(loss: Tensor, name: str) -> int:
    """Nodes of this name in the backward graph below a tensor."""
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(node.name() == name for node in seen)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _copies(name: str, given: Iterable[Tensor], args: tuple[Any, ...]) -> bool:
    """Whether an operation on both devices moves data; scalars of the host travel with the kernel."""
    # non_blocking is the third argument of copy_.
    if name == "copy_" and len(args) > 2 and args[2]:
        return False
    return name in ("_to_copy", "copy_") or any(t.device.type == "cpu" and t.dim() for t in given)


def _bytes_moved(func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> int:
    if name in READS_ROWS:
        return 2 * _size(made)
    if name in WRITES_ROWS:
        return _size(given[1:]) + _size(given[-1:])
    arguments = func._schema.arguments
    written = sum(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)
    if not written:
        return _size(given) + _size(made)
    if "out" in func._schema.overload_name:
        # The last operand is where the result goes.
        return _size(given)
    return _size(given) + (0 if name in OVERWRITES else _size(given[:1]))


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements that are apart in memory."""
    total = 0
    for tensor in tensors:
        apart = 1
        for side, stride in zip(tensor.shape, tensor.stride(), strict=True):
            apart *= side if stride else 1
        total += apart * tensor.element_size()
    return total


def _caller() -> str:
    """The innermost line of this house, or of its tools, that is being run."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        for places, base in ((HOUSE, HOUSE), (TOOLS, ROOT)):
            if file.startswith(places) and not file.startswith(ROOM):
                return f"{Path(file).relative_to(base)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"
