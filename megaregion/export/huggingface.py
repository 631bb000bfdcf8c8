"""Folders that ``AutoModel`` and ``AutoImageProcessor`` load: a checkpoint becomes one, or begins with one.

Needs neither the ranks that wrote a checkpoint nor their libraries: torch and safetensors suffice. One
parameter is in memory at a time. layouts.py says how the formats differ.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from megaregion.checkpoint.format import (
    BODY,
    ENCODER,
    Piece,
    publish,
    step_folder,
    unfinished_folder,
    write_pieces,
)
from megaregion.checkpoint.pretrained import FUNCTION, PROJECTION, QUERY, EncoderFolder, Pretrained
from megaregion.checkpoint.reader import (
    CheckpointReader,
    DamagedCheckpoint,
    copy_again,
    open_checkpoint,
    run_config,
)
from megaregion.config import ModelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.export.folder import filled, grouped, refuse_taken, write_json, write_weights
from megaregion.export.hub import CARD, measured_at, model_card
from megaregion.export.layouts import (
    ASPECT,
    ASPECT_CODE,
    LAYOUTS,
    REGION_CODE,
    aspect_processor,
    region_config,
    text_config,
)
from megaregion.models import RegionEncoder

GROUP = 256 * 2**20
"""Bytes of weights that one file of a starting checkpoint holds, and that lie in memory at once."""


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written."""

    dtype: torch.dtype = torch.float32
    """Type of the weights."""
    layout: str = "mlcd"
    """Whose names and settings: a key of ``LAYOUTS``."""
    regions: bool = False
    """Add the projection, region tokens' own weights or query and the class with ``get_region_features``."""
    license: str = "unknown"
    """The hub's identifier of the weights' licence, for the card."""
    shard_bytes: int = 5 * 10**9
    """Most bytes of weights in one file."""
    evaluation: Path | None = None
    """evaluation.json for the card; the run's own if None."""
    llm: Path | None = None
    """config.json of the LLM that the layout's patch merger will feed, if it is known."""


@dataclass(frozen=True)
class Exported:
    """What was written, and from what."""

    checkpoint: Path
    """The step folder that was read."""
    step: int
    """Optimizer steps taken."""
    model: ModelConfig
    """The model's settings."""
    parameters: int
    """Parameters of the exported model."""
    size: int
    """Size of all weights, in bytes."""


