"""The loss guard and the slow-rank report in real runs on four ranks, and the guard's judgement alone."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from launch import launch, tool
from test_training import checkpoint, differences, losses, train
from toy import toy_config, toy_dataset, toy_vision

from megaregion.config import GuardConfig, RunConfig
from megaregion.data.batch import read_batch
from megaregion.errors import StopRequest, UserError
from megaregion.parallel import topology
from megaregion.parallel.tensor_parallel import Placement
from megaregion.training.faults import VARIABLE, Agreement, LossGuard
from megaregion.training.replay import replay
from megaregion.training.trainer import Trainer

POISONED = "vit.blocks.1.mlp.fc1"
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
TAUGHT = ("features-zero1", "gradient-zero2")
"""Those with a teacher."""
WINDOW = {**DP2_TP2, "guard__rollback_after": 2}


def _runs(dataset: str, output: str) -> None:
    data, runs = Path(dataset), Path(output)

    def faulty(name: str, fault: str, **changes: object) -> None:
        os.environ[VARIABLE] = fault
        train(toy_config(data, runs, name, **changes))
        os.environ.pop(VARIABLE)

    # Nothing can be kept there.
    (runs / "gradient-zero0").mkdir(parents=True, exist_ok=True)
    (runs / "gradient-zero0" / "captures").touch()
    taught = {"distill__teacher": str(data / "teacher")}
    for name, (fault, changes) in NAN_RUNS.items():
        faulty(name, fault, **changes, **(taught if name in TAUGHT else {}))
    faulty("rolled-back", "nan:rank=1:step=4:count=4", **WINDOW)
    _poisoned(toy_config(data, runs, "poisoned", **DP2_TP2, **taught))
    train(toy_config(data, runs, "undisturbed", **DP2_TP2))
    train(toy_config(data, runs, "unguarded", **DP2_TP2, guard__enabled=False, train__slow_factor=0.0))
    faulty("slow", "slow:rank=2:step=2:seconds=0.2", train__steps=3)
    os.environ[VARIABLE] = "nan:rank=0:step=3:count=99"
    with pytest.raises(UserError, match=r"went back 1 times .*point at the settings: lower optimizer\.lr"):
        train(toy_config(data, runs, "hopeless", **WINDOW, guard__max_rollbacks=1))


def _poisoned(config: RunConfig) -> None:
    """A run one of whose weights becomes NaN after two steps, and its replay on the same ranks."""
    place = topology.join(config.parallel.tensor)
    (Path(config.output) / config.name).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    trainer = Trainer(config, place, StopRequest())
    batches = trainer.batches()
    for _ in range(2):
        assert trainer.train_step(batches)
    trainer.state.save()
    assert trainer.state.finish()
    reader = checkpoint(config, 2)

    def poisoned(name: str, at: Placement) -> torch.Tensor:
        values = reader.read(f"body.{name}", at.offset, at.shape)
        # Of the second tensor rank's part alone.
        if name == f"weight.{POISONED}.weight" and at.offset[0] > 0:
            values[-1, 3] = math.nan
        return values

    trainer.engine.load(poisoned, 2)
    for _ in range(2):
        assert not trainer.train_step(batches)
    trainer.loader.close()
    told = replay(Path(config.output) / config.name / "captures" / "step-00000002", config, place)
    if place.rank == 0:
        (Path(config.output) / config.name / "replay.json").write_text(json.dumps(told))
    for group in (place.data_group, place.tensor_group):
        torch.distributed.destroy_process_group(group)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("guard")
    dataset = toy_dataset(folder / "shards")
    toy_vision("Dinov2", dataset / "teacher")
    launch(_runs, 4, str(dataset), str(folder / "runs"), timeout=400)
    return dataset, folder / "runs"


@pytest.mark.parametrize("topology_of", ["tensor 2 x data 2", "tensor 1 x data 1"])
def test_a_step_with_a_nan_weight_is_kept_and_its_replay_names_where_the_nan_begins(
    topology_of: str, runs: tuple[Path, Path]
) -> None:
    folder = runs[1] / "poisoned" / "captures" / "step-00000002"
    kept = json.loads((folder / "capture.json").read_text())
    assert (kept["step"], kept["loss"], kept["ranks"]) == (3, "nan", {"tensor": 2, "data": 2})
    assert len(list(folder.glob("batch-*.safetensors"))) == 4
    assert [f.name for f in folder.parent.iterdir() if f.is_dir()] == [folder.name], "guard.captures is 1"
    if topology_of == "tensor 2 x data 2":
        told = json.loads((runs[1] / "poisoned" / "replay.json").read_text())
        output = told["first output not finite"]
        assert told["ranks"] == topology_of
        assert told["loss"] == "nan"
    else:
        done = tool("tools/replay.py", folder)
        assert done.returncode == 0, done.stderr
        assert topology_of in done.stdout
        assert f"first weight not finite    {POISONED}.weight, 1 of " in done.stdout
        assert kept["keys"][0] in done.stdout
        [output] = [line for line in done.stdout.splitlines() if line.startswith("first output")]
    assert f"{POISONED}, " in output
    assert not (folder / ".replay").exists()


def test_a_capture_that_fails_stops_no_run(runs: tuple[Path, Path]) -> None:
    assert (runs[1] / "gradient-zero0" / "captures").is_file()
    log = (runs[1] / "gradient-zero0" / "guard.jsonl").read_text()
    assert json.loads(log)["step"] == 3
    assert len(losses(toy_config(*runs, "gradient-zero0"))) == 5


def test_a_captured_batch_is_the_one_that_the_run_took(runs: tuple[Path, Path]) -> None:
    folder = runs[1] / "gradient-zero1" / "captures" / "step-00000002"
    kept = json.loads((folder / "capture.json").read_text())
    batches = [read_batch(folder, number) for number in range(4)]
    assert [key for batch in batches for key in batch.keys] != []
    assert sorted(key for batch in batches for key in batch.keys) == sorted(kept["keys"])
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(32, 48))
    done = tool("tools/replay.py", folder)
    assert done.returncode == 0, done.stderr
    assert "All of it is finite here: suspect the machine" in done.stdout
    done = tool("tools/replay.py", folder, environment={**os.environ, VARIABLE: "nan-gradient:step=3"})
    assert "first output not finite    none" in done.stdout
    assert "first gradient not finite  projection" in done.stdout


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
