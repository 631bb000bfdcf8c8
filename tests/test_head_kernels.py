"""The head's Triton kernels: right in the interpreter, without spills on three generations, on trial."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from head_reference import group_of_one, place_of
from hypothesis import given
from hypothesis import strategies as st
from launch import repository

from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.heads import grouped
from megaregion.heads.grouped import GroupedDraws, choose_draws, cut_waves
from megaregion.heads.sampling import Draw
from megaregion.heads.streaming import HeadWork, RowSums, StreamedDraws
from megaregion.parallel.topology import Topology

on_linux = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="triton has wheels for Linux only"
)


@on_linux
@pytest.mark.parametrize("part", ["alone", "narrow", "ranks"])
def test_the_grouped_head_equals_the_formulas_and_the_torch_path(part: str) -> None:
    command = [sys.executable, "-W", "ignore", str(repository() / "tests" / "interpreted_heads.py"), part]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may have."""
TYPES = {
    **dict.fromkeys(("p", "features", "centers", "weighed"), "*bf16"),
    **dict.fromkeys(("scores", "sums", "best", "shift", "factor", "seen"), "*fp32"),
    **dict.fromkeys(("gradient", "values", "whole", "weight"), "*fp32"),
    **dict.fromkeys(("index", "columns", "spared", "labels", "table", "classes", "begins"), "*i64"),
    **dict.fromkeys(("rows", "near", "slots", "all_rows", "draws", "local"), "i32"),
    **dict.fromkeys(("unit", "scale", "margin", "cos_m", "sin_m"), "fp32"),
    "marks": "*i1", "made": "*bf16",
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "unit_centers": ({"HAS_CLASSES": True}, {"HAS_CLASSES": False}),
    "score": (
        {"KEEP": True, "HAS_SHIFT": False, "HAS_NEAR": False, "LABELS": 1},
        {"KEEP": True, "HAS_SHIFT": False, "HAS_NEAR": True, "LABELS": 1},
        {"KEEP": True, "HAS_SHIFT": True, "HAS_NEAR": False, "LABELS": 16},
        {"KEEP": False, "HAS_SHIFT": False, "HAS_NEAR": False, "LABELS": 16},
    ),
    "weigh": (
        {
            "LOSS": "separated",
            "MARGIN": "cosface",
            "HAS_SHIFT": False,
            "LEARNS": True,
            "LABELS": 1,
            "SLOTS": 1,
        },
        {
            "LOSS": "softmax",
            "MARGIN": "arcface",
            "HAS_SHIFT": True,
            "LEARNS": True,
            "LABELS": 13,
            "SLOTS": 16,
        },
    ),
    "pull_rows": ({},),
    "pull_centers": ({"ADD": False}, {"ADD": True}),
    "collect": ({"FRESH": False, "STEPS": 12}, {"FRESH": True, "STEPS": 12}),
}


@on_linux
@pytest.mark.parametrize("arch", list(SHARED))
@pytest.mark.parametrize(
    ("name", "operand"),
    # One adds up gradients, which are fp32 always.
    [
        (name, operand)
        for name in VARIANTS
        for operand in ("bf16", "fp32")
        if (name, operand) != ("collect", "fp32")
    ],
)
def test_kernels_compile_without_spills(
    name: str, arch: int, operand: str, tmp_path: Path, record_property: Any
) -> None:
    """Triton and its assembler need no GPU; registers and shared memory go to the report of the run."""
    from megaregion.heads import kernels

    # Of fp32 what takes most registers.
    for number, variant in enumerate(VARIANTS[name] if operand == "bf16" else VARIANTS[name][:2][-1:]):
        registers, stack, shared = compiled(getattr(kernels, name), arch, variant, tmp_path, operand)
        print(f"{name} {operand} {variant} sm_{arch}: {registers} registers, {shared} bytes shared")
        record_property(f"sm_{arch} {operand} {number}", f"{registers} registers, {shared} bytes shared")
        assert stack == 0, "what does not fit the registers is spilled there"
        assert registers <= 255
        assert shared <= SHARED[arch]


