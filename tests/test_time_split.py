"""What a run says of its time: phases by rank, utilisation, and the files of a profile."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from launch import tool
from toy import toy_dataset

from megaregion.errors import UserError
from megaregion.training.clock import PHASES, Clock, RankTimes, Times, matrix_rate, parse_window

CPU = torch.device("cpu")
TOY = [
    "--model.image_size=32", "--model.patch_size=8", "--model.width=32", "--model.depth=2", "--model.heads=4",
    "--model.mlp_width=64", "--model.region_layers=1", "--data.workers=0", "--data.regions_per_image=3",
    "--head.embedding_dim=16", "--train.global_batch=8", "--train.micro_batch=4", "--train.precision=fp32",
    "--train.steps=4", "--optimizer.warmup_steps=0", "--data.packing=native",
]  # fmt: skip


def rank_times(own: float = 0.0, steps: float = 0.0, **phases: float) -> RankTimes:
    return RankTimes({**dict.fromkeys(PHASES, 0.0), **phases}, own, 0.0, steps)


def test_a_phase_inside_another_takes_its_time_from_it() -> None:
    clock = Clock(CPU)
    with clock.span("backward"):
        time.sleep(0.02)
        with clock.span("communication"):
            time.sleep(0.2)
    time.sleep(0.1)
    began = time.perf_counter()
    with clock.span("data"):
        time.sleep(0.02)
    seconds = clock.take().phases
    assert seconds["communication"] >= 0.2
    assert seconds["backward"] >= 0.02
    assert seconds["data"] <= time.perf_counter() - began
    assert clock.take().phases == dict.fromkeys(PHASES, 0.0)


def test_the_slowest_rank_of_each_phase_is_named() -> None:
    times = Times((rank_times(data=1.0, head=3.0), rank_times(data=2.0, head=1.0)))
    assert times.slowest() == {"data": 1, "head": 0}
    assert times.mean()["data"] == 1.5
    assert "1 on b: 2.000 s" in times.table(["a", "b"])


def test_a_rank_is_slow_by_its_own_time_and_by_enough_of_a_step() -> None:
    times = Times(tuple(rank_times(own=own, steps=10.0) for own in (1.0, 1.0, 1.2, 2.0)))
    assert times.slow_ranks(1.5) == {3: pytest.approx(2.0 / 1.1)}
    assert times.slow_ranks(0) == {}
    jitter = Times(tuple(rank_times(own=own, steps=10.0) for own in (0.01, 0.01, 0.4)))
    assert jitter.slow_ranks(1.5) == {}


def test_own_time_leaves_out_what_a_forward_pass_waits_for_others() -> None:
    for waits_inside in (False, True):
        clock = Clock(CPU, waits_inside)
        clock.begin_step(1)
        with clock.span("data"):
            time.sleep(0.05)
        with clock.span("forward"):
            time.sleep(0.2)
        clock.end_step(bad=0)
        found = clock.take()
        assert found.data >= 0.05
        assert (found.own - found.data >= 0.2) is not waits_inside


@pytest.mark.parametrize(("text", "window"), [("7", (7, 9)), ("3:", (3, 5)), ("3:20", (3, 20))])
def test_a_window_of_steps_is_read(text: str, window: tuple[int, int]) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize("text", ["x", "0", "9:3"])
def test_a_window_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--profile"):
        parse_window(text)


def test_the_matrix_rate_is_that_of_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ones take less power, and a GPU's clock stays high."""
    operands: list[torch.Tensor] = []
    monkeypatch.setattr("megaregion.training.clock.product", lambda *given, **_: operands.extend(given))
    assert matrix_rate.__wrapped__(CPU, torch.float32) > 0
    assert all(0.9 < operand.std() < 1.1 for operand in operands)
    assert operands[0].ne(operands[1]).any()


def test_a_run_splits_its_time_and_writes_a_profile(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "shards", samples=16)
    command = [
        "tools/pretrain.py", *TOY, f"--data.path={dataset}",
        f"--output={tmp_path}", "--name=toy", "--profile=2:3",
    ]  # fmt: skip
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "toy"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert 0 < record["mfu"] < 1
        assert len(record["time_by_rank"]) == 1
        assert record["time/forward"] > 0
        assert record["time/optimizer"] > 0
        assert record["slowest"]["backward"] == 0
    assert "slowest rank" in done.stdout
    with gzip.open(run / "profile" / "rank-00.trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "aten::_fused_adamw_", "forward", "optimizer"} <= names
    memory = json.loads((run / "profile" / "rank-00.memory.json").read_text())
    assert memory["peak_bytes"] > 1e6
    assert memory["operations"][0]["bytes"] > 0
