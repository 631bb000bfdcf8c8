"""The look at the machines before a start: what it finds is named with its host, and says who can mend it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
from launch import Tool, free_port, launch
from test_run import command
from torch.distributed.distributed_c10d import _world
from toy import toy_config, toy_dataset

from megaregion.config import DataConfig, MachinesConfig, RunConfig
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UNFIT_EXIT, USER_ERROR_EXIT, UserError
from megaregion.parallel import topology
from megaregion.parallel.zero_stages import STAGES, VERSION, Stage
from megaregion.training.preflight import (
    Findings,
    Verdict,
    checkpoint_bytes,
    crowded,
    examine,
    judge,
    open_dataset,
    try_to_save,
)

WHOLE = Findings(
    rank=0, host="n0", versions={"torch": "2.13.0"}, device="H200, 140 GiB", matrix=0.010, exact=True,
    inside=300.0, across=40.0, clock=1000.0, dataset="f" * 64, free=10**12,
    cores=4, host_cores=8,
)  # fmt: skip


def findings(**odd: object) -> list[Findings]:
    """Two hosts of two ranks; rank 3, on n1, is odd."""
    ranks = [dataclasses.replace(WHOLE, rank=rank, host=f"n{rank // 2}") for rank in range(4)]
    return [*ranks[:3], dataclasses.replace(ranks[3], **odd)]  # type: ignore[arg-type]


def test_machines_that_are_alike_and_whole_pass() -> None:
    assert judge(findings(), MachinesConfig(), checkpoint_bytes=10**9) == Verdict()


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"device": "A100, 80 GiB"}, "n1 has device A100, 80 GiB, most have H200, 140 GiB"),
        ({"exact": False}, "rank 3 on n1 multiplies wrongly"),
        ({"matrix": 0.020}, "rank 3 on n1 takes 20.00 ms for a matrix product, the median is 10.00 ms"),
        ({"clock": 1009.5}, "n1's clock is +9.5 s off the others'"),
        ({"inside": 90.0}, "n1 reduces at 90.00 GB/s inside, less than machines.inside_gbytes 100"),
        (
            {"across": 4.0},
            "all ranks reduce at 4.00 GB/s, less than machines.across_gbytes 10; hosts: n0, n1",
        ),
    ],
)
def test_an_unfit_machine_is_named_and_another_allocation_may_do(odd: dict[str, object], said: str) -> None:
    verdict = judge(findings(**odd), MachinesConfig(inside_gbytes=100, across_gbytes=10), 10**9)
    assert not verdict.mistakes
    assert [said in problem for problem in verdict.machines] == [True], verdict


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"versions": {"torch": "2.12.1"}}, "n1 has versions torch 2.12.1, most have torch 2.13.0"),
        ({"dataset": "0" * 64}, "n1 has dataset 000000000000, most have ffffffffffff"),
        (
            {"dataset": "", "complaint": "shard-00000.tar does not exist"},
            "n1: shard-00000.tar does not exist",
        ),
        ({"refusal": "/runs takes no checkpoint (Read-only)"}, "n1: /runs takes no checkpoint (Read-only)"),
        ({"free": 10**9}, "n1 has 1.0 GB free for checkpoints, and 2 of them need 2.0 GB"),
    ],
)
def test_what_a_person_must_mend_is_a_mistake(odd: dict[str, object], said: str) -> None:
    verdict = judge(findings(**odd), MachinesConfig(), 10**9)
    assert not verdict.machines
    assert [said in problem for problem in verdict.mistakes] == [True], verdict


def test_a_disk_that_takes_no_checkpoint_is_found_before_the_first_save(tmp_path: Path) -> None:
    assert try_to_save(tmp_path, 3 * 2**20) == ""
    assert "/proc takes no checkpoint (" in try_to_save(Path("/proc"), 1)
    handler, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, limit[1]))
        told = try_to_save(tmp_path, 3 * 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert f"{tmp_path} takes no checkpoint (File too large); make it writable" in told
    assert not list(tmp_path.iterdir())


def test_ranks_that_share_a_few_of_many_cores_are_told() -> None:
    assert not crowded(findings(), workers=10), "all cores of the host are given"
    [line] = crowded(findings(cores=1, host_cores=64), workers=10)
    assert line == "n1 gives a rank 1 of its 64 cores for 10 loader workers; raise --cpus-per-task"
    assert not crowded(findings(cores=1, host_cores=64), workers=1), "the loader has what it asked for"


def test_a_checkpoint_is_weighed_before_it_is_written(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path / "shards")
    small = RunConfig(data=dataclasses.replace(RunConfig().data, path=str(dataset)))
    wider = dataclasses.replace(small, head=dataclasses.replace(small.head, embedding_dim=1024))
    info = json.loads((dataset / "dataset.json").read_text())
    assert 0 < checkpoint_bytes(small) < checkpoint_bytes(wider)
    assert info["samples"] > 0


def look_once_a_host(whole: Path, broken: Path) -> None:
    """Four ranks on two hosts open the dataset; then that of the second host is broken."""
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"n{rank // 2}"
    place = topology.join(1)
    hosts, groups = topology.all_gather_strings(topology.host_name(), place), len(_world.pg_map)
    looked: list[str] = []
    see, compare = ShardedDataset._check_size, ShardedDataset._check_hash
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            ShardedDataset,
            "_check_size",
            lambda own, shard, found: looked.append(shard.name) or see(own, shard, found),
        )
        patched.setattr(
            ShardedDataset,
            "_check_hash",
            lambda own, *file, **how: looked.append(file[0]) or compare(own, *file, **how),
        )
        dataset = open_dataset(DataConfig(path=str(whole)), place, hosts)
    shards = [shard.name for shard in dataset.info.shards]
    assert looked == ([*shards, "centers.npy", "tokenizer.model"] if rank % 2 == 0 else [])
    assert dataset.written == [(whole / f"{name}.tar").stat().st_mtime_ns for name in shards]
    assert dataset.read(len(dataset) - 1)
    with pytest.raises(UserError, match=r"^n1: .*\.tar does not exist"):
        open_dataset(DataConfig(path=str(broken if rank >= 2 else whole)), place, hosts)
    examine(toy_config(whole, whole.parent), place)
    assert len(_world.pg_map) == groups, "a group that is left keeps a GPU's memory"
    topology.leave()


def test_one_rank_of_a_host_looks_at_the_shards_and_all_ranks_hear_what_it_found_and_keep_no_group(
    tmp_path: Path,
) -> None:
    whole, broken = toy_dataset(tmp_path / "whole"), tmp_path / "broken"
    shutil.copytree(whole, broken)
    next(broken.glob("*.tar")).unlink()
    launch(look_once_a_host, 4, whole, broken)


def ask_for_queues() -> None:
    """Two ranks first as two copies of a model, then as one."""
    for tensor, wanted in ((1, None), (2, "1")):
        topology.join(tensor)
        assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == wanted
    topology.leave()


def test_only_ranks_that_share_a_model_ask_a_gpu_to_start_kernels_in_the_order_of_their_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    launch(ask_for_queues, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_another_deepspeed_than_the_one_whose_inside_is_known_is_refused(
    stage: type[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.20.1+cu130")
    told = (
        rf"deepspeed 0\.20\.1\+cu130 is installed, but megaregion knows the inside of {VERSION} alone; inst"
    )
    with pytest.raises(UserError, match=told):
        stage(None, {}, {}, None)


def test_gloo_takes_the_interface_that_leads_to_the_first_rank_and_none_inside_a_host() -> None:
    """A host that calls itself 127.0.1.1 would tell that to the others, which cannot reach it there."""
    assert topology.interface_to("127.0.1.1") == topology.interface_to("") == ""
    outside = {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    }
    assert {address: topology.interface_to(address) for address in outside} == outside


def start(folder: Path, datasets: list[Path], *extra: str) -> list[subprocess.CompletedProcess[str]]:
    """The command line on one rank for every dataset, two ranks a host."""
    port, processes = free_port(), []
    for rank, dataset in enumerate(datasets):
        launched = {
            "RANK": str(rank), "WORLD_SIZE": str(len(datasets)), "LOCAL_RANK": str(rank % 2),
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "SLURMD_NODENAME": f"n{rank // 2}",
        }  # fmt: skip
        flags = ["--train.steps=2", "--machines.slow_factor=0", *extra]
        words = command(dataset, folder, *flags)[3:]
        processes.append(Tool(*words, environment={**os.environ, **launched}))
    return [process.wait(timeout=240) for process in processes]


def test_ranks_look_at_their_machines_and_then_train_or_stop(tmp_path: Path) -> None:
    whole = toy_dataset(tmp_path / "whole")
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    next(other.glob("*.tar")).unlink()

    done = start(tmp_path / "first", [whole] * 4, "--preflight=first")
    assert [process.returncode for process in done] == [0] * 4, done[0].stderr
    assert "all-reduce over all 4 ranks" in done[0].stdout
    assert [line.split()[:2] for line in done[0].stdout.splitlines() if line.startswith("n")] == [
        ["n0", "2"], ["n1", "2"],
    ]  # fmt: skip
    assert (tmp_path / "first" / "run" / "metrics.jsonl").exists()

    teacher = f"--distill.teacher={tmp_path}"
    done = start(tmp_path / "mistake", [whole, whole, other, other], "--preflight=first", teacher)
    assert [process.returncode for process in done] == [USER_ERROR_EXIT] * 4
    assert re.search(r"preflight: n1: .*\.tar", done[0].stderr)
    for host in ("n0", "n1"):
        assert f"preflight: {host}: distill.teacher {tmp_path} cannot be read (" in done[0].stderr
    assert not (tmp_path / "mistake").exists(), "nothing is written before the machines are known"

    done = start(tmp_path / "unfit", [whole] * 2, "--preflight=only", "--machines.inside_gbytes=1e6")
    assert [process.returncode for process in done] == [UNFIT_EXIT] * 2
    assert "n0 reduces at" in done[0].stderr