def compiled(
    kernel: Any, arch: int, variant: dict[str, Any], folder: Path, operand: str
) -> tuple[int, int, int]:
    """Registers of a thread, bytes of its stack, and bytes of shared memory of a program."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megaregion.heads import kernels

    tile = kernels.tiling(operand == "bf16")
    sizes = {name: getattr(kernels, name) for name in ("ROWS", "CLASSES", "WIDTH", "LINES", "PORTION")}
    own = {"score": {"CLASSES": tile.scored}, "weigh": {"PORTION": tile.portion}}.get(kernel.__name__, {})
    constants = {"DIM": 768, "DEPTH": tile.depth, "PRECISION": tile.precision, **sizes, **own, **variant}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else TYPES[name].replace("bf16", operand)
        for name in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    products = {"num_warps": kernels.WARPS, "num_stages": kernels.STAGES} if "PRECISION" in constants else {}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=products)
    binary = folder / "kernel.cubin"
    binary.write_bytes(found.asm["cubin"])
    command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "-res-usage", binary]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    return int(registers), int(stack), found.metadata.shared


@given(
    sizes=st.lists(st.tuples(st.integers(1, 700), st.integers(0, 3000)), max_size=6),
    budget=st.integers(1, 3_000_000),
)
def test_waves_take_every_row_once_and_a_draw_once_at_a_time(
    sizes: list[tuple[int, int]], budget: int
) -> None:
    draws, row, slot = [], 0, 0
    for rows, classes in sizes:
        draws.append(Draw(slice(row, row + rows), slice(slot, slot + classes), classes))
        row, slot = row + rows, slot + classes
    waves = cut_waves(tuple(draws), budget, 128)
    taken = [
        number
        for wave in waves
        for piece in wave.pieces
        for number in range(piece.rows.start, piece.rows.stop)
    ]
    assert taken == list(range(row))
    for wave in waves:
        slots = [piece.slots.start for piece in wave.pieces if piece.slots.stop > piece.slots.start]
        assert len(set(slots)) == len(slots), "two programs would write the same centers"
        scores = sum(
            (piece.rows.stop - piece.rows.start) * (piece.slots.stop - piece.slots.start)
            for piece in wave.pieces
        )
        first = wave.pieces[0]
        assert (
            scores <= budget
            or wave.rows.stop - wave.rows.start <= 128
            or first.slots.stop == first.slots.start
        )
        by_row, by_class = wave.tables(128, 64)
        assert by_row[:, 1].sum() == wave.rows.stop - wave.rows.start
        assert by_class[:, 1].sum() == sum(piece.slots.stop - piece.slots.start for piece in wave.pieces)
        assert int((by_row[:, 4] % 16).max()) == 0


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Topology]:
    monkeypatch.setattr(grouped, "TRIED", (40, 30, 3))
    with group_of_one() as group:
        yield place_of(group)


class Wrong(StreamedDraws):
    """Loses half of the rows' gradient."""

    def score(self, *arguments: Any) -> RowSums:
        sums = super().score(*arguments)
        assert sums.grad_features is not None
        return sums._replace(grad_features=sums.grad_features / 2)


class Right(StreamedDraws):
    """As good as torch."""


@pytest.mark.parametrize("kind", ["object", "text"])
def test_a_kernel_that_fails_on_a_device_is_named_and_left_aside(
    place: Topology, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def breaks(work: HeadWork) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(grouped, "GroupedDraws", breaks)
    assert grouped.try_draws(kind, RunConfig(), place) is StreamedDraws
    assert f"head {kind}: the triton kernels are left aside" in caplog.text
    assert "RuntimeError: no kernel image is available" in caplog.text


def test_a_kernel_that_is_wrong_on_a_device_is_named_and_left_aside(
    place: Topology, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "GroupedDraws", Wrong)
    assert grouped.try_draws("object", RunConfig(), place) is StreamedDraws
    assert "its gradient of the rows is off by" in caplog.text


@pytest.mark.parametrize("faster", [True, False])
def test_of_two_right_ways_the_faster_is_taken(
    place: Topology, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    clock = iter(range(1000))
    steps = 2 * (1 + grouped.REPEATS)
    # The first of both, torch, takes a second a time; the other one half or two.
    monkeypatch.setattr(
        grouped, "_now", lambda device: (now := next(clock)) * (1 if now < steps else 0.5 if faster else 2.0)
    )
    monkeypatch.setattr(grouped, "GroupedDraws", Right)
    with caplog.at_level(logging.INFO):
        chosen = grouped.try_draws("object", RunConfig(), place)
    assert chosen is (Right if faster else StreamedDraws)
    assert f"takes {'triton' if faster else 'torch'}" in caplog.text


def test_a_processor_takes_torch(place: Topology) -> None:
    assert choose_draws("object", RunConfig(), place) is StreamedDraws


def test_triton_without_its_package_or_without_a_gpu_is_refused(
    place: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig()
    config = dataclasses.replace(config, head=dataclasses.replace(config.head, backend="triton"))
    with pytest.raises(UserError, match=r"head\.backend triton needs a GPU, and this rank computes on a cpu"):
        choose_draws("object", config, place)
    there = dataclasses.replace(place, device=torch.device("cuda"))
    assert choose_draws("object", config, there) is GroupedDraws
    monkeypatch.setattr(grouped, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the triton package"):
        choose_draws("object", config, there)
