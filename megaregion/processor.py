"""What a processor needs to be as fast as it can: products by the right library, threads, and kept memory.

Torch multiplies fp32 with MKL, which uses the 512-bit units of Intel alone: where others have
them it reaches half their rate. oneDNN, which torch brings as well, asks the processor what it can do; torch
itself calls it for fp32 in compiled code only.

By default glibc gives large blocks that are freed back to the operating system at once, and who needs them
next gets each page anew, zeroed: activations, gradients and DeepSpeed's flat copies are such blocks, and so
are the encoded images of a loader's batch. On a GPU torch keeps freed memory by itself.

Shapes: R rows, I input width, O output width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

PROCESSOR = Path("/proc/cpuinfo")
Outcome = TypeVar("Outcome")

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULT_MMAP_MAX = 65_536
_NEVER = 2**31 - 1


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, narrow: bool = False) -> Tensor:
    """Inputs times the transposed weight; autograd does not see through it on a processor.

    Args:
        inputs: [R, I], in any memory layout.
        weight: [O, I], in any memory layout.
        bias: Added to each row, [O].
        narrow: Round operands and result to bf16; sums are fp32, types stay as they are.

    Returns:
        Of its own memory, contiguous, [R, O].
    """
    if narrow:
        return _rounded(F.linear, inputs, weight, bias)
    if inputs.device.type != "cpu":
        return F.linear(inputs, weight, bias)
    if takes_onednn(inputs):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return found
    # torch's addmm first spreads the bias over the whole output and lets the product add to it: 8% slower.
    out = torch.matmul(inputs, weight.T)
    return out if bias is None else out.add_(bias)


def outer_sum(left: Tensor, right: Tensor, narrow: bool = False) -> Tensor:
    """Sum over rows of the outer products of two matrices' rows: the transposed left one times the right one.

    Args:
        left: [R, O].
        right: [R, I].
        narrow: As in :func:`product`.

    Returns:
        Of its own memory, contiguous, [O, I].
    """
    if narrow:
        return _rounded(lambda left, right: left.T @ right, left, right)
    if not takes_onednn(left) or not right.numel():
        return left.T @ right
    if left.shape[1] < right.shape[1]:
        return product(left.T, right.T)
    # product() writes the left matrix out transposed: of a wide one, plain copies of both are faster.
    shape = left.new_empty(left.shape[1], right.shape[1])
    found: Tensor = torch.ops.aten.mkldnn_linear_backward_weights(
        left.to_mkldnn(), right.to_mkldnn(), shape, False
    )[0]
    return found


def _rounded(multiply: Callable[..., Tensor], first: Tensor, *others: Tensor | None) -> Tensor:
    rounded = (None if one is None else one.bfloat16() for one in others)
    return multiply(first.bfloat16(), *rounded).to(first.dtype)


def takes_onednn(matrix: Tensor) -> bool:
    """Whether a product with this matrix is oneDNN's here."""
    return (
        matrix.device.type == "cpu"
        and matrix.dtype == torch.float32
        and matrix.numel() > 0
        and onednn_is_faster()
    )


@cache
def onednn_is_faster() -> bool:
    """Whether this processor has units that MKL leaves alone."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and _maker() not in ("GenuineIntel", "")


@cache
def multiplies_bytes() -> bool:
    """Whether this processor has units for products of 8-bit integers, as those of AVX-512 with VNNI."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return wide and "avx512_vnni" in _told("flags").split()


def is_narrow(precision: str, device: torch.device) -> bool:
    """Whether a run of this train.precision rounds fp32 operands to bf16: mixed, where that is faster."""
    return precision == "mixed" and (device.type != "cpu" or multiplies_bf16())


@cache
def multiplies_bf16() -> bool:
    """Whether this processor has units for products of bf16, as those of AVX-512 or AMX."""
    known = {"avx512_bf16", "amx_bf16"} & set(_told("flags").split())
    return bool(known) and torch.backends.mkldnn.is_available()


def _maker() -> str:
    """The processor's vendor_id, empty where Linux does not tell."""
    return _told("vendor_id")


def _told(key: str) -> str:
    """What Linux tells of the first processor under a key, or nothing."""
    lines = PROCESSOR.read_text().splitlines() if PROCESSOR.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), "")


def keep_freed_memory() -> None:
    """Keep freed memory for the next step or batch; the process then never shrinks."""
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER})


def return_freed_memory() -> None:
    """Give freed memory back at once, so that what the process holds is what its tensors have touched."""
    _set({_MMAP_MAX: _DEFAULT_MMAP_MAX, _MMAP_THRESHOLD: 1 << 16, _TRIM_THRESHOLD: 1 << 17})
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _set(parameters: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    # Other C libraries have no such switches, and need none.
    if hasattr(library, "mallopt"):
        for parameter, value in parameters.items():
            library.mallopt(parameter, value)


def in_order(work: Callable[[int], Outcome], items: Sequence[int]) -> list[Outcome]:
    """Work on items, each on one of torch's threads; the outcomes keep the items' order."""
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        return [work(item) for item in items]
    # A thread that torch meets for the first time takes the number that is set then.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
