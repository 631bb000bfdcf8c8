"""What the benchmarks report: honest ratios, in the form that all of them share."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch, repository, tool
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmark import scenes
from benchmark.gpu import LIST, run_entry
from benchmark.head import HeadSizes, compare
from benchmark.measure import Build, KernelWatch, Stopwatch, Work
from benchmark.memory import PeakMemory
from benchmark.part import Case, Part, Report, cases

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


def test_the_benchmark_of_annotated_images_runs_at_any_size(tmp_path: Path) -> None:
    scenes._compose_annotated(tmp_path / "set", 24, 120)
    assert scenes._score_annotated(tmp_path / "set", 6) > 0


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


def test_a_part_of_which_one_case_failed_keeps_the_others(tmp_path: Path) -> None:
    """So does one that is ended by its time: each case is in the file as soon as it is found."""
    script = tmp_path / "tools" / "benchmark.py"
    script.parent.mkdir()
    for end, told in (("sys.exit(1)", "no kernel"), ("time.sleep(99)", "still running after")):
        script.write_text(f"import sys, time\n{WRITES}\n{end}\n")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("benchmark.gpu.__file__", str(script.parent / "benchmark" / "gpu.py"))
            good, optional, *bad = run_entry("part", ("parity",), {"a": 1.5}, time.monotonic() + 3)
        assert (good.case, good.goal, good.holds) == ("part, a", 1.5, True)
        assert (optional.unmeasured, optional.failure) == ("c: pip install it", "")
        assert told in bad[-1].failure


WRITES = """
import json
cases = [{"case": "a", "ours": 1.0, "peer": 2.0, "unit": "s", "goal": 0},
         {"case": "c", "ours": None, "peer": None, "unit": "", "goal": 0, "failure": "c: pip install it"},
         {"case": "b", "ours": None, "peer": None, "unit": "", "goal": 0, "failure": "no kernel"}]
open(sys.argv[-1].removeprefix("--json="), "w").write(json.dumps({"cases": cases}))
"""


def test_the_shares_of_the_entries_are_eight_minutes() -> None:
    assert sum(entry.seconds for entry in LIST) == 8 * 60


def test_a_file_has_every_case_as_soon_as_it_is_found(tmp_path: Path) -> None:
    def find(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
        yield Case("a", 1.0, 2.0, "s")
        assert [case["case"] for case in json.loads(file.read_text())["cases"]] == ["a"]
        yield Case("b", 1.0, 2.0, "s")

    file = tmp_path / "cases.json"
    Part((), find).measure(argparse.Namespace(), CPU, file)
    assert [case["case"] for case in json.loads(file.read_text())["cases"]] == ["a", "b"]


def _works() -> Work:
    return lambda: time.sleep(0.01)


def _breaks() -> Work:
    raise RuntimeError("no kernel image")


def _dies() -> Work:
    os._exit(9)


def _dawdles() -> Work:
    time.sleep(99)
    return _works()


def test_a_contestant_that_fails_is_named_and_the_others_are_timed() -> None:
    builds: dict[str, Build] = {"good": _works, "broken": _breaks, "dead": _dies}
    found, failed = Stopwatch(CPU).race(builds, 1, weighed=("good",))
    assert 0.01 <= found["good"] < 5
    assert "good: memory" in found
    assert failed["broken"] == "RuntimeError: no kernel image"
    assert "it died" in failed["dead"]
    rows = (("", "beside it", "good", "broken", "s"), ("", "nobody asked", "broken", "other", "s"))
    (case,) = cases("row", rows, found, {}, failed)
    assert case.failure == "broken: RuntimeError: no kernel image"
    _, failed = Stopwatch(CPU, patience=0.1).race({"slow": _dawdles}, 1)
    assert "not ready in time" in failed["slow"]


def test_tensors_of_two_devices_are_counted_where_they_meet() -> None:
    def mixes() -> Work:
        return lambda: torch.ones(2, device="cuda") + torch.ones(2)

    watch = KernelWatch(torch.device("cuda"))
    with FakeTensorMode():
        found, failed = watch.race({"mixed": mixes, "good": lambda: lambda: torch.ones(2, device="cuda")}, 1)
    assert watch.mismatches == list(failed) == ["mixed"]
    assert math.isnan(found["good"])
    assert watch.tallies["good"].calls == 1


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case of the list for a GPU, on fake tensors and in a small size."""
    if shutil.which("g++") is None:
        assert "CI" not in os.environ, "CI must install g++"
        pytest.skip("no g++ to build the library that answers for CUDA")
    folder = tmp_path_factory.mktemp("fake")
    flags = ["--fake", "--sizes=toy", f"--folder={folder}", f"--json={folder / 'out.json'}"]
    command = [sys.executable, "-W", "ignore", str(repository() / "tools" / "benchmark.py"), "gpu", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())["cases"]
    return found


