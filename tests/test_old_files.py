"""This version reads what version 0.1.0 wrote: tests/fixtures holds a dataset and a run of two ranks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from launch import launch
from test_training import train

from megaregion.checkpoint.reader import CheckpointReader, config_from_dict
from megaregion.config import RunConfig
from megaregion.data.sample import parse_sample
from megaregion.data.shards import ShardedDataset

OLD = Path(__file__).parent / "fixtures"


def test_an_old_dataset_is_whole_and_every_sample_is_read() -> None:
    dataset = ShardedDataset(str(OLD / "dataset"))
    dataset.verify()
    records = [parse_sample(dataset.read(number).record) for number in range(len(dataset))]
    kinds = [region.kind for record in records for region in record.regions]
    assert (len(records), kinds.count("object"), kinds.count("text")) == (12, 19, 11)


def test_a_run_goes_on_from_an_old_checkpoint_with_the_losses_it_had_then(tmp_path: Path) -> None:
    shutil.copytree(OLD / "run", tmp_path / "run")
    then = [json.loads(line)["loss"] for line in (OLD / "run" / "metrics.jsonl").read_text().splitlines()]
    launch(_go_on, 1, str(tmp_path))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    now = {step["step"]: step["loss"] for step in map(json.loads, lines[len(then) :])}
    # It was written by two tensor ranks under ZeRO 1 and goes on in one process.
    assert now == {3: pytest.approx(then[2], rel=1e-4), 4: pytest.approx(then[3], rel=1e-4)}


def _go_on(folder: str) -> None:
    reader = CheckpointReader(OLD / "run" / "checkpoints" / "step-00000002")
    config: RunConfig = config_from_dict(reader.manifest["config"])
    train(
        dataclasses.replace(
            config,
            output=folder,
            data=dataclasses.replace(config.data, path=str(OLD / "dataset")),
            parallel=dataclasses.replace(config.parallel, tensor=1),
        ),
        resume_from=Path(folder) / "run" / "checkpoints",
    )
