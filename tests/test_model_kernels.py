"""The encoder's Triton kernels: in the interpreter beside torch, and compiled for GPUs not here."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="triton has wheels for Linux only"
)


def test_each_equals_the_torch_one_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own, since Triton decides at import whether to interpret."""
    script = tmp_path / "compare.py"
    script.write_text(INTERPRETED)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


INTERPRETED = """
import torch
from megaregion.models import layers, rotary
from megaregion.models.kernels import active_back, join_and_turn_back, norm_back, split_and_turn

def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def compare(heads, width, grids, packed, dtype):
    angle = noise(width // 2, seed=5)
    if packed:
        angles = rotary.packed_rotation(angle, grids, 100.0)
        starts, slots = angles.packing.starts, angles.packing.slots
    else:
        angles = rotary.rotation(angle, *grids[0], 100.0, len(grids))
        starts = slots = None
    cos, sin, images, tokens = angles.cos, angles.sin, angles.sequences, len(angles.cos)
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}

    qkv = noise(images, tokens, heads, 3, width).to(dtype)
    expected = rotary._split(qkv.float(), angle, cos, sin, starts, slots)
    found = rotary._empty_split(qkv)
    split_and_turn(qkv, found, cos, sin)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.float(), other, **bound)

    grads = [noise(images, heads, tokens, width, seed=9 + part).to(dtype) for part in range(3)]
    grads[1] = grads[1].transpose(1, 2).contiguous().transpose(1, 2)  # As flash attention gives it.
    grads[2] = grads[2].transpose(2, 3).contiguous().transpose(2, 3)
    leading = [rotary._class_tokens(part, starts) for part in found[:2]]
    of_floats = [part.float() for part in (*grads, *leading)]
    expected, expected_angle = rotary._join(*of_floats, cos, sin, slots)
    fused = rotary._empty_fused(grads[0])
    found_angle = join_and_turn_back(fused, grads, leading, cos, sin, slots)
    torch.testing.assert_close(fused.float(), expected, **bound)
    torch.testing.assert_close(found_angle, expected_angle, rtol=1e-4, atol=1e-4)

def compare_sums(rows, width, dtype, beside):
    shapes = [(rows, width), (width,), (rows, width), (rows, width)]
    x, weight, grad, passed = (noise(*shape, seed=number).to(dtype) for number, shape in enumerate(shapes))
    _, mean, factor = torch.native_layer_norm(x.float(), (width,), None, None, 1e-6)
    operands = [grad, passed if beside else None, x, mean, factor, weight]
    expected, of_all = layers._norm_back(*[None if t is None else t.float() for t in operands], True)
    grad, shares = norm_back(*operands, min(rows, 4))
    assert grad.dtype == dtype and len(shares) == min(rows, 4)
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(grad.float(), expected, **bound)
    torch.testing.assert_close(shares.sum(0), of_all.sum(0), rtol=1e-4, atol=1e-4)
    for quick in (False, True):
        expected, of_bias = layers._active_back(grad.float(), x.float(), quick)
        back, shares = active_back(grad, x, quick, min(rows, 4))
        torch.testing.assert_close(back.float(), expected, **bound)
        torch.testing.assert_close(shares.sum(0), of_bias.sum(0), rtol=1e-4, atol=1e-4)

for dtype in (torch.float32, torch.bfloat16):
    compare_sums(3, 24, dtype, True)
    compare_sums(10, 32, dtype, False)
    compare(2, 8, [(2, 3)] * 3, False, dtype)
    compare(3, 12, [(1, 2), (3, 1)], True, dtype)
    compare(16, 64, [(3, 4)], False, dtype)
    compare(5, 104, [(2, 2), (1, 3)], True, dtype)
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("heads", "half"), [(16, 32), (16, 52), (2, 32)], ids=["vit-l", "vit-bigg", "tensor 8"]
)
def test_its_registers_suffice(capability: int, heads: int, half: int, tmp_path: Path) -> None:
    for back, packed in ((False, False), (True, False), (True, True)):
        usage = compiled(capability, heads, half, back, packed, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, "registers are spilled"
        # Five blocks of 128 threads on a multiprocessor hide the memory's latency.
        assert usage["REG"] <= 102


def compiled(
    capability: int, heads: int, half: int, back: bool, packed: bool, folder: Path
) -> dict[str, int]:
    """What the kernel takes of a multiprocessor, as ptxas says."""
    import triton
    from triton.compiler import ASTSource

    from megaregion.models.kernels import PAIRS, _pass

    padded = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    constants: dict[str, Any] = {
        "BACK": back, "PACKED": packed, "HEADS": heads, "HALF": half, "PADDED_HEADS": padded[0],
        "PADDED_HALF": padded[1], "ROWS": max(1, PAIRS // (padded[0] * padded[1])),
    }  # fmt: skip
    types = dict.fromkeys(_pass.arg_names, "i32")
    types |= dict.fromkeys(("fused", "query", "key", "value"), "*bf16")
    types |= dict.fromkeys(("class_query", "class_key"), "*bf16" if back else "constexpr")
    types |= {"cos": "*fp32", "sin": "*fp32", "grad_angle": "*fp32" if back else "constexpr"}
    types |= {"slots": "*i32" if packed else "constexpr"} | dict.fromkeys(constants, "constexpr")
    constants |= {name: None for name, kind in types.items() if kind == "constexpr" and name not in constants}
    return usage_of(ASTSource(fn=_pass, signature=types, constexprs=constants), capability, 4, folder)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "warps"), [("_norm_back", 8), ("_active_back", 4)])
def test_registers_suffice_for_sums_over_rows(
    kernel: str, warps: int, capability: int, tmp_path: Path
) -> None:
    from triton.compiler import ASTSource

    from megaregion.models import kernels

    # Of a ViT-bigG.
    constants = {"PASSED": True, "WIDTH": 1664, "PADDED": 2048}
    if kernel == "_active_back":
        constants = {"QUICK": False, "WIDTH": 8192, "COLUMNS": 1024}
    run = getattr(kernels, kernel)
    types = dict.fromkeys(run.arg_names, "*bf16") | {"rows": "i32", "shares": "*fp32"}
    types |= {name: "*fp32" for name in ("means", "factors") if name in types}
    source = ASTSource(fn=run, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    usage = usage_of(source, capability, warps, tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0, "registers are spilled"
    # Three blocks of 256 threads, or six of 128, on a multiprocessor.
    assert usage["REG"] <= 80


def usage_of(source: Any, capability: int, warps: int, folder: Path) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    fields = said.strip().splitlines()[-1].split()
    return {name: int(value) for name, value in (field.split(":") for field in fields)}