def test_every_entry_for_a_gpu_runs_on_fake_tensors_or_says_why_not(faked: list[dict[str, Any]]) -> None:
    told = [case for case in faked if "counts" not in case]
    for entry in LIST:
        own = [case["case"] for case in told if case["case"].startswith(f"{entry.name}, ")]
        assert own, entry.name
        # The small size has no step without regions.
        for end in entry.goals.keys() - {"regions, without"}:
            assert any(case.endswith(end) for case in own), (entry.name, end)
    why = {case["unmeasured"].rpartition(": ")[2] for case in told if "unmeasured" in case}
    assert why == {
        "fake tensors take no time", "asks nothing of a GPU", "no bytes are there to write",
        "no numbers are there to compare", "pip install torchao==0.18.0",
    }  # fmt: skip
    assert {case["case"].rpartition(": ")[2] for case in told if "unmeasured" not in case} == {
        "tokens of a packed step, without padding"
    }


WAITS = {
    # Batches, weights and results of what is compared, and what a head is built from.
    "parity": ("tools/benchmark/parity.py", "heads/sharded.py", "heads/centers.py", "parallel/"),
    # DeepSpeed's look at the norm.
    **{
        f"{size}, {name}": ("parallel/",)
        for size in ("ViT-L/14", "ViT-L/14-336", "ViT-B/16") for name in ("ours", "compiled")
    },
    "packed": ("parallel/",), "fp8, ours": ("parallel/",),
    "head, PartialFC": ("tools/benchmark/head.py",),
    # Whether all rows were finite.
    "head, our update": ("heads/sharded.py",),
    # How many are scored again, and what is fetched.
    "labels": ("curation/kmeans.py", "tools/benchmark/kmeans.py"),
}  # fmt: skip
"""Where the host may wait, by what is counted."""


def test_the_host_waits_for_a_gpu_only_where_it_is_known_to(faked: list[dict[str, Any]]) -> None:
    counted = {case["case"]: case["counts"] for case in faked if "counts" in case}
    assert counted["ViT-L/14, ours"]["kernels"] > counted["head, our passes"]["kernels"] > 0
    assert counted["head, our update"]["kernels"] > 0
    # A compiled peer runs fused kernels, and its optimizer takes all weights at once.
    assert 0 < counted["ViT-L/14, peer-compiled"]["kernels"] < counted["ViT-L/14, ours"]["kernels"]
    for name, counts in counted.items():
        assert counts["mismatches"] == 0, name
        assert counts["kernels"] > 0, name
        known = [places for start, places in WAITS.items() if name.startswith(start)]
        assert all(place.startswith(sum(known, ())) for place in counts["waits"]), (name, counts["waits"])


def test_a_device_is_compared_with_a_processor_in_fp32_and_in_bf16(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    command = ["gpu", "--device=cpu", "--sizes=toy", "--only=parity", "--minutes=60", f"--json={file}"]
    done = tool("tools/benchmark.py", *command)
    assert done.returncode == 0, done.stderr
    cases = json.loads(file.read_text())["cases"]
    assert len(cases) == 4 + 4 + 1
    # The device is a processor here, so it is as far off, and bf16 is off at all.
    assert all(0 < case["ours"] == case["peer"] < 0.2 for case in cases)
