"""Runs and folders to convert, written without a training run."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaregion.checkpoint.format import Piece, publish, write_pieces
from megaregion.config import HeadsConfig, ModelConfig, RunConfig
from megaregion.models import RegionEncoder, initialise, tensor_parallel_plan

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"

MODEL = ModelConfig(image_size=64, patch_size=16, width=64, depth=4, heads=4, mlp_width=128, region_layers=2)


def pieces(model: RegionEncoder, rank: int, ranks: int) -> Iterator[Piece]:
    """One rank's part of a tensor-parallel model, cut as the plan says."""
    plan = tensor_parallel_plan(model)
    for name, parameter in model.named_parameters():
        module, _, end = name.rpartition(".")
        axis = {"column": 0, "row": 1}.get(plan.get(module, ""))
        if axis is None or (axis == 1 and end == "bias"):
            if rank == 0:
                yield Piece(f"body.weight.{name}", tuple(parameter.shape), (0,) * parameter.dim(), parameter)
            continue
        part = parameter.chunk(ranks, dim=axis)[rank]
        offset = [0] * parameter.dim()
        offset[axis] = rank * part.shape[axis]
        yield Piece(f"body.weight.{name}", tuple(parameter.shape), tuple(offset), part)


def write_run(
    folder: Path, ranks: int = 1, config: ModelConfig = MODEL, step: int = 12, drawn: bool = True
) -> RegionEncoder:
    """A run folder with one checkpoint of a model whose norms and biases are off their start too."""
    model = RegionEncoder(config, embedding_dim=32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if drawn:
            initialise(model, seed=0)
        for parameter in model.parameters():
            if drawn:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.fill_(0.5)
    unfinished = folder / "checkpoints" / "step-unfinished.tmp"
    unfinished.mkdir(parents=True)
    for rank in range(ranks):
        write_pieces(unfinished, rank, pieces(model, rank, ranks))
    run = RunConfig(name="little", model=config, head=HeadsConfig(embedding_dim=32))
    facts = {
        "step": step,
        "position": 0,
        "loss": 1.5,
        "config": dataclasses.asdict(run),
        "ranks": {"tensor": ranks, "data": 1},
        "dataset": {
            "samples": 1234,
            "object_classes": 37,
            "text_classes": 23,
            "centers_sha256": "c" * 64,
            "tokenizer_sha256": "d" * 64,
        },
    }
    publish(unfinished, folder / "checkpoints" / f"step-{step:08d}", facts)
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def convert(*arguments: object) -> int:
    """Run the command line in this process."""
    saved, sys.argv = sys.argv, [str(TOOL), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = saved
    return int(ended.value.code or 0)
