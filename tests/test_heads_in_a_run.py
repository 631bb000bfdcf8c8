"""The heads as a run uses them: over nodes, with a census, and with the numbers that it logs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from launch import launch
from toy import toy_config, toy_dataset

from megaregion.config import RunConfig
from megaregion.errors import UserError

WAYS = {"by-node": "on", "flat": "off"}
"""head.hierarchical by name of the run."""


def _runs(dataset: str, output: str) -> None:
    """Four ranks that take themselves for two nodes of two."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    data, runs = Path(dataset), Path(output)
    for name, way in WAYS.items():
        train(toy_config(data, runs, name, head__hierarchical=way, head__census_every=2, head__idle_steps=1))
    with pytest.raises(UserError, match="hierarchical on needs several nodes"):
        train(toy_config(data, runs, "refused", head__hierarchical="on", parallel__tensor=2))


def train(config: RunConfig) -> None:
    """One run in this process group, in which object class 31 starts with the center of class 4."""
    import torch

    from megaregion.errors import StopRequest
    from megaregion.heads.centers import random_centers
    from megaregion.parallel import topology
    from megaregion.training.metrics import open_log
    from megaregion.training.trainer import Trainer

    place = topology.join(config.parallel.tensor)
    folder = Path(config.output) / config.name
    open_log(folder / "logs", place.rank)
    torch.distributed.barrier()
    trainer = Trainer(config, place, StopRequest())
    head = trainer.heads.by_kind["object"]
    assert (head.topology.node_groups is not None) == (config.name == "by-node")
    if 31 in head.local:
        head.weight[31 - head.local.start] = random_centers(config.seed, "object", range(4, 5), head.dim)[0]
    assert trainer.run() == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    dataset = toy_dataset(tmp_path_factory.mktemp("shards"))
    launch(_runs, 4, str(dataset), str(output))
    return output


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_over_nodes_learns_what_a_flat_one_learns(runs: Path) -> None:
    flat = [record["loss"] for record in records(runs / "flat")]
    assert [record["loss"] for record in records(runs / "by-node")] == pytest.approx(flat, rel=1e-5)


def test_every_step_logs_the_draws_rate_its_positives_and_the_heads_share_of_time(runs: Path) -> None:
    for record in records(runs / "flat"):
        assert 0.3 < record["object/sample_rate"] < 1
        assert record["text/sample_rate"] == 1.0
        assert 0 < record["object/positive_share"] < 1
        assert 0 < record["head_share"] < 1


def test_a_run_reports_idle_classes_and_centers_that_have_a_double(runs: Path) -> None:
    found = records(runs / "flat")
    assert ["object/idle_share" in record for record in found] == [False, True, False]
    assert 0 < found[1]["object/idle_share"] < 1
    assert found[1]["object/alike_share"] == pytest.approx(2 / 37)
    log = (runs / "flat" / "logs" / "rank-00.log").read_text()
    assert "of 37 classes had no region in the last 1 steps; 2 of 37 probed centers have a double" in log
    assert "4 ~ 31" in log
    assert "31 ~ 4" in log
