"""Evaluation beside training: looks at saved checkpoints, and no rank waits for it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from launch import free_port, tool
from toy_scenes import write_run, write_scenes, write_shards

from megaregion.checks import check_config
from megaregion.config import EvaluateConfig, RunConfig
from megaregion.data.info import read_info
from megaregion.errors import UserError
from megaregion.evaluation.background import evaluate_step
from megaregion.schemas.run import read_evaluations
from megaregion.training.beside import BackgroundEvaluation

SMALL = [
    "--model.image_size=48", "--model.patch_size=8", "--model.width=32", "--model.depth=2", "--model.heads=4",
    "--model.mlp_width=64", "--model.region_layers=1", "--data.workers=0", "--data.regions_per_image=3",
    "--head.embedding_dim=16", "--head.draw_images=1", "--train.global_batch=4", "--train.micro_batch=2",
    "--train.precision=fp32", "--optimizer.warmup_steps=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("background")
    write_shards(root / "shards", write_scenes(root / "scenes"))
    return root


def with_looks(**settings: object) -> RunConfig:
    return dataclasses.replace(RunConfig(), evaluate=EvaluateConfig(**settings))  # type: ignore[arg-type]


def test_a_run_on_two_ranks_is_evaluated_at_every_second_save_and_at_its_end(place: Path) -> None:
    script = [
        "tools/pretrain.py", *SMALL, "--name=run", "--train.steps=4", "--checkpoint.every=1",
        "--checkpoint.keep_last=4", "--evaluate.every=2", f"--evaluate.scenes={place / 'scenes'}",
        f"--data.path={place / 'shards'}", f"--output={place / 'runs'}",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = tool(*launcher, *script, environment={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    run = place / "runs" / "run"
    logs = "\n".join(file.read_text() for file in (run / "logs").glob("evaluation-*"))
    found = read_evaluations(run)
    # Step 4 came while step 2 was looked at: it waited, and the run's end waited for it.
    assert set(found) == {2, 4}, logs
    assert 0 <= found[4]["region/knn"] <= 1
    assert {"region/linear", "ocr/head_recall", "retrieval/class_at_5", "seconds"} <= set(found[4])
    assert "step      4 was evaluated" in done.stdout
    assert any((run / "tensorboard" / "evaluation" / "trained").iterdir())


def test_a_look_at_a_saved_step_measures_what_the_tool_measures(place: Path) -> None:
    from megaregion.evaluation.network import open_run
    from megaregion.evaluation.study import StudyConfig, evaluate

    dataset = place / "shards"
    folder = place / "runs" / "looked"
    settings = EvaluateConfig(40, str(place / "scenes"), "test", 16)
    write_run(folder, dataset, read_info(dataset).text_classes, evaluate=settings)
    evaluate_step(folder, 40)
    assert list(read_evaluations(folder)) == [40]
    study = evaluate(open_run(folder), StudyConfig(place / "scenes", dataset, limit=16, measures=("region",)))
    expected = study.tables[0].rows["trained"]["knn"]
    assert expected is not None
    assert read_evaluations(folder)[40]["region/knn"] == pytest.approx(expected.mean, abs=1e-4)


def test_of_two_looks_at_a_step_the_later_counts_and_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == {}
    looks = "".join(json.dumps({"step": 3, "seconds": seconds}) + "\n" for seconds in (1, 2))
    (tmp_path / "evaluations.jsonl").write_text(looks + '{"step": 6, "sec')
    assert read_evaluations(tmp_path) == {3: {"step": 3, "seconds": 2}}


def test_a_run_that_is_stopped_leaves_no_look_behind(place: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        with_looks(every=1, scenes=str(place / "scenes")), output=str(tmp_path), name="stopped"
    )
    looks = BackgroundEvaluation(config)
    # Its checkpoint never comes, so that the look waits.
    looks.after_save(5)
    child = looks._process
    assert child is not None
    assert child.poll() is None
    assert os.getpriority(os.PRIO_PROCESS, child.pid) == 19, "training and its loader go first"
    looks.after_save(7)
    looks.stop()
    assert child.returncode is not None
    looks.finish()
    assert read_evaluations(tmp_path / "stopped") == {}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"every": 1500, "scenes": "s"}, r"multiple of checkpoint.every 1000, got 1500; use 2000"),
        ({"every": 1000}, r"evaluate.scenes names no scene set"),
        ({"every": -1000, "scenes": "s"}, r"evaluate.every must lie in \[0, 1e9\]"),
        ({"threads": 0}, r"evaluate.threads must lie in \[1, 1024\]"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_way_out(
    settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        check_config(with_looks(**settings))


def test_scenes_that_are_missing_are_named_before_training_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train/truth.jsonl does not exist"):
        BackgroundEvaluation(with_looks(every=1000, scenes=str(tmp_path)))
