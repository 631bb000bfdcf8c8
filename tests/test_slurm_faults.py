"""Faults of a cluster, played through on a real SLURM of nine pretend nodes: `make drills`."""

from __future__ import annotations

import os
import signal

import pytest
from drill import STEPS, Drill, assert_same

from megaregion.checkpoint.reader import find_checkpoint

pytestmark = pytest.mark.drill


def test_a_preempted_run_comes_back_and_a_cancelled_one_does_not(drill: Drill, undisturbed: str) -> None:
    job = drill.submit("preempted")
    drill.wait_for_step("preempted", job, 4)
    urgent = drill.cluster.submit(
        "--partition=urgent", "--nodes=9", "--exclusive", "--wrap=sleep 1",
        f"--output={drill.folder}/urgent.log",
        cwd=drill.folder,
    )  # fmt: skip
    assert drill.finish("preempted", urgent) == "COMPLETED"
    assert drill.finish("preempted", job) == "COMPLETED", drill.log("preempted")
    assert drill.steps("preempted") == list(range(1, STEPS + 1)), drill.log("preempted")
    assert_same(drill.state("preempted"), drill.state(undisturbed))

    job = drill.submit("cancelled")
    drill.wait_for_step("cancelled", job, 4)
    drill.cluster.command("scancel", job)
    assert drill.finish("cancelled", job) == "CANCELLED"
    drill.cluster.until(lambda: drill.cluster.nodes_in("idle") == 9, 90, "free nodes")
    assert drill.cluster.job(job)["JobState"] == "CANCELLED"
    assert max(drill.steps("cancelled")) < STEPS
    assert find_checkpoint(drill.folder / "cancelled").name == f"step-{max(drill.steps('cancelled')):08d}"


def test_a_lost_node_costs_only_the_steps_since_the_last_checkpoint(drill: Drill, undisturbed: str) -> None:
    job = drill.submit("spare")
    drill.wait_for_step("spare", job, 8)
    drill.cluster.kill_node("n3")
    try:
        assert drill.finish("spare", job) == "COMPLETED", drill.log("spare")
    finally:
        drill.cluster.start_node("n3")
        drill.cluster.until(lambda: drill.cluster.nodes_in("idle") == 9, 90, "nine idle nodes")
    assert drill.is_trained("spare")
    assert drill.losses("spare") == drill.losses(undisturbed)
    assert_same(drill.state("spare"), drill.state(undisturbed))


def test_a_rank_that_dies_is_started_again_with_all_others(drill: Drill, undisturbed: str) -> None:
    job = drill.submit("died", MEGAREGION_SETTLE="0")
    drill.wait_for_step("died", job, 8)
    os.kill(drill.cluster.ranks(job)[5], signal.SIGKILL)
    assert drill.finish("died", job) == "COMPLETED", drill.log("died")
    assert_same(drill.state("died"), drill.state(undisturbed))


def test_a_run_goes_on_with_fewer_nodes_and_with_all_again(drill: Drill, undisturbed: str) -> None:
    job = drill.submit("elastic", nodes="4-8")
    drill.wait_for_step("elastic", job, 4)
    lost = ("n7", "n8", "n9")
    # Three of nine nodes go away: eight can no longer be had, six can.
    for node in lost:
        drill.cluster.kill_node(node)
    drill.wait_for_step("elastic", job, 16)
    for node in lost:
        drill.cluster.start_node(node)
    drill.cluster.until(lambda: drill.cluster.nodes_in("idle") >= 3, 90, "the nodes to come back")
    drill.ask_to_stop(job)
    assert drill.finish("elastic", job) == "COMPLETED", drill.log("elastic")
    used = drill.nodes_used("elastic")
    assert used[0] == used[-1] == 8, drill.log("elastic")
    assert 6 in used, drill.log("elastic")
    ours, theirs = drill.losses("elastic"), drill.losses(undisturbed)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-4
