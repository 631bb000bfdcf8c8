"""Expected goodput against the closed form and what the eye can check; hours of curation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from launch import repository, tool

from megaregion.planning.faults import LLAMA3_FAULTS, FaultModel, best_interval, expected, simulate, young
from megaregion.planning.hardware import Hardware, Load


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


@pytest.fixture(scope="module")
def curation() -> dict[str, Any]:
    if shutil.which("g++") is None:
        assert "CI" not in os.environ, "CI must install g++"
        pytest.skip("no g++ to build the library that answers for CUDA")
    # In a process of its own: what answers for CUDA must come before torch.
    command = [sys.executable, "tools/plan.py", "curate", "--json"]
    done = subprocess.run(command, cwd=repository(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_batch_of_curations_networks_waits_for_the_gpu(curation: dict[str, Any]) -> None:
    assert {name: count["waits"] for name, count in curation["counts"].items()} == {
        "crop": 0,
        "image": 0,
        "mask": 0,
    }


def test_400_million_images_pass_clip_and_sam_on_64_gpus_in_the_hours_that_were_promised(
    curation: dict[str, Any],
) -> None:
    # A ViT-L/14 takes 162 GFLOP for 224 px: twice 81 billion multiply-adds.
    crop = curation["counts"]["crop"]
    assert crop["flops"] + crop["attention"] == pytest.approx(162e9, rel=0.02)
    seconds = {stage["stage"]: stage["gpu"] for stage in curation["stages"]}
    assert 0 < seconds["embed"] * 4e8 / 64 / 3600 <= 5
    assert 0 < seconds["propose"] * 4e8 / 64 / 3600 <= 48
    assert all(stage["hours"] > 0 for stage in curation["stages"])


def test_a_stage_of_curation_waits_for_the_slowest_of_gpus_cores_and_storage() -> None:
    from megaregion.planning.curation import Count, plan_stages

    counts = dict.fromkeys(("crop", "image"), Count(1e9, 0, 0, 1, 0, 768))
    counts["mask"] = Count(0, 0, 0, 0, 0, 1)
    host = {"decode": 1e-3, "view": 0.0, "objectness": 0.0, "ocr": 0.5, "crop": 0.0, "mask": 0.0, "rank": 0.0}
    hardware = Hardware(matrix_tflops=1, linear_share=1, launch_us=0, read_gbytes=1000)

    def bound(cluster: Hardware, cores: int) -> dict[str, tuple[str, float]]:
        load = Load(images=3600 * 64, regions=1, cores=cores)
        return {plan.stage: (plan.bound, plan.hours) for plan in plan_stages(load, cluster, counts, host)}

    assert bound(hardware, 10)["propose"] == ("gpu", pytest.approx(1e-3))
    assert bound(hardware, 10)["ocr"] == ("cores", pytest.approx(0.0501))
    counts["mask"], host["mask"] = Count(1e7, 0, 0, 0, 0, 1), 1e-3
    assert bound(hardware, 300)["propose"] == ("its core", pytest.approx(0.2)), "200 masks an image"
    host["mask"] = 0.0
    assert bound(hardware, 10)["propose"] == ("gpu", pytest.approx(3e-3))
    counts["mask"] = Count(0, 0, 0, 0, 0, 1)
    assert bound(replace(hardware, gpus=128), 10)["ocr"][1] == pytest.approx(0.02505)
    assert bound(replace(hardware, read_gbytes=1e-3), 10)["embed"] == ("storage", pytest.approx(6.4))


def test_the_command_prints_both_sizes_and_the_same_numbers_for_the_same_seed() -> None:
    command = ["tools/plan.py", "goodput", "--json", "--faults=2000", "--seed=4"]
    first, second = (tool(*command).stdout for _ in range(2))
    assert first == second
    rows = json.loads(first)
    assert [row["gpus"] for row in rows] == [64, 1024]
    assert all(0.97 < row["goodput"] < 1 for row in rows)
