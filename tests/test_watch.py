"""Runs watched while they train: what is new is read, and the page and the terminal say what a run does."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from pages import Page, complaints, require_browser
from test_comparison import leave_run, run_tool

from benchmark.browser import browser
from megaregion.evaluation.runs import Run, charts, follow, open_runs, state_table, write_runs

NOW = 1_764_000_000.0


def append(file: Path, *records: object) -> None:
    with file.open("a") as stream:
        stream.write(
            "".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records)
        )


def step(number: int, **values: object) -> dict[str, object]:
    return {"step": number, "time": NOW + number, "loss": 1.0 / number, **values}


def event(name: str, at: float, **facts: object) -> dict[str, object]:
    return {"time": NOW + at, "event": name, **facts}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 40 steps at its twentieth."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("name: run\ntrain: {steps: 40, log_every: 1}\n")
    append(
        tmp_path / "run" / "events.jsonl", event("start", -9, ranks=2, hosts=["a"]), event("ready", 0, step=0)
    )
    append(tmp_path / "run" / "metrics.jsonl", *(step(number) for number in range(1, 21)))
    (tmp_path / "run" / "logs" / "rank-00.log").write_text("before the end\nthe last line\n")
    return tmp_path / "run"


def state(run: Run, silent: float = 0.0) -> str:
    newest = max(file.stat().st_mtime for file in run.folder.rglob("*") if file.is_file())
    return run.read().status(newest + silent)[0]


def test_a_run_is_starting_running_stalled_stopped_or_finished(folder: Path, tmp_path: Path) -> None:
    run = Run(folder)
    assert [state(run, silent) for silent in (3, 59, 61)] == ["running", "running", "stalled"]
    append(folder / "events.jsonl", event("stop", 21, step=20, reason="SIGUSR1"))
    assert state(run) == "stopped"
    assert run.status(NOW)[1] == "stopped by SIGUSR1 after step 20"
    append(folder / "events.jsonl", event("start", 90, ranks=2))
    # What a start loads may take long.
    assert [state(run, silent) for silent in (61, 601)] == ["starting", "stalled"]
    append(folder / "events.jsonl", event("ready", 95, step=20))
    assert state(run) == "running"
    append(folder / "events.jsonl", event("end", 120, step=40))
    (folder / "DONE").touch()
    assert state(run) == "finished"
    assert run.facts(NOW)["step"] == "40 of 40", "it ended between two lines of its metrics"
    assert Run(tmp_path / "none").read().status(NOW)[0] == "absent"


def test_a_slow_run_is_not_called_stalled_between_two_of_its_lines(folder: Path) -> None:
    append(folder / "metrics.jsonl", *({**step(20 + n), "time": NOW + 40 * n} for n in range(1, 31)))
    run = Run(folder)
    assert [state(run, silent) for silent in (190, 210)] == ["running", "stalled"]


def test_half_a_line_is_left_until_it_is_whole(folder: Path) -> None:
    run = Run(folder).read()
    append(folder / "metrics.jsonl", '{"step": 21, "ti')
    assert run.read().step == 20
    assert run.broken == 0
    append(
        folder / "metrics.jsonl",
        f'me": {NOW + 21}, "loss": 0.5}}\n',
        "torn{\n",
        step(22, time_by_rank=[{"data": 1.0}]),
    )
    assert run.read().step == 22
    assert run.broken == 1
    assert run.metrics.curve("loss")[1][-2:].tolist() == pytest.approx([0.5, 1 / 22])


def test_a_file_that_is_cut_or_replaced_is_read_anew(folder: Path) -> None:
    run = Run(folder).read()
    (folder / "metrics.jsonl").write_text(json.dumps(step(3)) + "\n")
    assert run.read().metrics.steps.tolist() == [3]
    assert len(run.events) == 2
    other = folder / "other"
    append(other, *(step(number) for number in range(1, 31)))
    other.replace(folder / "metrics.jsonl")
    assert run.read().step == 30
    assert len(run.metrics.steps) == 30


def test_a_resume_shows_the_later_attempt_and_marks_the_restart(folder: Path) -> None:
    run = Run(folder).read()
    append(
        folder / "events.jsonl", event("start", 60, ranks=4), event("ready", 71, step=10),
        event("resumed", 90, step=11, changed={"seed": [0, 1]}),
    )  # fmt: skip
    append(folder / "metrics.jsonl", step(11, loss=9.0), step(12, loss=8.0))
    append(
        folder / "guard.jsonl",
        {"step": 13, "reason": "odd", "time": NOW + 80, "keys": list("abcde"), "not_finite": []},
    )
    assert run.read().step == 12
    assert run.metrics.curve("loss")[1][-3:].tolist() == pytest.approx([0.1, 9.0, 8.0])
    assert [(mark.step, mark.style) for mark in run.marks()] == [
        (10, "restart"),
        (11, "back"),
        (13, "refused"),
    ]
    facts = run.facts(NOW)
    assert (facts["restarts"], facts["steps refused"], facts["step"]) == ("1", "1", "12 of 40")
    write_runs([run], folder / "watch.html")
    text = Page(folder / "watch.html").text
    assert "resumed from step 11; seed 0 → 1" in text
    assert "step 13 refused: odd; samples a, b, c and 2 more" in text


def test_numbers_that_are_not_finite_leave_a_gap_that_is_counted(folder: Path) -> None:
    append(folder / "metrics.jsonl", '{"step": 21, "loss": NaN}\n{"step": 22, "loss": Infinity}\n', step(23))
    run = Run(folder).read()
    assert run.broken == 0
    [loss] = [drawn for drawn in charts([run]) if drawn.title == "Loss"]
    assert loss.note == "2 not finite"
    assert "nan" not in loss.chart


def test_the_time_left_goes_by_usual_pauses_and_not_by_a_restarts(folder: Path) -> None:
    append(folder / "metrics.jsonl", *({**step(20 + n), "time": NOW + 9000 + 2 * n} for n in range(1, 11)))
    assert Run(folder).read().facts(NOW)["time left"] == "10 s"


def test_everything_that_training_says_is_on_the_page(folder: Path) -> None:
    phases = {
        f"time/{name}": 0.1
        for name in ("data", "forward", "head", "backward", "communication", "optimizer", "save")
    }
    heads = {f"{kind}/{what}": 0.5 for kind in ("object", "text") for what in ("accuracy", "idle_share")}
    more = {
        "lr": 0.1,
        "grad_norm": 2.0,
        "images_per_second": 9.0,
        "mfu": 0.4,
        "memory": 3.0,
        "loss_object": 1.0,
    }
    slow = {"slow": [{"rank": 3, "host": "gpu3", "ratio": 2.5}]}
    append(
        folder / "metrics.jsonl",
        step(21, **phases, **heads, **more, **slow),
        step(22, **phases, **heads, **more),
    )
    append(folder / "evaluations.jsonl", {"step": 20, "region/knn": 0.25})
    write_runs([Run(folder).read()], folder / "watch.html", reload=7)
    page = Page(folder / "watch.html")
    for text in (
        "Loss", "Loss of each head", "Gradient norm", "Learning rate", "Images per second", "Idle classes",
        "Model FLOPs utilisation", "Where a step's time goes", "Accuracy of each head", "Memory of",
        "While training", "rank 3 on gpu3 x2.5", "the last line", "started on 2 ranks",
    ):  # fmt: skip
        assert text in page.text, text
    assert "7" in page.values
    assert not any(place.startswith("http") for place in page.fetched)


def test_a_run_is_waited_for_followed_and_left_when_it_is_finished(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = tmp_path / "late" / "run"
    following = threading.Thread(
        target=follow, args=(open_runs([late]), late / "watch.html", 0.02), daemon=True
    )
    following.start()
    said = ""

    def wait(text: str) -> None:
        nonlocal said
        until = time.monotonic() + 60
        while text not in said and time.monotonic() < until:
            time.sleep(0.02)
            said += capsys.readouterr().out

    wait(f"absent, waiting for {late}")
    assert not late.exists()
    late.parent.mkdir()
    folder.rename(late)
    wait("running")
    (late / "evaluation.json").write_text("{")
    append(late / "metrics.jsonl", step(40))
    (late / "evaluation.json").unlink()
    (late / "DONE").touch()
    following.join(60)
    assert not following.is_alive()
    wait("finished")
    assert said.count("absent") == 1
    assert 'http-equiv="refresh"' not in (late / "watch.html").read_text()


def test_the_terminals_table_has_a_column_for_each_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = leave_run(tmp_path / "other", 0.5, 1e-3)
    assert run_tool("--watch", "--once", folder, other, "--out", tmp_path / "page.html") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "other"]
    assert [line.split()[-4:] for line in lines if line.startswith("step ")] == [["20", "of", "40", "20"]]
    assert state_table([Run(folder).read()]).splitlines()[2].split() == ["step", "20", "of", "40"]
    assert run_tool("--watch", "--once", tmp_path / "none") == 2


def test_the_page_loads_itself_again_at_any_width_without_a_complaint(folder: Path) -> None:
    require_browser()
    page = folder / "watch.html"
    write_runs([Run(folder).read()], page, reload=1)
    with browser() as window:
        for width in (1280, 390):
            window.resize(width, 800)
            window.get(page.as_uri())
            assert window.execute_script("return document.documentElement.scrollWidth") == width
        append(folder / "metrics.jsonl", step(30))
        write_runs([Run(folder).read()], page, reload=1)
        window.wait("return document.body.textContent.includes('30 of 40')")
        assert complaints(window) == []
