"""The faults that come at the worst moment, on a real SLURM of nine pretend nodes: `make drills`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from drill import STEPS, Drill, assert_same
from islands import IslandCluster
from pretend_cluster import CGROUPS, CgroupCluster, pretend_cluster

from megaregion.checkpoint.format import UNFINISHED
from megaregion.checkpoint.reader import find_checkpoint

pytestmark = pytest.mark.drill


def test_a_node_lost_during_a_save_with_a_spare_one(drill: Drill, undisturbed: str) -> None:
    job = drill.submit("torn-save")
    with _lost_during_a_save(drill, "torn-save", job, rank=3) as step:
        assert drill.finish("torn-save", job) == "COMPLETED", drill.log("torn-save")
    assert drill.is_trained("torn-save")
    assert f"resumed from {drill.folder}/torn-save/checkpoints/step-{step - 5:08d}" in _rank_0(drill, job)
    assert_same(drill.state("torn-save"), drill.state(undisturbed))


def test_a_node_lost_during_a_save_without_a_spare_one(drill: Drill, undisturbed: str) -> None:
    drill.cluster.kill_node("n9")
    free = drill.cluster.nodes_in
    drill.cluster.until(lambda: free("down") == 1 and free("idle") == 8, 120, "the ninth node's end")
    try:
        job = drill.submit("no-spare", nodes="4-8")
        with _lost_during_a_save(drill, "no-spare", job, rank=3):
            assert drill.finish("no-spare", job) == "COMPLETED", drill.log("no-spare")
    finally:
        drill.cluster.start_node("n9")
        drill.cluster.until(lambda: drill.cluster.nodes_in("idle") == 9, 90, "nine idle nodes")
    used = drill.nodes_used("no-spare")
    assert used[0] == 8, drill.log("no-spare")
    # As many of the seven that are left as were free at that moment, and 48 images do not spread over seven.
    assert used[-1] in (4, 6), drill.log("no-spare")
    _assert_close(drill.losses("no-spare"), drill.losses(undisturbed))


def test_twenty_kills_at_random_moments_change_nothing(drill: Drill, undisturbed: str) -> None:
    draw = random.Random(5)
    job = drill.submit(
        "killed", "--checkpoint.every=1", MEGAREGION_SETTLE="0", MEGAREGION_MAX_FAULTS="1000",
        MEGAREGION_FAULT="slow:rank=0:step=1:seconds=0.5",
    )  # fmt: skip
    for kill in range(20):
        drill.cluster.until(
            lambda start=kill: _restarts(drill, job) >= start and _ranks(drill, job),
            240, f"ranks of start {kill}",
        )  # fmt: skip
        begun = max(drill.steps("killed"), default=0)
        # In one half of the cases while the ranks start, in the other while they train or save.
        if kill % 2:
            drill.wait_for_step("killed", job, begun + 1)
            time.sleep(draw.uniform(0.0, 1.0))
        else:
            time.sleep(draw.uniform(0.0, 12.0))
        victim = _kill_one(drill, job, draw)
        drill.cluster.until(lambda gone=victim: gone not in _ranks(drill, job).values(), 120, "the kill")
    assert drill.finish("killed", job, 600) == "COMPLETED", drill.log("killed")
    assert _restarts(drill, job) >= 20
    assert drill.is_trained("killed")
    assert_same(drill.state("killed"), drill.state(undisturbed))


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(drill: Drill, undisturbed: str) -> None:
    job = drill.submit(
        "hung", "--train.watchdog_seconds=15", MEGAREGION_SETTLE="0",
        MEGAREGION_FAULT="hang:rank=2:step=7:start=0",
    )  # fmt: skip
    assert drill.finish("hung", job) == "COMPLETED", drill.log("hung")
    first = drill.folder / "hung" / "logs" / f"{job}.0"
    said = "\n".join(file.read_text() for file in first.glob("rank-*.out"))
    assert "rank 2 on" in said, said[-3000:]
    assert_same(drill.state("hung"), drill.state(undisturbed))


def test_damaged_checkpoints_are_named_and_the_last_good_one_is_used(drill: Drill, undisturbed: str) -> None:
    job = drill.submit("damaged", "--checkpoint.keep_last=9")
    drill.wait_for_step("damaged", job, 16)
    drill.cluster.command("scancel", job)
    assert drill.finish("damaged", job) == "CANCELLED"
    drill.cluster.until(lambda: drill.cluster.nodes_in("idle") == 9, 90, "free nodes")
    checkpoints = drill.folder / "damaged" / "checkpoints"
    newest = find_checkpoint(checkpoints)
    _flip(newest / "rank-00005.safetensors")
    (checkpoints / "step-00000015" / "manifest.json").write_text('{"step": 15, "tens')
    (checkpoints / "latest").write_text("step-00000099\n")
    again = drill.submit("damaged", "--checkpoint.keep_last=9")
    assert drill.finish("damaged", again) == "COMPLETED", drill.log("damaged")
    said = _rank_0(drill, again)
    assert f"skipped {newest}" in said, said
    assert "step-00000015" in said, said
    assert f"resumed from {checkpoints}/step-00000010" in said, said
    assert_same(drill.state("damaged"), drill.state(undisturbed))


def test_a_full_disk_costs_no_checkpoint_and_the_run_goes_on(drill: Drill, undisturbed: str) -> None:
    checkpoints = drill.folder / "cramped" / "checkpoints"
    checkpoints.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", checkpoints], check=True)
    try:
        job = drill.submit("cramped", MEGAREGION_FAULT="slow:rank=0:step=6:seconds=0.5")
        drill.wait_for_step("cramped", job, 6)
        ballast = checkpoints / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        drill.wait_for_step("cramped", job, 12)
        assert find_checkpoint(checkpoints).name == "step-00000005", "the last good one stays"
        ballast.unlink()
        assert drill.finish("cramped", job) == "COMPLETED", drill.log("cramped")
        said = _rank_0(drill, job)
        assert "No space left on device" in said, said
        assert f"could not save {checkpoints}/step-00000010; the last good checkpoint stays" in said, said
        assert_same(drill.state("cramped"), drill.state(undisturbed))
    finally:
        subprocess.run(["umount", checkpoints], check=True)


def test_a_nan_is_skipped_and_the_run_ends_healthy(drill: Drill) -> None:
    job = drill.submit("spoilt", MEGAREGION_FAULT="nan:rank=1:step=7:start=0")
    assert drill.finish("spoilt", job) == "COMPLETED", drill.log("spoilt")
    records = drill.records("spoilt")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["skipped"] for record in records] == [0] * 6 + [1] * (STEPS - 6)
    refused = json.loads((drill.folder / "spoilt" / "guard.jsonl").read_text())
    assert refused["step"] == 7
    assert refused["not_finite"], "the samples of the spoilt rank are named"


def test_other_tensor_parallel_sizes_go_on_with_the_same_run(drill: Drill, undisturbed: str) -> None:
    for tensor, stop in ((1, 8), (2, 18), (1, None)):
        flags = [f"--parallel.tensor={tensor}", *([f"--stop-at={stop}"] if stop else [])]
        job = drill.submit("reshaped", *flags)
        assert drill.finish("reshaped", job) == "COMPLETED", drill.log("reshaped")
        assert (drill.folder / "reshaped" / "DONE").exists() == (stop is None)
    assert drill.is_trained("reshaped")
    _assert_close(drill.losses("reshaped"), drill.losses(undisturbed))


def test_an_orphan_behind_a_cut_network_publishes_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pretend_cluster(IslandCluster) as cluster:
        assert isinstance(cluster, IslandCluster)
        drill = Drill(cluster, tmp_path_factory.mktemp("islands"))
        drill.torchrun("quiet", ranks=2)
        job = drill.submit(
            "orphan", nodes=1, per_node=2,
            MEGAREGION_FAULT="slow:rank=0:step=4:seconds=0.75",
        )  # fmt: skip
        drill.wait_for_step("orphan", job, 6)
        node, orphans = cluster.job(job)["BatchHost"], set(cluster.ranks(job).values())
        assert len(orphans) == 2
        cluster.cut(node)

        def owned_anew() -> bool:
            cluster.hurry(job)
            return len(list((drill.folder / "orphan" / "checkpoints" / "fence").glob("*.json"))) == 2

        cluster.until(owned_anew, 180, "the requeued job's claim")
        assert _alive(orphans), "there was no orphan to fence"
        cluster.until(lambda: not _alive(orphans), 120, "the orphans to end by themselves")
        first = drill.folder / "orphan" / "logs" / f"{job}.0" / "rank-0.out"
        assert "has taken over the run" in first.read_text(), first.read_text()
        assert drill.finish("orphan", job) == "COMPLETED", drill.log("orphan")
        assert cluster.job(job)["BatchHost"] != node
        published = (drill.folder / "orphan" / "checkpoints").glob("step-*/manifest.json")
        owners = {
            json.loads(file.read_text())["step"]: json.loads(file.read_text())["incarnation"]
            for file in published
        }
        assert owners[STEPS] == 2, owners
        assert_same(drill.state("orphan"), drill.state("quiet"))
        cluster.mend(node)


@contextmanager
def _lost_during_a_save(drill: Drill, name: str, job: str, rank: int) -> Iterator[int]:
    """Take a rank's node away while a save waits for that rank's part; gives the step of that save."""
    drill.wait_for_step(name, job, 6)
    victim, checkpoints = drill.cluster.ranks(job)[rank], drill.folder / name / "checkpoints"
    end = time.monotonic() + 120
    while True:
        assert time.monotonic() < end, f"no save was caught half-written\n{drill.log(name)}"
        for folder in checkpoints.glob(f"step-*{UNFINISHED}-*"):
            # Frozen at once: finding all processes of a node takes longer than the save.
            os.kill(victim, signal.SIGSTOP)
            if folder.exists() and not (folder / f"rank-{rank:05d}.json").exists():
                break
            os.kill(victim, signal.SIGCONT)
        else:
            time.sleep(0.001)
            continue
        break
    node = _node_of(victim)
    drill.cluster.kill_node(node)
    try:
        yield int(folder.name.split(UNFINISHED)[0].removeprefix("step-"))
    finally:
        drill.cluster.start_node(node)
        idle = 8 if name == "no-spare" else 9
        drill.cluster.until(lambda: drill.cluster.nodes_in("idle") >= idle, 90, "idle nodes")


def _node_of(process: int) -> str:
    content = Path(f"/proc/{process}/environ").read_bytes().decode()
    values = dict(item.split("=", 1) for item in content.split("\0") if "=" in item)
    return values["SLURMD_NODENAME"]


def _ranks(drill: Drill, job: str) -> dict[int, int]:
    drill.cluster.hurry(job)
    if drill.cluster.has_ended(job):
        raise AssertionError(f"job {job} ended\n{drill.log('killed')}")
    return drill.cluster.ranks(job)


def _kill_one(drill: Drill, job: str, draw: random.Random) -> int:
    """Kill a rank at random; where a start has just ended, wait for the ranks of the next one."""
    killed: list[int] = []

    def kill() -> bool:
        if ranks := sorted(_ranks(drill, job).values()):
            victim = draw.choice(ranks)
            # It may have ended since it was listed.
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
        return bool(killed)

    drill.cluster.until(kill, 240, "a rank to kill")
    return killed[0]


def _restarts(drill: Drill, job: str) -> int:
    return int(drill.cluster.job(job).get("Restarts", "0"))


def _alive(processes: set[int]) -> bool:
    return any(Path(f"/proc/{process}").exists() for process in processes)


def _rank_0(drill: Drill, job: str) -> str:
    """All that the first rank of a job's starts printed."""
    return "\n".join(file.read_text() for file in sorted(drill.folder.glob(f"*/logs/{job}.*/rank-0.out")))


