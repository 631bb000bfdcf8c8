"""A HuggingFace folder as a checkpoint that a run begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import yaml

from megaregion.checkpoint.format import (
    BODY,
    ENCODER,
    Piece,
    publish,
    step_folder,
    unfinished_folder,
    write_pieces,
)
from megaregion.checkpoint.pretrained import FUNCTION, PROJECTION, EncoderFolder, Pretrained
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.export.folder import new_folder, refuse_taken

GROUP = 256 * 2**20
"""Bytes of weights that one file of a starting checkpoint holds, and that lie in memory at once."""


def write_start(source: Path, out: Path, image_size: int | None = None) -> tuple[Pretrained, int]:
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
    model = dataclasses.replace(folder.model, image_size=image_size or folder.model.image_size)
    if model.image_size % model.patch_size or model.image_size < 1:
        near = max(1, round(model.image_size / model.patch_size)) * model.patch_size
        raise UserError(
            f"--image-size must be a multiple of the patch of {model.patch_size} px, got {model.image_size}; "
            f"use {near}"
        )
    run = RunConfig(name=out.name, model=model, data=folder.data)
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
    return Pretrained(folder, model, folder.data, tuple(folder.notices)), count


def _groups(source: EncoderFolder) -> Iterator[list[Piece]]:
    """The parameters in groups of bounded size, each a file of the checkpoint."""
    group: list[Piece] = []
    size = 0
    named = [(f"{BODY}{name}", name) for name in source.names()]
    if source.embedding_dim is not None:
        named.append((f"{ENCODER}{PROJECTION}", PROJECTION))
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
