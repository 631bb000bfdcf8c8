"""Expected goodput: the simulation against the closed form, and against what the eye can check."""

from __future__ import annotations

import json

import pytest
from launch import tool

from megaregion.planning.faults import LLAMA3_FAULTS, FaultModel, best_interval, expected, simulate, young


@pytest.mark.parametrize("gpus", [64, 1024, 16_384])
@pytest.mark.parametrize("interval", [60.0, 600.0, 3600.0])
@pytest.mark.parametrize("write", [0.0, 30.0])
def test_the_simulation_meets_the_closed_form(gpus: int, interval: float, write: float) -> None:
    cluster = FaultModel(gpus, save=5.0, write=write, detection=60.0, restart=240.0)
    assert simulate(cluster, interval, seed=1) == pytest.approx(expected(cluster, interval), rel=0.01)


def test_the_best_interval_is_youngs_where_saves_and_faults_are_rare() -> None:
    cluster = FaultModel(1024, save=5.0, write=0.0)
    assert best_interval(cluster) == pytest.approx(young(cluster), rel=0.15)
    best = expected(cluster, best_interval(cluster))
    assert all(expected(cluster, young(cluster) * factor) < best for factor in (0.5, 2.0))


def test_no_interval_is_shorter_than_a_save_takes_to_be_published() -> None:
    assert best_interval(FaultModel(16_384, save=0.01, write=400.0), faults=2_000) == 400.0


def test_without_costs_nothing_but_the_work_of_a_fault_is_lost() -> None:
    free = FaultModel(64, save=0.0, write=0.0, detection=0.0, restart=0.0)
    assert simulate(free, 1.0) == pytest.approx(1.0, abs=1e-5)
    assert free.between_faults == pytest.approx(54 * 16_384 * 86_400 / 419 / 64)


def test_more_faults_and_slower_restarts_cost_goodput() -> None:
    usual = simulate(FaultModel(1024), 600)
    assert simulate(FaultModel(1024, faults_per_gpu_day=10 * LLAMA3_FAULTS), 600) < usual
    assert simulate(FaultModel(1024, restart=3600.0), 600) < usual
    assert simulate(FaultModel(64), 600) > usual


def test_the_command_prints_both_sizes_and_the_same_numbers_for_the_same_seed() -> None:
    command = ["tools/plan.py", "goodput", "--json", "--faults=2000", "--seed=4"]
    first, second = (tool(*command).stdout for _ in range(2))
    assert first == second
    rows = json.loads(first)
    assert [row["gpus"] for row in rows] == [64, 1024]
    assert all(0.97 < row["goodput"] < 1 for row in rows)
