"""A checkpoint of any topology as a folder that ``AutoModel`` and ``AutoImageProcessor`` load.

    OUT/model.safetensors  config.json  preprocessor_config.json  README.md

Needs neither the ranks that wrote the checkpoint nor their libraries: torch and safetensors suffice. One
parameter is in memory at a time. layouts.py says how the formats differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megaregion.checkpoint.format import ENCODER
from megaregion.checkpoint.reader import (
    CheckpointReader,
    DamagedCheckpoint,
    copy_again,
    open_checkpoint,
    run_config,
)
from megaregion.config import ModelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.export.card import CardFacts, evaluation_section, model_card
from megaregion.export.folder import new_folder, refuse_taken, write_json, write_weights
from megaregion.export.layouts import LAYOUTS, Layout
from megaregion.models import RegionEncoder


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written."""

    dtype: torch.dtype = torch.float32
    """Type of the weights."""
    layout: str = "mlcd"
    """Whose names and settings: a key of ``LAYOUTS``."""
    regions: bool = False
    """Add the projection, region tokens' own weights and the class with ``get_region_features``."""
    license: str = "unknown"
    """The hub's identifier of the weights' licence, for the card."""
    shard_bytes: int = 5 * 10**9
    """Most bytes of weights in one file."""
    evaluation: Path | None = None
    """evaluation.json for the card; the run's own if None."""


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
    """Size of all weights, in bytes."""


def export_checkpoint(checkpoint: Path, out: Path, options: ExportOptions | None = None) -> Exported:
    """Write the encoder of a checkpoint in other people's format.

    The heads stay behind, and so do the projection and region tokens' own weights unless ``regions`` asks
    for them.

    Args:
        checkpoint: A run's folder, its checkpoints folder or one step folder.
        out: Folder to write, absent or empty; it appears complete or not at all.
        options: How.

    Raises:
        UserError: There is no whole checkpoint, the format cannot hold it, or out is taken or cannot be
            written.
    """
    options = options or ExportOptions()
    layout = LAYOUTS[options.layout]
    if options.regions and not layout.regions:
        raise UserError(f"--regions is not for --format {options.layout}; leave one of them out")
    refuse_taken(out)
    reader = open_checkpoint(checkpoint)
    config = run_config(reader)
    names = _names(reader, config, options.regions)

    def shapes(name: str) -> Tensor:
        return torch.empty(reader.shape(ENCODER + name), device="meta")

    def values(name: str) -> Tensor:
        return reader.read(ENCODER + name)

    planned = [(key, tensor.shape) for key, tensor in _tensors(layout, names, shapes, config.model)]
    parameters = sum(shape.numel() for _, shape in planned)
    projected = "projection.weight" in names
    settings = layout.config(config, options.dtype, options.regions, projected)
    facts = CardFacts(config, reader.manifest, parameters, options.license, out.name, options.regions)
    card = model_card(facts, layout, evaluation_section(reader.folder, options.evaluation))
    try:
        with new_folder(out) as partial:
            write_json(partial / "config.json", settings)
            write_json(partial / "preprocessor_config.json", layout.processor(config.model, config.data))
            (partial / "README.md").write_text(card, encoding="utf-8")
            for name, content in layout.code(options.regions).items():
                (partial / name).write_text(content, encoding="utf-8")
            shown = tqdm(names, desc="write", unit="tensor", disable=None)
            tensors = _tensors(layout, shown, values, config.model)
            size = write_weights(partial, planned, tensors, options.dtype, options.shard_bytes)
    except DamagedCheckpoint as error:
        raise copy_again(error) from error
    return Exported(reader.folder, out, reader.step, config.model, parameters, size)


def _names(reader: CheckpointReader, config: RunConfig, regions: bool) -> list[str]:
    """Names in RegionEncoder of what is exported, each of the shape that the settings say."""
    with torch.device("meta"):
        model = RegionEncoder(config.model, config.head.embedding_dim)
    names = []
    for name, parameter in model.named_parameters():
        of_regions = ".region." in name or name.startswith("projection.")
        # A starting checkpoint has no projection of its own; its regions are given without.
        if (of_regions and not regions) or (of_regions and ENCODER + name not in reader.names()):
            continue
        try:
            found = reader.shape(ENCODER + name)
        except DamagedCheckpoint as error:
            raise copy_again(error) from error
        if found != tuple(parameter.shape):
            raise UserError(
                f"{reader.folder}: {name} has the shape {list(found)}, its settings say "
                f"{list(parameter.shape)}; checkpoint and settings belong to different runs"
            )
        names.append(name)
    return names


def _tensors(
    layout: Layout, names: Iterable[str], read: Callable[[str], Tensor], config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors of the format, for the names of RegionEncoder that a checkpoint is read by."""
    for name in names:
        if name.startswith("projection."):
            yield name, read(name)
        else:
            yield from layout.tensors(name.removeprefix("vit."), read(name), config)
