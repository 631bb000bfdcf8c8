"""What may change from one start of a run to the next, and what not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from megaregion.bounds import shown
from megaregion.checkpoint.format import ENCODER
from megaregion.checkpoint.pretrained import FUNCTION
from megaregion.checkpoint.reader import CheckpointReader
from megaregion.config import RunConfig
from megaregion.data.info import DatasetInfo
from megaregion.errors import UserError
from megaregion.parallel.tensor_parallel import Placement
from megaregion.settings import sections

FIXED = {
    "model": (*FUNCTION, "region_layers", "region_weights"),
    "data": ("mean", "std"),
    "head": ("embedding_dim",),
}
"""Settings by section that give the weights their meaning: another value is refused. All others say how the
run computes, how long and on which images: another value is told and noted (tests list them, so that a new
setting must be decided)."""

LABELS = ("object_classes", "text_classes", "centers_sha256", "tokenizer_sha256")
"""What the heads learn, of a dataset."""

Change = tuple[Any, Any]
"""The old value and the new one."""


def dataset_facts(info: DatasetInfo) -> dict[str, Any]:
    """What a checkpoint says of the dataset that it was trained on."""
    labels = {key: getattr(info, key) for key in LABELS}
    return {"samples": info.samples, "shards": len(info.shards), **labels}


def facts(config: RunConfig, position: int, dataset: DatasetInfo, tensor: int, data: int) -> dict[str, Any]:
    """What a checkpoint at a position of the stream says of its run, in the values that JSON has.

    The image size of the model is the one that the encoder was trained on last.
    """
    size = config.stage(max(0, position - 1)).image_size
    present = dataclasses.replace(config, model=dataclasses.replace(config.model, image_size=size))
    content = {
        "config": dataclasses.asdict(present),
        "dataset": dataset_facts(dataset),
        "ranks": {"tensor": tensor, "data": data},
    }
    return dict(json.loads(json.dumps(content)))


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Change]:
    """What two manifests both name and say differently: settings, ranks, sizes of the dataset; by key."""
    found = {}
    old, new = theirs.get("config", {}), ours["config"]
    for section in sections(RunConfig()):
        for setting in section.settings:
            pair = (_value(old, setting.key), _value(new, setting.key))
            if None not in pair and pair[0] != pair[1]:
                found[setting.key] = pair
    for part in ("dataset", "ranks"):
        for key, value in ours[part].items():
            before = theirs.get(part, {}).get(key, value)
            if before != value:
                found[f"{part}.{key}"] = (before, value)
    return found


def told(changed: Mapping[str, Change]) -> str:
    """As "train.steps 10 -> 20, optimizer.lr 0.1 -> 0.2"."""
    return ", ".join(f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in changed.items())


def check_fits(
    reader: CheckpointReader, ours: Mapping[str, Any], placements: Mapping[str, Placement]
) -> dict[str, Change]:
    """Check that a run of which :func:`facts` says ``ours``, with these weights, may go on from there.

    Returns:
        What has changed, all of it free.

    Raises:
        UserError: It may not; the text says why.
    """
    dataset = reader.manifest.get("dataset")
    if not dataset:
        raise UserError(
            f"{reader.folder} holds an encoder to begin with and no run to go on with; give it as --init "
            "to a run with another --name"
        )
    for key in LABELS:
        if dataset.get(key) != ours["dataset"][key]:
            raise UserError(
                f"data.path {ours['config']['data']['path']} has {key} {ours['dataset'][key]}, but the heads "
                f"of {reader.folder} were trained with {dataset.get(key)}; use that dataset, or start a new "
                "run with another --name"
            )
    changed = changes(reader.manifest, ours)
    _refuse_fixed(reader, changed)
    for name, place in placements.items():
        known = f"{ENCODER}{name}" in reader.names()
        full = reader.shape(f"{ENCODER}{name}") if known else None
        if full != place.full_shape:
            found = list(full) if full else "no such tensor is"
            raise UserError(
                f"{name} has shape {list(place.full_shape)} by the settings and {found} in "
                f"{reader.folder}; use the model settings of that run (its config.yaml)"
            )
    return changed


def _refuse_fixed(reader: CheckpointReader, changed: Mapping[str, Change]) -> None:
    fixed = {f"{section}.{name}" for section, names in FIXED.items() for name in names}
    refused = {key: pair for key, pair in changed.items() if key in fixed}
    if refused:
        # --init takes weights of the same function only.
        apart = [f"model.{name}" for name in FUNCTION if f"model.{name}" in refused]
        limit = f", which asks for the same {', '.join(apart)}" if apart else ""
        raise UserError(
            f"the weights of {reader.folder} do not go on with {told(refused)}; take the old value, or begin "
            f"a run with another --name by --init {reader.folder}{limit}"
        )


def _value(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
