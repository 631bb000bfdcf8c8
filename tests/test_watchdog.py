"""The watchdog on real processes that hang, and its judgement of who holds a run up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.distributed as dist
from launch import Tool, free_port, tool
from test_run import command
from toy import toy_dataset

from megaregion.errors import WATCHDOG_EXIT
from megaregion.training.beside import Standing, collective_of, verdict
from megaregion.training.faults import Faults


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_dataset(tmp_path_factory.mktemp("shards"))


def four_ranks(
    dataset: Path, output: Path, fault: str, *extra: str
) -> list[subprocess.CompletedProcess[str]]:
    """The command line on four ranks without a launcher that would end the others."""
    flags = [
        "--train.steps=1000", "--head.draw_images=2", "--train.micro_batch=1", "--parallel.tensor=2", *extra,
    ]  # fmt: skip
    port, processes = free_port(), []
    for rank in range(4):
        launched = {
            "RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MEGAREGION_FAULT": fault,
        }  # fmt: skip
        words = command(dataset, output, *flags)[3:]
        processes.append(Tool(*words, environment={**os.environ, **launched}))
    return [process.wait(timeout=280) for process in processes]


def test_a_rank_that_hangs_mid_step_is_named_with_its_host_and_all_ranks_end(
    dataset: Path, tmp_path: Path
) -> None:
    done = four_ranks(dataset, tmp_path, "hang:rank=2:step=3", "--train.watchdog_seconds=6")
    assert [process.returncode for process in done] == [WATCHDOG_EXIT] * 4, done
    host = os.uname().nodename
    assert f"watchdog: rank 2 on {host} stands still in step 3, phase forward" in done[0].stderr
    assert "is not in a collective (faults.py" in done[0].stderr
    for rank in range(4):
        log = (tmp_path / "run" / "logs" / f"rank-{rank:02d}.log").read_text()
        assert f"watchdog: rank 2 on {host}" in log
        assert "Current thread" in log
        assert "Timed out" not in log, "a collective gave up before the watchdog"
    assert "faults.py" in (tmp_path / "run" / "logs" / "rank-02.log").read_text()
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"step": 2' in last


HOLDS_A_SAMPLE = """
import os, sys, time
from megaregion.data import transforms
real = transforms.Transform.decode
def slow(self, image, framed):
    if framed.position >= 8 and os.environ["RANK"] == "0":
        time.sleep(3600)
    return real(self, image, framed)