def export_checkpoint(checkpoint: Path, out: Path, options: ExportOptions | None = None) -> Exported:
    """Write the encoder of a checkpoint of any topology in other people's format.

        OUT/model.safetensors  config.json  preprocessor_config.json  README.md

    OUT, which is absent or empty, appears complete or not at all. The heads stay behind, and so do the
    projection and region tokens' own weights and query unless ``regions`` asks for them.

    Raises:
        UserError: There is no whole checkpoint, the format cannot hold it, or out is taken or cannot be
            written.
    """
    options = options or ExportOptions()
    layout = LAYOUTS[options.layout]
    if options.regions and not layout.regions:
        raise UserError(f"--regions is not for --format {options.layout}; leave one of them out")
    if options.llm and layout.merged == 1:
        raise UserError(
            f"--llm is not for --format {options.layout}, which has no patch merger; leave it out"
        )
    text = {} if options.llm is None else text_config(options.llm)
    refuse_taken(out)
    reader = open_checkpoint(checkpoint)
    config = run_config(reader)
    if config.model.registers and not options.regions:
        raise UserError(
            f"model.registers {config.model.registers} of this checkpoint have no place in the plain format "
            f"{options.layout}; use --format mlcd --regions, whose class knows them"
        )
    names = _names(reader, config, options.regions)

    def tensors(names: Iterable[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield from layout.tensors(name, read(reader.encoder(name)), config.model)

    shapes = tensors(names, lambda name: torch.empty(reader.shape(name), device="meta"))
    planned = [(key, tensor.shape) for key, tensor in shapes]
    parameters = sum(shape.numel() for _, shape in planned)
    settings = layout.settings(config.model, options.dtype) | text
    if options.regions:
        settings |= region_config(config, projected=PROJECTION in names)
    card = model_card(
        measured_at(reader.folder, out.name, options.evaluation),
        name=out.name, config=config, manifest=reader.manifest, step=reader.step, parameters=parameters,
        layout=options.layout, multiple=config.model.patch_size * layout.merged, text=text,
        regions=options.regions, license=options.license,
    )  # fmt: skip
    try:
        with filled(out) as folder:
            write_json(folder / "config.json", settings)
            write_json(folder / "preprocessor_config.json", layout.processor(config.model, config.data))
            (folder / CARD).write_text(card, encoding="utf-8")
            if options.regions:
                _write_code(folder, config)
            given = tensors(tqdm(names, desc="write", unit="tensor", disable=None), reader.read)
            size = write_weights(folder, planned, given, options.dtype, options.shard_bytes)
    except DamagedCheckpoint as error:
        raise copy_again(error) from error
    return Exported(reader.folder, reader.step, config.model, parameters, size)


def _write_code(folder: Path, config: RunConfig) -> None:
    """The region class and the processor that keeps shapes, with its settings."""
    for code in (REGION_CODE, ASPECT_CODE):
        shutil.copyfile(code, folder / code.name)
    (folder / ASPECT).mkdir()
    settings = aspect_processor(config.model, config.data)
    write_json(folder / ASPECT / "preprocessor_config.json", settings)


def _names(reader: CheckpointReader, config: RunConfig, regions: bool) -> list[str]:
    """Names in RegionEncoder of what is exported, each of the shape that the settings say."""
    with torch.device("meta"):
        model = RegionEncoder(config.model, config.head.embedding_dim)
    names = []
    for name, parameter in model.named_parameters():
        of_regions = ".region." in name or name in (PROJECTION, f"vit.{QUERY}")
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


def write_start(source: Path, out: Path, image_size: int | None = None) -> tuple[Pretrained, int]:
    """Turn a HuggingFace folder into a starting checkpoint, which any topology reads.

        OUT/checkpoints/step-00000000/...   weights of the transformer, nothing else
        OUT/model.yaml                      settings that a run on these weights needs

    OUT, which is absent or empty, appears complete or not at all. Gives what was read, with the side of the
    images to train on (the folder's own if None), and the number of parameters.

    Raises:
        UserError: The folder cannot be read, the patch does not divide the size, or out cannot be written.
    """
    refuse_taken(out)
    theirs = EncoderFolder(source)
    model = dataclasses.replace(theirs.model, image_size=image_size or theirs.model.image_size)
    if model.image_size % model.patch_size or model.image_size < 1:
        near = max(1, round(model.image_size / model.patch_size)) * model.patch_size
        raise UserError(
            f"--image-size must be a multiple of the patch of {model.patch_size} px, got {model.image_size}; "
            f"use {near}"
        )
    run = RunConfig(name=out.name, model=model, data=theirs.data)
    if theirs.embedding_dim is not None:
        run = dataclasses.replace(run, head=dataclasses.replace(run.head, embedding_dim=theirs.embedding_dim))
    with filled(out) as folder:
        checkpoints = folder / "checkpoints"
        unfinished = unfinished_folder(checkpoints, 0, 0)
        unfinished.mkdir(parents=True)
        count = 0
        for number, group in enumerate(grouped(_pieces(theirs), lambda piece: piece.tensor.nbytes, GROUP)):
            count += sum(piece.tensor.numel() for piece in group)
            write_pieces(unfinished, number, group)
        facts = {"step": 0, "position": 0, "config": dataclasses.asdict(run), "dataset": {}}
        publish(unfinished, step_folder(checkpoints, 0), facts)
        needed = {
            "model": {key: getattr(model, key) for key in ("image_size", *FUNCTION, *theirs.of_regions)},
            "data": {"mean": list(run.data.mean), "std": list(run.data.std)},
        }
        if theirs.of_regions:
            needed["data"]["patch_coverage"] = run.data.patch_coverage
        (folder / "model.yaml").write_text(
            "# Give it as a last --config to tools/pretrain.py, with --init and this folder.\n"
            + yaml.safe_dump(needed, sort_keys=False)
        )
    return Pretrained(theirs, model, theirs.data, tuple(theirs.notices)), count


def _pieces(source: EncoderFolder) -> Iterator[Piece]:
    named = [(f"{BODY}{name}", name) for name in source.names()]
    if source.embedding_dim is not None:
        named.append((f"{ENCODER}{PROJECTION}", PROJECTION))
    for key, name in named:
        tensor = source.read(name)
        yield Piece(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor)