def _flip(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-64, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 0xFF]))


def _assert_close(ours: dict[int, float], theirs: dict[int, float]) -> None:
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-4


def test_control_groups_confine_ranks_to_their_cores_and_end_all_that_a_killed_start_leaves(
    tmp_path: Path,
) -> None:
    with pretend_cluster(CgroupCluster) as cluster:
        drill = Drill(cluster, tmp_path)
        flags = ["--head.draw_images=6", "--data.workers=1"]
        job = drill.submit(
            "confined", *flags, nodes=1, per_node=2, MEGAREGION_SETTLE="0",
            MEGAREGION_FAULT="slow:rank=0:step=1:seconds=0.3,die:rank=1:step=20:start=0",
        )  # fmt: skip
        drill.wait_for_step("confined", job, 2)
        ranks = cluster.ranks(job)
        assert [sorted(os.sched_getaffinity(ranks[rank])) for rank in (0, 1)] == [[0], [1]]
        [group] = (CGROUPS / "freezer" / "slurm_n1" / "uid_0" / f"job_{job}").glob("step_0")
        held = [int(process) for process in (group / "cgroup.procs").read_text().split()]
        assert {*ranks.values()} < {*held}, "the loaders' processes are in the group too"
        cores = (CGROUPS / "cpuset" / group.relative_to(CGROUPS / "freezer") / "cpuset.cpus").read_text()
        assert cores.strip() == "0-1"
        assert drill.finish("confined", job) == "COMPLETED", drill.log("confined")
        assert _restarts(drill, job) == 1
        assert not [process for process in held if Path(f"/proc/{process}").exists()]
        drill.torchrun("free", 2, *flags)
        assert_same(drill.state("confined"), drill.state("free"))