transforms.Transform.decode = slow
sys.path.insert(0, "tools")
import runpy
runpy.run_path("tools/pretrain.py", run_name="__main__")
"""


def test_a_loader_worker_that_hangs_ends_the_run_too(dataset: Path, tmp_path: Path) -> None:
    words = command(dataset, tmp_path, "--train.steps=9", "--data.workers=1", "--train.watchdog_seconds=5")
    script = tmp_path / "pretrain.py"
    script.write_text(HOLDS_A_SAMPLE)
    began = time.monotonic()
    done = tool(script, *words[4:], environment={**os.environ, "RANK": "0", "WORLD_SIZE": "1"}, timeout=280)
    assert done.returncode == WATCHDOG_EXIT, done.stderr
    assert "rank 0 on" in done.stderr
    assert "step 3, phase data" in done.stderr
    assert time.monotonic() - began < 120


def standing(rank: int, turns: int, collective: str) -> Standing:
    return Standing(rank, f"node{rank}", turns, 7, "head", 31.0 + rank, collective, "x.py:1 in f")


def test_the_rank_with_the_least_progress_holds_the_run_up() -> None:
    line = verdict(
        [standing(0, 9, "all_reduce"), standing(1, 8, "all_gather"), standing(2, 9, "all_reduce")], {}
    )
    assert line.startswith(
        "rank 1 on node1 stands still in step 7, phase head, for 32 s and waits in all_gather (x.py:1 in f); "
        "meanwhile ranks 0, 2 waited 33 s in step 7, phase head, all_reduce (x.py:1 in f); stacks"
    )


def test_of_equals_the_one_outside_a_collective_holds_the_run_up() -> None:
    line = verdict([standing(0, 8, "all_reduce"), standing(1, 8, ""), standing(2, 9, "")], {})
    assert line.startswith(
        "rank 1 on node1 stands still in step 7, phase head, for 32 s and is not in a coll"
    )
    assert "node2" not in line


def test_a_rank_that_gives_no_sign_is_the_culprit_whatever_the_others_say() -> None:
    line = verdict([standing(0, 8, ""), standing(1, 8, "wait")], {3: "node3"})
    assert line.startswith("rank 3 on node3 gave no sign of life")
    assert "while rank 0 stood 31 s in step 7, phase head, (x.py:1 in f), rank 1 waited 32 s in" in line


def test_ranks_that_all_wait_for_each_other_accuse_the_network_or_their_order() -> None:
    alike = [standing(rank, 8, "all_reduce") for rank in (0, 1, 2, 4)]
    assert verdict(alike, {}).startswith(
        "all 4 ranks wait for each other: ranks 0-2, 4 waited 35 s in step 7, phase head, all_reduce "
        "(x.py:1 in f); the network between them stands still; stacks"
    )
    line = verdict([*alike[:3], standing(3, 8, "broadcast")], {})
    assert "rank 3 waited 34 s in step 7, phase head, broadcast (x.py:1 in f); they are in different" in line


def test_a_thread_in_a_collective_is_told_by_the_collectives_name() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: list[str] = []
    try:

        def inside(frame: FrameType, event: str, argument: object) -> None:
            if event == "call" and frame.f_code.co_name == "_rank_not_in_group":
                found.append(collective_of(frame.f_back))

        sys.setprofile(inside)
        dist.all_reduce(torch.ones(1))
    finally:
        sys.setprofile(None)
        dist.destroy_process_group()
    assert found[0] == "all_reduce"
    assert collective_of(sys._getframe()) == ""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("norm.item()", "item"), ("self._stream.synchronize()", "synchronize"),
        ("if bool(bad.any()):", "bool"), ("longest = max(1, int(sizes.max()))", "int"),
        ("time.sleep(3600)", ""), ("for batch in batches:", ""),
    ],
)  # fmt: skip
def test_a_thread_in_a_line_that_asks_a_device_for_a_number_waits(
    line: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linecache.getline", lambda file, number: line)
    assert collective_of(sys._getframe()) == name


def spoilt_steps(faults: Faults, steps: tuple[int, ...]) -> list[tuple[int, int]]:
    """Steps of two micro-steps each, and the micro-step whose output was NaN."""
    model = torch.nn.Identity()
    faults.spoil(model)
    found = []
    for step in steps:
        faults.begin_step(step)
        found += [(step, micro) for micro in range(2) if model(torch.ones(1)).isnan()]
    return found


def test_a_save_is_slow_once_and_a_clock_jumps_in_its_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAREGION_FAULT", "slow-save:step=5:seconds=0.3,clock-jump:step=5:seconds=-90")
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    faults = Faults.of_rank(0)
    for step in (4, 5, 6):
        faults.strike("forward", step)
        faults.strike("save", step)
    assert slept == [0.3]
    assert time.time() == 910.0
    late = Faults.of_rank(0)
    late.strike("forward", 6)
    assert time.time() == 910.0, "a start behind the step has no jump"


def test_a_fault_is_silent_when_unset_and_acts_on_its_own_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAREGION_FAULT", raising=False)
    assert spoilt_steps(Faults.of_rank(0), (4, 5)) == []
    monkeypatch.setenv("MEGAREGION_FAULT", "nan:rank=1:step=5:count=2,slow:rank=0:seconds=0")
    assert spoilt_steps(Faults.of_rank(0), (4, 5)) == []
    assert spoilt_steps(Faults.of_rank(1), (4, 5, 5, 6)) == [(5, 0), (5, 0)]
