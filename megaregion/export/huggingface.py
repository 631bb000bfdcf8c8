"""A checkpoint of any topology as a folder that ``AutoModel`` and ``AutoImageProcessor`` load.

    OUT/model.safetensors  config.json  preprocessor_config.json  README.md

Needs neither the ranks that wrote the checkpoint nor their libraries: torch and safetensors suffice.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megaregion.config import ModelConfig, RunConfig, config_from_dict
from megaregion.errors import UserError
from megaregion.export.card import model_card
from megaregion.export.mlcd import mlcd_config, mlcd_tensors, processor_config
from megaregion.models import VisionTransformer
from megaregion.training.checkpoint import CheckpointReader, DamagedCheckpoint, find_checkpoint

BODY = "body.weight.vit."
"""Start of the names that the transformer's weights have in a checkpoint."""


@dataclass(frozen=True)
class Exported:
    """What was written, and from what."""

    checkpoint: Path
    """The step folder that was read."""
    folder: Path
    """The folder that was written."""
    step: int
    """Optimizer steps taken."""
    model: ModelConfig
    """The model's settings."""
    parameters: int
    """Parameters of the exported model."""
    size: int
    """Size of model.safetensors, in bytes."""


def export_checkpoint(checkpoint: Path, out: Path, dtype: torch.dtype = torch.float32) -> Exported:
    """Write the encoder of a checkpoint as transformers' MLCDVisionModel.

    The heads, the projection and region tokens' own weights stay behind: that class has no place for them.

    Args:
        checkpoint: A run's folder, its checkpoints folder or one step folder.
        out: Folder to write, absent or empty; it appears complete or not at all.
        dtype: Type of the exported weights.

    Returns:
        What was written.

    Raises:
        UserError: There is no whole checkpoint, or out is taken or cannot be written.
    """
    _refuse_taken(out)
    folder = find_checkpoint(checkpoint)
    try:
        reader = CheckpointReader(folder)
        reader.verify()
        config = run_config(reader)
        tensors = _read_model(reader, config.model, dtype)
    except (DamagedCheckpoint, OSError) as error:
        raise UserError(
            f"{error}; give another step folder beside it, or copy the checkpoint again"
        ) from error
    parameters = sum(tensor.numel() for tensor in tensors.values())
    try:
        with _new_folder(out) as partial:
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            _write_json(partial / "config.json", mlcd_config(config.model, dtype))
            _write_json(partial / "preprocessor_config.json", processor_config(config.model, config.data))
            (partial / "README.md").write_text(model_card(config, reader.step, parameters))
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own.
        raise UserError(f"{out} cannot be written: {error}") from error
    size = (out / "model.safetensors").stat().st_size
    return Exported(folder, out, reader.step, config.model, parameters, size)


def run_config(reader: CheckpointReader) -> RunConfig:
    """The settings of the run that wrote a checkpoint.

    Raises:
        DamagedCheckpoint: The manifest holds no settings that this version knows.
    """
    try:
        config: RunConfig = config_from_dict(reader.manifest["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{reader.folder} holds no settings of this version ({type(error).__name__}: {error})"
        ) from error
    return config


def _read_model(reader: CheckpointReader, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read the transformer's weights, one parameter after another, under their names in MLCDVisionModel."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".region." in name:
            continue
        if reader.shape(BODY + name) != tuple(parameter.shape):
            raise DamagedCheckpoint(
                f"{reader.folder}: {name} has the shape {list(reader.shape(BODY + name))}, its settings say "
                f"{list(parameter.shape)}"
            )
        for key, tensor in mlcd_tensors(name, reader.read(BODY + name).to(dtype), config):
            tensors[key] = tensor.contiguous()
    return tensors


def _refuse_taken(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; name another folder or empty this one")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside its destination, renamed into place if all went well, deleted if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
