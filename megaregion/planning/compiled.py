"""Counts what torch.compile would start on a GPU that is not there.

Dynamo, autograd's partitioner and inductor's lowering and scheduler run as in a real start, for an H100; only
the last step, Triton's compiler, is left out. A compiled part then gives fake tensors, and each call of it
counts the kernels that inductor has fused, and by ``KernelCounter``'s rules the products, the attention and
the project's own operators, which it leaves as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import fx

from megaregion.planning.kernels import Tally, counters

H100: dict[str, Any] = {
    "name": "H100", "gcnArchName": "", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32,
    "regs_per_multiprocessor": 65_536, "max_threads_per_multi_processor": 2_048,
    "max_threads_per_block": 1_024, "shared_memory_per_block_optin": 232_448, "total_memory": 80 * 2**30,
}  # fmt: skip
"""What inductor asks of a device."""
LAUNCH = r"\btriton_\w+\.run\(|\.sum\(dim=0\)|\.to\(torch\."
"""What starts a kernel in inductor's code, beside operators that it leaves as they are."""
FUSED = "fused"
"""The name under which inductor's kernels are counted."""


@contextmanager
def counted_compilation() -> Iterator[None]:
    """While it is open, what torch.compile makes of parts on fake CUDA tensors is counted where it runs."""
    from torch._dynamo import reset
    from torch._inductor import compile_fx

    count = patch.object(
        compile_fx, "compile_fx", partial(_lower_all, compile_fx.compile_fx, inner_compile=_lower)
    )
    reset()
    with count:
        try:
            yield
        finally:
            reset()


def _lower_all(compile_fx: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    from torch._functorch import config as autograd
    from torch._inductor import config

    # A backward pass is made with its forward pass, before anything is counted; folding would make constants
    # on the device.
    at_once = autograd.patch(force_non_lazy_backward_lowering=True)
    with _answers(), at_once, config.patch(joint_graph_constant_folding=False):
        return compile_fx(*arguments, **named)


@contextmanager
def _answers() -> Iterator[None]:
    """Answer what inductor asks of CUDA and of Triton."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import codecache
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch.utils import _triton

    properties = SimpleNamespace(**H100)
    random = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True, "get_device_capability": (9, 0), "get_device_properties": properties,
        "device_count": 1, "current_device": 0, "get_rng_state": random, "set_rng_state": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    # Patterns of code that this project has not are traced with real tensors.
    unasked = (
        (fuse_attention, "_sfdp_init"),
        (pad_mm, "_pad_mm_init"),
        (misc_patterns, "_misc_patterns_init"),
        (_triton, "triton_hash_with_backend"),
    )
    with ExitStack() as stack:
        for name, answer in answers.items():
            reply = partial(_reply, answer)
            stack.enter_context(patch.object(torch.cuda, name, reply))
            if hasattr(CudaInterface, name) and name != "is_available":
                stack.enter_context(patch.object(CudaInterface, name, staticmethod(reply)))
        for place, name in unasked:
            stack.enter_context(patch.object(place, name, partial(_reply, None)))
        system = staticmethod(partial(_reply, {"hash": "none"}))
        stack.enter_context(patch.object(codecache.CacheBase, "get_system", system))
        # It remembers what it has found.
        _triton.has_triton.cache_clear()
        stack.callback(_triton.has_triton.cache_clear)
        yield


def _reply(answer: Any, *_: Any, **__: Any) -> Any:
    return answer


def _lower(graph: fx.GraphModule, inputs: Sequence[Any], **named: Any) -> Callable[..., Any]:
    """Bring one graph, of a forward or a backward pass, to inductor's kernels; what it returns counts them.

    The steps are those of inductor's own inner compiler.
    """
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    lowering: Any = GraphLowering
    steps: Any = compile_fx
    with _answers(), DebugContext():
        steps.view_to_reshape(graph)
        with torch.no_grad():
            fake_mode = steps.fake_tensor_prop(graph, inputs)
        steps._recursive_record_original_output_strides(graph)
        with V.set_fake_mode(fake_mode):
            steps._recursive_post_grad_passes(graph, is_inference=named.get("is_inference", False))
            lowered = lowering(
                graph,
                example_inputs=inputs,
                shape_env=fake_mode.shape_env,
                is_backward=named.get("is_backward", False),
            )
            with V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]):
                lowered.run(*inputs)
                code = lowered.codegen()[0].value
                own, apart = _scheduled(lowered.scheduler.nodes)
                # Of rows and columns in one pass a program's share of the columns is added up by torch.
                own.kernels[FUSED] = len(re.findall(LAUNCH, code))
    counted = _Counted(graph, own, apart)

    def run(operands: list[Any]) -> Any:
        return counted.call(operands)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _scheduled(nodes: Sequence[Any]) -> tuple[Tally, Counter[str]]:
    """The bytes that inductor's kernels move, and how often it calls operators that it leaves as they are."""
    from torch._inductor import ir, scheduler

    own, apart = Tally(), Counter[str]()
    for node in nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
            continue
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            # extern_kernels.addmm, torch.ops.aten.attention.default
            name = node.node.python_kernel_name.removesuffix(".default")
            apart[name.rpartition(".")[2]] += 1
            continue
        own.moved[FUSED] += node.get_read_write_buffers_sizes()
    return own, apart


class _Counted(fx.Interpreter):
    """A lowered graph on fake tensors."""

    def __init__(self, graph: fx.GraphModule, own: Tally, apart: Counter[str]) -> None:
        super().__init__(graph)
        self._own, self._apart = own, apart
        called = Counter(_name(node) for node in graph.graph.nodes)
        assert all(called[name] == times for name, times in apart.items()), (apart, called)

    def call(self, operands: list[Any]) -> Any:
        """Run the graph, and count it as inductor's code would run."""
        given = tuple(operands)
        operands.clear()
        for counter in counters():
            if counter.tally is not None:
                counter.tally.kernels += self._own.kernels
                counter.tally.moved += self._own.moved
        try:
            return super().run(*given)
        finally:
            # What it held nobody could take over as a gradient.
            self.env.clear()

    def run_node(self, n: fx.Node) -> Any:
        """Count an operator where it stays a kernel of its own."""
        entered = counters()
        for counter in entered:
            counter.paused = _name(n) not in self._apart
        try:
            return super().run_node(n)
        finally:
            for counter in entered:
                counter.paused = False


def _name(node: fx.Node) -> str:
    return node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""
