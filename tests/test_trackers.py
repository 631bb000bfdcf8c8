"""Trackers: what they are shown, as one run over all starts, and that one that fails costs nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from launch import repository, tool
from PIL import Image
from test_run import SMALL
from toy import toy_dataset

from megaregion.config import MetricsConfig, RunConfig
from megaregion.files import read_records
from megaregion.schemas.evaluation import Column, Estimate, Table
from megaregion.training import metrics
from megaregion.training.metrics import LOG, Shown, Trackers, open_log

TABLE = Table(
    "region", "Naming regions", "Two objects.", (Column("knn", "5-NN", 0.5),),
    {
        "trained": {"knn": Estimate(0.75, 0.7, 0.8, (0.75,))},
        "model/crops": {"knn": Estimate(0.25, 0.2, 0.3, (0.25,))},
    },
)  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    theirs = ("WANDB", "MLFLOW", "TRACKIO")
    ours = {key: text for key, text in os.environ.items() if not key.startswith(theirs)}
    quiet = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**ours, **quiet, "OMP_NUM_THREADS": "1", **more}


def run_of(output: Path, *loggers: str) -> RunConfig:
    return RunConfig(name="run", output=str(output), metrics=MetricsConfig(loggers=loggers))  # type: ignore[arg-type]


def records_of_wandb(run: Path) -> Iterator[tuple[str, Any]]:
    """What its files hold, read by its own messages; they lie in a log of LevelDB's form."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        content, at, waiting = file.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if (left := 2**15 - at % 2**15) < 7:
                at += left
                continue
            size, kind = struct.unpack_from("<HB", content, at + 4)
            waiting += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record, waiting = Record.FromString(waiting), b""
                name = record.WhichOneof("record_type")
                yield name, getattr(record, name)


def mlflow_of(output: Path) -> Any:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    return MlflowClient(str(output / "mlruns"))


def history_of_wandb(run: Path) -> list[dict[str, Any]]:
    lines = []
    for name, record in records_of_wandb(run):
        if name == "history":
            lines.append({"/".join(item.nested_key): json.loads(item.value_json) for item in record.item})
    return lines


# ---- a run of two starts ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that goes on from the second of them with another learning rate, to the fifth."""
    output = tmp_path_factory.mktemp("twice")
    data = toy_dataset(output / "shards", samples=12, shards=2)
    flags = [
        *SMALL, f"--data.path={data}", f"--output={output}", "--name=run", "--checkpoint.every=2",
        "--metrics.loggers=tensorboard,wandb,mlflow", "--metrics.project=ours",
    ]  # fmt: skip
    for changes in (["--train.steps=4"], ["--train.steps=5", "--optimizer.lr=5e-4", "--resume=auto"]):
        done = tool("tools/pretrain.py", *flags, *changes, environment=environment())
        assert done.returncode == 0, done.stderr[-3000:]
        assert "fails" not in done.stdout
        shutil.rmtree(output / "run" / "checkpoints" / "step-00000004", ignore_errors=True)
    return output


