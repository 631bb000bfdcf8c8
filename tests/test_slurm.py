"""`sbatch slurm/pretrain_8gpu.sh` on a real SLURM of nine pretend nodes: drills that every change meets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from drill import Drill, assert_same
from launch import repository
from pretend_cluster import BindingCluster, pretend_cluster

RANKS = 3
"""The fewest whose sums depend on their order; `make drills` plays its faults on eight."""
STEPS = 16
SHORT = ("--train.micro_batch=8", f"--train.steps={STEPS}")
"""Micro-steps that three ranks share evenly; the drills take more of them."""


@pytest.fixture(scope="module")
def undisturbed(drill: Drill) -> str:
    """A run that nothing happened to, started by torchrun; returns its name."""
    drill.torchrun("undisturbed-on-three", RANKS, *SHORT)
    return "undisturbed-on-three"


def test_a_submitted_run_equals_the_one_of_torchrun_bit_for_bit(drill: Drill, undisturbed: str) -> None:
    job = drill.submit("submitted", *SHORT, nodes=RANKS)
    assert drill.finish("submitted", job) == "COMPLETED", drill.log("submitted")
    assert drill.is_trained("submitted", STEPS)
    assert drill.losses("submitted") == drill.losses(undisturbed)
    assert_same(drill.state("submitted"), drill.state(undisturbed))
    again = drill.submit("submitted", *SHORT, nodes=RANKS)
    assert drill.finish("submitted", again) == "COMPLETED"
    assert len(drill.records("submitted")) == STEPS, "a job that follows a finished run leaves at once"


def test_two_time_limits_cost_no_step_and_change_no_bit(drill: Drill, undisturbed: str) -> None:
    job = drill.submit("limited", *SHORT, nodes=RANKS)
    for step in (4, 9):
        drill.wait_for_step("limited", job, step)
        drill.ask_to_stop(job)
    assert drill.finish("limited", job) == "COMPLETED", drill.log("limited")
    assert drill.steps("limited") == list(range(1, STEPS + 1)), "a step was lost or taken twice"
    assert_same(drill.state("limited"), drill.state(undisturbed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--model.widht=5"], "did you mean model.width?"),
        (["--train.global_batch=7"], "train.global_batch must be a multiple of the 8 data-parallel ranks"),
    ],
)
def test_a_mistake_fails_the_job_at_once_and_is_not_requeued(
    drill: Drill, settings: list[str], message: str
) -> None:
    job = drill.submit("mistake", *settings)
    assert drill.finish("mistake", job, 60) == "FAILED"
    assert drill.cluster.job(job)["ExitCode"] == "2:0"
    assert message in (drill.folder / "mistake.log").read_text()


@pytest.fixture(scope="module")
def binding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    with pretend_cluster(BindingCluster) as cluster:
        yield Drill(cluster, tmp_path_factory.mktemp("binding"))


@pytest.mark.parametrize(("ranks", "cores_a_rank"), [(1, 2), (2, 1)])
def test_srun_gives_every_rank_the_cores_that_the_job_asked_for(
    binding: Drill, ranks: int, cores_a_rank: int
) -> None:
    name = f"bound{ranks}"
    flags = "--head.draw_images=6", "--preflight=only"
    job = binding.submit(name, *flags, nodes=1, per_node=ranks, cpus=cores_a_rank)
    assert binding.finish(name, job) == "COMPLETED", binding.log(name)
    text = next((binding.folder / name / "logs").glob("*/rank-0.out")).read_text()
    host = next(line.split() for line in text.splitlines() if line.startswith("n1 "))
    assert (host[1], host[5]) == (str(ranks), str(cores_a_rank)), text
    assert not (binding.folder / name / "checkpoints").exists(), "it was to look alone"


def test_jobs_of_one_host_and_starts_of_one_job_have_ports_of_their_own() -> None:
    def port_of(job: int, restarts: int) -> int:
        start = f"SLURM_JOB_ID={job} SLURM_RESTART_COUNT={restarts}"
        text = f"{start}; source {repository()}/slurm/rendezvous.sh; port_of"
        return int(subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout)

    ports = [port_of(job, restarts) for job in (7, 8, 9, 10007) for restarts in (0, 1, 2)]
    assert len(set(ports[:9])) == 9
    assert all(20000 <= port < 30100 for port in ports)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        assert port_of(7, 0) != ports[0]


@pytest.mark.parametrize(
    ("python", "srun", "started"),
    [
        ("/usr/bin/env", "", "FOO=1"),
        ("env FOO=2 env", "", "FOO=2"),
        ("env FOO=3 env", "--container-image=/images/a.sqsh --mpi=none",
         "srun --nodes=1 --ntasks=1 --container-image=/images/a.sqsh --mpi=none env FOO=3 env"),
    ],
)  # fmt: skip
def test_a_short_command_runs_with_the_ranks_python(
    tmp_path: Path, python: str, srun: str, started: str
) -> None:
    pretended = tmp_path / "srun"
    pretended.write_text('#!/bin/sh\necho srun "$@"\n')
    pretended.chmod(0o755)
    settings = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FOO": "1", "MEGAREGION_PYTHON": python}
    done = subprocess.run(
        ["bash", "-euc", "source slurm/site.sh; run_python"], cwd=repository(),
        env={**settings, "MEGAREGION_SRUN": srun}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert started in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("launch.sh configs/demo.yaml", 2, "runs inside a job"),
        ("pretrain_8gpu.sh --data.path=here", 2, "use sbatch slurm/pretrain_64gpu.sh"),
        ("curate.sh --images here", 2, "there is no /nowhere/python; run make .venv/ready here"),
        ("curate.sh --help", 0, "--images"),
    ],
)
def test_a_script_that_is_started_by_hand_says_what_it_needs(command: str, code: int, told: str) -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    python = "/nowhere/python" if code else sys.executable
    done = subprocess.run(
        ["bash", *f"slurm/{command}".split()], cwd=repository(), check=False, text=True,
        env={**outside, "MEGAREGION_PYTHON": python}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert told in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == (1 if code else 0)


def test_every_script_is_clean() -> None:
    scripts = sorted((repository() / "slurm").rglob("*.sh"))
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    command = ["shellcheck", "-x", *map(str, scripts)]
    try:
        done = subprocess.run(command, cwd=repository(), capture_output=True, text=True, check=False)
    except FileNotFoundError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip("shellcheck is not installed")
    assert done.returncode == 0, done.stdout
