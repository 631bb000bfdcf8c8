"""The loss guard and the slow-rank report in real runs on four ranks, and the guard's judgement alone."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from launch import launch
from test_training import checkpoint, differences, losses, train
from toy import toy_config, toy_dataset

from megaregion.config import GuardConfig
from megaregion.errors import UserError
from megaregion.training.faults import VARIABLE, Agreement, LossGuard

DP2_TP2 = {"parallel__tensor": 2, "train__micro_batch": 4, "train__steps": 5, "checkpoint__every": 2}
NAN_RUNS = {
    # A fault of rank 1 alone: the other rank of its model and the other model see nothing of it themselves.
    "features-zero1": ("nan:rank=1:step=3", DP2_TP2),
    "gradient-zero1": ("nan-gradient:rank=1:step=3", DP2_TP2),
    "gradient-zero0": ("nan-gradient:rank=1:step=3", {**DP2_TP2, "parallel__zero_stage": 0}),
    "gradient-zero2": ("nan-gradient:rank=1:step=3", {**DP2_TP2, "parallel__zero_stage": 2}),
    "gradient-zero3": ("nan-gradient:rank=1:step=3", {**DP2_TP2, "parallel__zero_stage": 3}),
    "gradient-bf16": ("nan-gradient:rank=1:step=3", {**DP2_TP2, "train__precision": "bf16"}),
}
WINDOW = {**DP2_TP2, "guard__rollback_after": 2}


def _runs(dataset: str, output: str) -> None:
    data, runs = Path(dataset), Path(output)

    def faulty(name: str, fault: str, **changes: object) -> None:
        os.environ[VARIABLE] = fault
        train(toy_config(data, runs, name, **changes))
        os.environ.pop(VARIABLE)

    for name, (fault, changes) in NAN_RUNS.items():
        faulty(name, fault, **changes)
    faulty("rolled-back", "nan:rank=1:step=4:count=4", **WINDOW)
    train(toy_config(data, runs, "undisturbed", **DP2_TP2))
    train(toy_config(data, runs, "unguarded", **DP2_TP2, guard__enabled=False, train__slow_factor=0.0))
    faulty("slow", "slow:rank=2:step=2:seconds=0.2", train__steps=3)
    os.environ[VARIABLE] = "nan:rank=0:step=3:count=99"
    with pytest.raises(UserError, match=r"went back 1 times .*point at the settings: lower optimizer\.lr"):
        train(toy_config(data, runs, "hopeless", **WINDOW, guard__max_rollbacks=1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("guard")
    dataset = toy_dataset(folder / "shards")
    launch(_runs, 4, str(dataset), str(folder / "runs"), timeout=400)
    return dataset, folder / "runs"


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", NAN_RUNS)
def test_a_step_with_nan_on_one_rank_is_skipped_everywhere_and_the_run_stays_healthy(
    name: str, runs: tuple[Path, Path]
) -> None:
    config = toy_config(*runs, name, **NAN_RUNS[name][1])
    assert len(losses(config)) == 5
    assert all(math.isfinite(loss) for loss in losses(config))
    [refusal] = lines(runs[1] / name / "guard.jsonl")
    assert refusal["step"] == 3
    assert sorted(refusal["positions"]) == list(range(32, 48))
    assert len(refusal["keys"]) == 16
    reader = checkpoint(config, 5)
    assert reader.manifest["position"] == 6 * 16, "the data of the skipped step were not used up"
    assert all(torch.isfinite(reader.read(tensor).float()).all() for tensor in reader.names())


def test_a_run_is_bit_identical_up_to_the_step_it_skips(runs: tuple[Path, Path]) -> None:
    undisturbed, config = (toy_config(*runs, n, **DP2_TP2) for n in ("undisturbed", "gradient-zero1"))
    assert losses(config)[:2] == losses(undisturbed)[:2]
    assert set(differences(checkpoint(config, 2), checkpoint(undisturbed, 2)).values()) == {0.0}


def test_the_samples_whose_features_were_not_finite_are_named(runs: tuple[Path, Path]) -> None:
    [refusal] = lines(runs[1] / "features-zero1" / "guard.jsonl")
    assert set(refusal["not_finite"]) <= set(refusal["keys"])
    assert refusal["loss"] == "nan"


def test_several_bad_steps_in_a_row_go_back_to_the_checkpoint_and_skip_that_data(
    runs: tuple[Path, Path],
) -> None:
    records = lines(runs[1] / "rolled-back" / "metrics.jsonl")
    # Two refusals return from step 3 to step 2; step 3 is taken again, and two more refusals return again.
    assert [record["step"] for record in records] == [1, 2, 3, 3, 3, 4, 5]
    assert records[-1]["rollbacks"] == 2
    assert records[-1]["skipped"] == 4
    assert all(math.isfinite(record["loss"]) for record in records)
    refused = lines(runs[1] / "rolled-back" / "guard.jsonl")
    assert [min(r["positions"]) for r in refused] == [48, 64, 96, 112]
    final = checkpoint(toy_config(*runs, "rolled-back", **WINDOW), 5)
    assert final.manifest["position"] == 16 * (7 + 4)
    assert final.manifest["guard"]["rollbacks"] == 2


def test_a_run_that_keeps_failing_ends_with_a_clear_error(runs: tuple[Path, Path]) -> None:
    assert len(lines(runs[1] / "hopeless" / "guard.jsonl")) == 4


def test_the_guard_changes_no_bit_of_an_undisturbed_run(runs: tuple[Path, Path]) -> None:
    one, other = (toy_config(*runs, n, **DP2_TP2) for n in ("undisturbed", "unguarded"))
    assert losses(one) == losses(other)
    assert set(differences(checkpoint(one, 5), checkpoint(other, 5)).values()) == {0.0}


def test_a_slow_rank_is_named_with_its_host(runs: tuple[Path, Path]) -> None:
    records = lines(runs[1] / "slow" / "metrics.jsonl")
    slow = [found for record in records[1:] for found in record["slow"]]
    assert {(found["rank"], found["host"]) for found in slow} == {(2, os.uname().nodename)}


# --- the judgement -----------------------------------------------------------------------------------------


def told(loss: float, finite: bool = True) -> Agreement:
    return Agreement(stopping=False, finite=finite, loss=loss)


def test_a_spike_is_judged_only_by_a_full_window_and_does_not_enter_it() -> None:
    guard = LossGuard(GuardConfig(window=8, spike=5.0))
    assert guard.judge(told(1e9)) is None
    for number in range(8):
        assert guard.judge(told(2.0 + 0.01 * number)) is None
    bound = guard.bound
    assert 2.2 < bound < 2.5
    assert "spike beyond the bound" in str(guard.judge(told(2.6)))
    assert guard.bound == bound
    assert guard.judge(told(1.0)) is None, "a loss that falls is no spike"


def test_a_guard_that_was_saved_decides_as_if_it_had_gone_on() -> None:
    first, second = (LossGuard(GuardConfig(window=4, spike=5.0, rollback_after=2)) for _ in range(2))
    for loss in (2.0, 2.1, 1.9, 2.05):
        first.judge(told(loss))
    first.judge(told(0.0, finite=False))
    second.load(json.loads(json.dumps(first.state())))
    assert second.bound == first.bound
    second.judge(told(9.0))
    assert second.wants_rollback