def test_a_run_that_goes_on_from_an_earlier_step_is_one_run_of_wandb_with_both_values_of_a_step(
    twice: Path,
) -> None:
    runs = [record for name, record in records_of_wandb(twice / "run") if name == "run"]
    assert [run.run_id for run in runs] == [(twice / "run" / "wandb.id").read_text().strip()] * 2
    assert {(run.project, run.display_name) for run in runs} == {("ours", "run")}
    settings = [{item.key: item.value_json for item in run.config.update} for run in runs]
    assert [json.loads(one["optimizer.lr"]) for one in settings] == [1e-3, 5e-4]
    lines = [line for line in history_of_wandb(twice / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 3, 4, 5]
    told = {line["step"]: line["loss"] for line in read_records(twice / "run" / "metrics.jsonl")}
    assert {line["step"]: line["loss"] for line in lines} == told


def test_and_one_run_of_mlflow_which_keeps_both_values_and_the_changed_setting(twice: Path) -> None:
    client = mlflow_of(twice)
    experiment = client.get_experiment_by_name("ours")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (twice / "run" / "mlflow.id").read_text().strip()
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert (run.data.params["optimizer.lr"], run.data.tags["optimizer.lr"]) == ("0.001", "0.0005")
    points = sorted(client.get_metric_history(run.info.run_id, "loss"), key=lambda point: point.timestamp)
    assert [point.step for point in points] == [1, 2, 3, 4, 3, 4, 5]
    told = {line["step"]: line["loss"] for line in read_records(twice / "run" / "metrics.jsonl")}
    assert {point.step: point.value for point in points} == told


# ---- evaluations -----------------------------------------------------------------------------------

LATE = """
import sys
from contextlib import closing
from pathlib import Path
sys.path.append("tests")
from test_trackers import TABLE, run_of
from megaregion.training.metrics import Shown, Trackers
output, *loggers = sys.argv[1:]
if "wandb" in loggers:
    # DeepSpeed imports W&B: forks share the folder that it made then, and the first that ends removes it.
    from wandb.sdk.data_types._private import MEDIA_TMP
    Path(MEDIA_TMP.name).mkdir(exist_ok=True)
with closing(Trackers(run_of(Path(output), *loggers), Path(output) / "run")) as trackers:
    for step in (8, 9):
        trackers.show(Shown(step, {"loss": 1 / step, "text": None, "norm": float("nan")}))
    trackers.show(Shown(4, {}, [TABLE], [Path(output) / "scene.map.jpg"]))
"""
"""An evaluation of step 4 that ends after step 9."""


def show_late(output: Path, *loggers: str, python: str = "") -> None:
    (output / "run").mkdir(exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(output / "scene.map.jpg")
    words = ["-c", LATE, str(output), *loggers]
    ours = environment(TRACKIO_DIR=str(output / "trackio"), PYTHONPATH=f"{repository()}:{repository()}/tests")
    if python:
        subprocess.run([python, *words], cwd=repository(), env=ours, check=True, timeout=300)
    else:
        done = tool(*words, environment=ours)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("late")
    show_late(output, "tensorboard", "wandb", "mlflow")
    return output


def test_an_evaluation_that_ends_late_stands_at_its_step_in_wandb_with_table_and_picture(late: Path) -> None:
    *steps, evaluation = history_of_wandb(late / "run")
    assert [(line["step"], line["loss"]) for line in steps] == [(8, 1 / 8), (9, 1 / 9)]
    assert all("text" not in line and "norm" not in line for line in steps)
    assert (evaluation["step"], evaluation["evaluation/region/knn"]) == (4, 0.75)
    assert evaluation["encoders/model/crops/region/knn"] == 0.25
    (files,) = (late / "run").glob("wandb/offline-run-*/files")
    table = json.loads((files / evaluation["tables/region/path"]).read_text())
    assert table["columns"] == ["encoder", "5-NN"]
    assert table["data"][0] == ["trained", "75.0 [70.0, 80.0]"]
    assert Image.open(files / evaluation["pictures/scene.map/path"]).size == (8, 6)
    metrics = [record for name, record in records_of_wandb(late / "run") if name == "metric"]
    assert [(each.glob_name, each.step_metric) for each in metrics if each.glob_name] == [("*", "step")]


def test_and_in_mlflow_and_tensorboard(late: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    client, own = mlflow_of(late), (late / "run" / "mlflow.id").read_text().strip()
    (point,) = client.get_metric_history(own, "encoders/model/crops/region/knn")
    assert (point.step, point.value) == (4, 0.25)
    assert client.get_run(own).info.status == "KILLED", "it has no DONE: it is to go on"
    artifacts = late / "mlruns" / client.get_run(own).info.experiment_id / own / "artifacts"
    assert "75.0 [70.0, 80.0]" in (artifacts / "evaluation" / "step-00000004.md").read_text()
    assert Image.open(artifacts / "pictures" / "step-00000004" / "scene.map.jpg").size == (8, 6)
    board = EventAccumulator(str(late / "run" / "tensorboard" / "evaluation" / "trained")).Reload()
    (picture,) = board.Images("pictures/scene.map")
    assert (picture.step, picture.width, picture.height) == (4, 8, 6)
    (told,) = board.Tensors("evaluation/region/text_summary")
    assert b"75.0 [70.0, 80.0]" in told.tensor_proto.string_val[0]


@pytest.mark.drill
def test_and_in_the_local_database_of_trackio_also_after_another_start(tmp_path: Path) -> None:
    python = os.environ.get("MEGAREGION_TRACKIO_PYTHON")
    if not python:
        pytest.skip("MEGAREGION_TRACKIO_PYTHON names no Python with trackio, which needs an older Pillow")
    for _ in range(2):
        show_late(tmp_path, "trackio", python=python)
    own = (tmp_path / "run" / "trackio.id").read_text().strip()
    read = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([S.get_runs('megaregion'), S.get_logs('megaregion', sys.argv[1])]))"
    )
    ours = environment(TRACKIO_DIR=str(tmp_path / "trackio"))
    done = subprocess.run([python, "-c", read, own], env=ours, check=True, capture_output=True, text=True)
    runs, logs = json.loads(done.stdout.splitlines()[-1])
    assert runs == [own]
    assert [(line["step"], line.get("loss")) for line in logs] == [(8, 1 / 8), (9, 1 / 9), (4, None)] * 2
    assert logs[2]["evaluation/region/knn"] == 0.75
    assert {"tables/region", "pictures/scene.map"} <= set(logs[2])


# ---- trackers that fail ----------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    open_log(tmp_path / "run" / "logs", 0)
    yield tmp_path / "run" / "logs" / "rank-00.log"
    LOG.handlers.clear()


BROKEN = {
    "cannot be imported": ("raise ImportError('a library is missing')", "ImportError: a library is missing"),
    "cannot begin": ("def init(*_, **__): raise OSError('no network')", "OSError: no network"),
    "raises in log": (
        "class Run:\n    name = 'a'\n    finish = log = lambda self, *_: 1 / 0\n"
        "init = lambda *_, **__: Run()",
        "ZeroDivisionError: division by zero",
    ),
    "never returns": ("import time\ninit = lambda *_, **__: time.sleep(600)", ""),
}
"""Sources of a broken tracker, and what is said of it."""


@pytest.mark.parametrize("fault", BROKEN)
def test_a_tracker_that_fails_is_said_in_a_line_counted_and_waited_for_no_longer(
    fault: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reason = BROKEN[fault]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "trackio.py").write_text(f"{source}\n")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 30.0 if reason else 0.5)
    with closing(Trackers(run_of(tmp_path, "trackio"), tmp_path / "run")) as trackers:
        for step in range(3):
            trackers.show(Shown(step, {"loss": 1.0}))
    sys.modules.pop("trackio", None)
    told = [f"trackio fails ({reason}); the run goes on without it"] * bool(reason)
    told.append("trackio missed 3 of 3 records of this start")
    lines = log.read_text().splitlines()
    assert [line.split(" WARNING ")[-1] for line in lines if " WARNING " in line] == told


