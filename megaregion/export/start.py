"""What a run begins with instead of drawn weights: a checkpoint of ours, or somebody's HuggingFace folder.

Only the transformer's weights are taken. The projection and the heads belong to the classes of one dataset
and are new; step, position and moments are those of a new run. The image size is free, for rotary positions
have no table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megaregion.checkpoint.format import step_folder, unfinished_folder
from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint, Piece
from megaregion.checkpoint.writer import publish, write_pieces
from megaregion.config import DataConfig, ModelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.export.encoder_folder import PROJECTION, EncoderFolder, is_encoder_folder
from megaregion.export.folder import new_folder, refuse_taken
from megaregion.export.huggingface import BODY, open_checkpoint, run_config
from megaregion.models import VisionTransformer

GROUP = 256 * 2**20
"""Bytes of weights that one file of a starting checkpoint holds, and that lie in memory at once."""

FUNCTION = ("patch_size", "width", "depth", "heads", "mlp_width", "activation", "norm_eps", "rope_theta")
"""Settings that weights only make sense with."""


@dataclass(frozen=True)
class Start:
    """Weights to begin with."""

    source: EncoderFolder | CheckpointReader
    model: ModelConfig
    """Settings of the transformer that they belong to."""
    data: DataConfig
    """Mean and deviation of the images it saw."""
    notices: tuple[str, ...]
    """What a user should know of them, a line each."""

    def read(self, name: str) -> Tensor:
        """One parameter under its name in VisionTransformer, float32.

        Raises:
            UserError: It is missing or damaged.
        """
        if isinstance(self.source, EncoderFolder):
            return self.source.read(name)
        try:
            return self.source.read(f"{BODY}{name}").float()
        except DamagedCheckpoint as error:
            raise UserError(f"{error}; copy the checkpoint again") from error

    def advice(self, config: RunConfig) -> list[str]:
        """What a user who begins a run with these weights should know."""
        found = list(self.notices)
        if (self.data.mean, self.data.std) != (config.data.mean, config.data.std):
            found.append(
                f"they saw images normalised by data.mean {list(self.data.mean)} and data.std "
                f"{list(self.data.std)}, this run has others"
            )
        return found


def open_start(path: Path, verify: bool = True) -> Start:
    """Open a HuggingFace folder, a run's folder, its checkpoints folder or one checkpoint.

    Args:
        path: The folder.
        verify: Compare a checkpoint with its checksums; of many ranks one is enough.

    Raises:
        UserError: It is none of them, or damaged.
    """
    if is_encoder_folder(path):
        return _of_folder(EncoderFolder(path))
    reader = open_checkpoint(path, verify)
    config = run_config(reader)
    return Start(reader, config.model, config.data, ())


def _of_folder(folder: EncoderFolder) -> Start:
    return Start(folder, folder.model, folder.data, tuple(folder.notices))


@torch.no_grad()
def begin(vit: VisionTransformer, start: Start) -> None:
    """Put weights into a transformer, whole on this rank; its image size may be another.

    Region tokens' own weights become copies of the blocks' where there are none yet, as in a new run.

    Raises:
        UserError: The transformer's settings are others.
    """
    theirs, ours = start.model, vit.config
    other = [key for key in FUNCTION if getattr(theirs, key) != getattr(ours, key)]
    if other:
        told = ", ".join(f"model.{key} {getattr(theirs, key)} and not {getattr(ours, key)}" for key in other)
        raise UserError(
            f"init: the weights in {_folder(start)} need {told}; set them, or add the model.yaml that "
            "tools/convert_checkpoint.py from-hf writes as a last --config"
        )
    for name, parameter in vit.named_parameters():
        parameter.copy_(start.read(_source(name, ours, theirs)))


def _source(name: str, ours: ModelConfig, theirs: ModelConfig) -> str:
    """Whose values a parameter takes: for a region token's own weights perhaps the block's."""
    if ".region." not in name:
        return name
    block = int(name.split(".")[1])
    if theirs.region_weights == "separate" and block >= theirs.depth - theirs.region_layers:
        return name
    return name.replace(".region.", ".")


def _folder(start: Start) -> Path:
    return start.source.folder


def write_start(source: Path, out: Path, image_size: int | None = None) -> tuple[Start, int]:
    """Turn a HuggingFace folder into a starting checkpoint, which any topology reads.

        OUT/checkpoints/step-00000000/...   weights of the transformer, nothing else
        OUT/model.yaml                      settings that a run on these weights needs

    Args:
        source: The folder.
        out: Folder to write, absent or empty; it appears complete or not at all.
        image_size: Side of the images to train on; the folder's own if None.

    Returns:
        What was read, with that image size, and the number of parameters.

    Raises:
        UserError: The folder cannot be read, the patch does not divide the size, or out cannot be written.
    """
    refuse_taken(out)
    folder = EncoderFolder(source)
    start = _of_folder(folder)
    model = dataclasses.replace(start.model, image_size=image_size or start.model.image_size)
    if model.image_size % model.patch_size or model.image_size < 1:
        near = max(1, round(model.image_size / model.patch_size)) * model.patch_size
        raise UserError(
            f"--image-size must be a multiple of the patch of {model.patch_size} px, got {model.image_size}; "
            f"use {near}"
        )
    run = RunConfig(name=out.name, model=model, data=start.data)
    width = folder.embedding_dim
    if width is not None:
        run = dataclasses.replace(run, head=dataclasses.replace(run.head, embedding_dim=width))
    with new_folder(out) as partial:
        checkpoints = partial / "checkpoints"
        unfinished = unfinished_folder(checkpoints, 0, 0)
        unfinished.mkdir(parents=True)
        count = 0
        for number, group in enumerate(_groups(folder)):
            count += sum(piece.tensor.numel() for piece in group)
            write_pieces(unfinished, number, group)
        facts = {"step": 0, "position": 0, "config": dataclasses.asdict(run), "dataset": {}}
        publish(unfinished, step_folder(checkpoints, 0), facts)
        (partial / "model.yaml").write_text(_settings(run))
    return dataclasses.replace(start, model=model), count


def _groups(source: EncoderFolder) -> Iterator[list[Piece]]:
    """The parameters in groups of bounded size, each a file of the checkpoint."""
    group: list[Piece] = []
    size = 0
    named = [(f"{BODY}{name}", name) for name in source.names()]
    if source.embedding_dim is not None:
        named.append((f"body.weight.{PROJECTION}", PROJECTION))
    for key, name in named:
        tensor = source.read(name)
        if group and size + tensor.nbytes > GROUP:
            yield group
            group, size = [], 0
        group.append(Piece(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor))
        size += tensor.nbytes
    yield group


def _settings(run: RunConfig) -> str:
    model = {key: getattr(run.model, key) for key in ("image_size", *FUNCTION)}
    data = {"mean": list(run.data.mean), "std": list(run.data.std)}
    return (
        "# Give it as a last --config to tools/pretrain.py, with --init and this folder.\n"
        + yaml.safe_dump({"model": model, "data": data}, sort_keys=False)
    )
