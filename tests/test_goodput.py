"""The wall time of a run, split: every second has one name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaregion.errors import UserError
from megaregion.schemas.run import Meter, measure, split


def event(time: float, name: str, **facts: float) -> dict[str, Any]:
    return {"time": time, "event": name, **facts}


def steps(first: int, *times: float) -> list[dict[str, Any]]:
    return [{"time": time, "step": first + index} for index, time in enumerate(times)]


CRASH = [
    event(100, "start"), event(110, "ready", step=0), event(135, "blocked", step=2, seconds=5),
    event(190, "start"), event(200, "resumed", step=2), event(205, "ready", step=2),
    event(232, "blocked", step=4, seconds=2), event(232, "end", step=4),
]  # fmt: skip
"""Steps 1 and 2, a save of 5 s, step 3, killed; step 3 again, step 4, a save of 2 s."""

CRASHED = [*steps(1, 120, 130, 145), *steps(3, 215, 230)]


def test_every_second_of_a_crash_and_its_resume_has_one_name() -> None:
    found = split(CRASH, CRASHED)
    assert (found.starting, found.restarting, found.saving) == (10 + 15, 45, 7)
    assert found.lost == 10, "step 3 took 15 s, 5 of them were the save's"
    assert found.training == 20 + 25
    assert found.total == 232 - 100
    assert found.starts == 2
    assert sum(found.shares().values()) == pytest.approx(1)


def test_a_roll_back_within_a_start_loses_the_steps_that_come_again() -> None:
    events = [event(0, "start"), event(0, "ready", step=0), event(40, "resumed", step=1)]
    found = split(events, [*steps(1, 10, 20, 30), *steps(2, 50, 60)])
    assert found.lost == 20
    assert found.training == 40


def test_a_record_of_several_steps_is_lost_in_part() -> None:
    events = [
        event(0, "start"), event(0, "ready", step=0),
        event(120, "start"), event(130, "ready", step=7),
    ]  # fmt: skip
    found = split(events, [{"time": 100, "step": 10}])
    assert (found.lost, found.training) == (pytest.approx(30), pytest.approx(70))


def test_the_files_are_read_though_a_writer_was_killed(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in CRASH) + '{"time": 23')
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in CRASHED) + "{")
    assert measure(tmp_path) == split(CRASH, CRASHED)
    assert measure(tmp_path).table().splitlines()[-2].split() == ["total", "0.037", "100.00%"]


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no start; give the folder of a run"):
        measure(tmp_path)


def test_the_shares_of_a_running_start_go_on_from_the_past(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in CRASH[:-2]))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in CRASHED[:3]))
    meter = Meter(tmp_path)
    before = meter.shares()
    meter.blocked(50.0)
    assert meter.shares()["saving"] > before["saving"]
    assert before["restarting"] == pytest.approx(45 / 105, rel=1e-3)