def test_a_run_is_shown_by_one_process_at_a_time(log: Path, tmp_path: Path) -> None:
    with metrics.locked(tmp_path / "run" / "mlflow.id", wait=False) as held:
        assert held
        with closing(Trackers(run_of(tmp_path, "mlflow"), tmp_path / "run")) as trackers:
            trackers.show(Shown(1, {"loss": 1.0}))
    assert "mlflow fails (BlockingIOError: another process shows this run there)" in log.read_text()
    assert not (tmp_path / "mlruns").exists()


def test_a_run_without_network_trains_to_its_end(tmp_path: Path) -> None:
    data = toy_dataset(tmp_path / "shards", samples=8, shards=2)
    flags = [*SMALL, f"--data.path={data}", f"--output={tmp_path}", "--name=run", "--train.steps=2"]
    nowhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = tool(
        "tools/pretrain.py", *flags, "--metrics.loggers=mlflow", environment=environment(**nowhere),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mlflow fails (") == 1
    assert "mlflow missed 3 of 3 records of this start" in done.stdout
    assert (tmp_path / "run" / "DONE").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize(
    ("loggers", "line"),
    [
        ("tensorboard,wandbb", "must be tensorboard or wandb or mlflow or trackio, got wandbb; did you mean"),
        ("trackio", "names trackio, which is not installed: pip install trackio, or leave it out"),
    ],
)
def test_a_tracker_that_is_misspelt_or_not_installed_is_refused_before_a_run_begins(
    loggers: str, line: str, tmp_path: Path
) -> None:
    # A folder of its name, which W&B and MLflow leave behind, is no package.
    (tmp_path / "here" / "trackio").mkdir(parents=True)
    done = tool(
        "tools/pretrain.py", f"--metrics.loggers={loggers}", f"--output={tmp_path}",
        environment=environment(PYTHONPATH=f"{repository()}:{tmp_path / 'here'}"),
    )  # fmt: skip
    assert done.returncode == 2
    assert f"metrics.loggers {line}" in done.stderr
    assert not (tmp_path / "run").exists()
