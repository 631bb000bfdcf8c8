"""What the benchmarks report: honest ratios, in the form that all of them share."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import launch, repository, tool

from benchmark.gpu import run_entry
from benchmark.head import HeadSizes, compare
from benchmark.measure import Stopwatch
from benchmark.memory import PeakMemory
from benchmark.part import Case, Report

CPU = torch.device("cpu")


def test_a_ratio_is_better_when_greater_and_a_missed_goal_shows() -> None:
    fast, slow = Case("a", 1.0, 4.0, "s", 3.0), Case("b", 2.0, 4.0, "s", 3.0)
    assert (fast.ratio, fast.holds) == (4.0, True)
    assert (slow.ratio, slow.holds) == (2.0, False)
    lines = Report({}, [fast, slow, Case("c", 1.0, 1.0, "s")]).table().splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["holds", "MISSED", "1.00"]


def test_a_forecast_may_miss_either_way() -> None:
    low, near, high = (Case("a", ours, 1.0, "s", 0.9, two_sided=True) for ours in (0.8, 1.05, 1.2))
    assert [case.holds for case in (low, near, high)] == [False, True, False]


def test_what_took_no_time_is_reported_and_not_divided_by(tmp_path: Path) -> None:
    report = Report(
        {}, [Case("a save slows no step", 0.0, 2.0, "s", 20.0), Case("a plan", 0.0, 2.0, "s", 0.9, True)]
    )
    assert "inf" in report.table()
    report.write_json(tmp_path / "out.json")
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [(case["ratio"], case["holds"]) for case in cases] == [(None, True), (None, False)]


def test_the_json_has_the_form_of_every_benchmark(tmp_path: Path) -> None:
    Report({"cores": 2}, [Case("a", 1.0, 4.0, "s", 3.0)]).write_json(tmp_path / "new" / "out.json")
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    assert found == {
        "host": {"cores": 2},
        "cases": [
            {"case": "a", "ours": 1.0, "peer": 4.0, "ratio": 4.0, "goal": 3.0, "holds": True, "unit": "s"}
        ],
    }


@pytest.mark.parametrize("sample_rate", [0.1, 1.0])
def test_the_head_benchmark_runs_at_any_size(sample_rate: float) -> None:
    sizes = HeadSizes(900, 16, 64, sample_rate, 1)
    cases = compare(sizes, {"step": 3.0}, 1, Stopwatch(CPU, processor=True), dense=True)
    assert [case.goal for case in cases] == [3.0] + 7 * [0]
    assert all(case.unit == "MB" or (case.ours > 0 and case.peer > 0) for case in cases)


def test_the_step_benchmark_runs_at_any_size(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = [
        "tools/benchmark.py", "step", "--width=32", "--depth=1", "--heads=2",
        "--size=32", "--batch=2", "--rounds=1", f"--json={file}",
    ]  # fmt: skip
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    cases = json.loads(file.read_text())["cases"]
    assert all(case["ours"] > 0 and case["peer"] > 0 for case in cases)
    assert all(case["goal"] == 0 for case in cases), "goals belong to the standard size"


def test_peak_memory_sees_what_was_let_go() -> None:
    memory = PeakMemory(CPU)
    before = memory.now()
    memory.reset()
    torch.ones(64 * 2**20 // 4).sum()
    assert 60e6 < memory.peak() - before < 90e6


def test_the_checkpoint_benchmark_runs_at_any_size(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = [
        "tools/benchmark.py", "checkpoint", "--parameters=3e5", "--repeats=1",
        f"--folder={tmp_path}", f"--json={file}",
    ]  # fmt: skip
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    cases = json.loads(file.read_text())["cases"]
    assert [case["goal"] for case in cases] == [20.0, 0, 0, 0]
    assert len({case["peer"] for case in cases}) == 1
    assert not list(tmp_path.glob("benchmark-*")), "what was written is still there"


def run_guards(folder: Path) -> None:
    sys.argv = [
        "benchmark.py", "guards", "--width=64", "--depth=4", "--image-size=32", "--images=1", "--repeats=1",
        f"--json={folder / 'out.json'}",
    ]  # fmt: skip
    said = folder / f"rank-{os.environ['RANK']}.txt"
    with said.open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(repository() / "tools" / "benchmark.py"))["main"]()


def test_the_guards_benchmark_runs_at_any_size_and_rank_0_reports(tmp_path: Path) -> None:
    launch(run_guards, 2, tmp_path)
    (case,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert case["goal"] == 100.0
    assert 0 < case["ours"] < case["peer"]
    assert "2 ranks" in (tmp_path / "rank-0.txt").read_text()
    assert (tmp_path / "rank-1.txt").read_text() == ""


def test_the_loader_benchmark_runs_and_reads_nothing_in_vain(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = [
        "tools/benchmark.py", "loader", "--images=32", "--batch=8", "--repeats=1",
        "--clock=processor", f"--folder={tmp_path}", f"--json={file}",
    ]  # fmt: skip
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    cases = json.loads(file.read_text())["cases"]
    assert [case["goal"] for case in cases] == [2.0, 0.85, 1.0, 1.0]
    assert cases[-1]["ours"] == cases[-1]["peer"] == 8, "samples read for a batch of eight"
    assert not list(tmp_path.glob("benchmark-*")), "what was written is still there"


def test_the_metadata_benchmark_runs_at_a_thousandth_of_its_size(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    sizes = ["--tars=45", "--tar-images=9", "--clusters=1000", "--channels=8", "--ranks=9", "--workers=0"]
    done = tool("tools/benchmark.py", "metadata", *sizes, f"--folder={tmp_path}", f"--json={file}")
    assert done.returncode == 0, done.stderr
    cases = {case["case"]: case for case in json.loads(file.read_text())["cases"]}
    (looking,) = (case for name, case in cases.items() if name.startswith("ranks that look at shards, of 9 "))
    assert looking["ours"] == 2, "of two hosts"
    assert not list(tmp_path.glob("benchmark-*")), "what was written is still there"


def test_an_entry_that_fails_is_named_and_the_list_goes_on() -> None:
    later = time.monotonic() + 300
    (refused,) = run_entry("one", ("step", "--nonsense"), {}, later)
    assert "unknown" in refused.failure
    (late,) = run_entry("other", ("step",), {}, ends=0)
    assert "--minutes" in late.failure
    report = Report({}, [refused, late, Case("good", 1.0, 2.0, "s", 1.5)])
    lines = report.table().splitlines()
    assert ["FAILED" in line for line in lines] == [False, True, True, False]
    assert not refused.holds


def test_a_part_of_which_one_case_failed_keeps_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends_with_1(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        file = Path(command[-1].removeprefix("--json="))
        Report({}, [Case("a", 1.0, 2.0, "s"), Case("b", 0, 0, "", failure="no kernel")]).write_json(file)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr("benchmark.gpu.subprocess.run", ends_with_1)
    good, bad = run_entry("part", ("parity",), {"a": 1.5}, time.monotonic() + 9)
    assert (good.case, good.goal, good.holds) == ("part, a", 1.5, True)
    assert (bad.case, bad.failure) == ("part, b", "no kernel")


def test_a_device_is_compared_with_a_processor_in_fp32_and_in_bf16(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = ["gpu", "--device=cpu", "--sizes=toy", "--only=parity", f"--json={file}"]
    done = tool("tools/benchmark.py", *command)
    assert done.returncode == 0, done.stderr
    cases = json.loads(file.read_text())["cases"]
    assert len(cases) == 4 + 4 + 1
    # The device is a processor here, so it is as far off, and bf16 is off at all.
    assert all(0 < case["ours"] == case["peer"] < 0.2 for case in cases)
