"""What is looked at before a start costs anything: machines that differ, are sick, slow or short of disk.

Every rank measures itself, all ranks' findings meet on every rank, and one judgement, the same everywhere,
says what is wrong and on which host. Only what is wrong with a machine may be gone at the next start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megaregion.config import DataConfig, MachinesConfig, RunConfig
from megaregion.data.shards import Datasets, open_datasets
from megaregion.errors import UNFIT_EXIT, USER_ERROR_EXIT, UserError
from megaregion.models import foreign
from megaregion.models.vit import RegionEncoder
from megaregion.parallel.topology import Group, Topology, all_gather_strings, host_group, host_name
from megaregion.schemas.evaluation import aligned

PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy", "webdataset")
ROUNDS = 5
PROBE_BYTES = 64 * 2**20
"""Most that a rank writes to try the disk."""


@dataclass(frozen=True)
class Findings:
    """What one rank says of itself and its host."""

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    """Kind of the device and its memory."""
    matrix: float
    """Seconds of one matrix product, the best of some rounds."""
    exact: bool
    """Whether that product is right to the last bit."""
    inside: float
    """Bus bandwidth of an all-reduce over the host's ranks, GB/s; 0 where it has one."""
    across: float
    """Bus bandwidth of an all-reduce over all ranks, GB/s; 0 for one rank."""
    clock: float
    """Seconds since the epoch, taken as all ranks leave one barrier."""
    dataset: str
    """Hash of dataset.json and every shard's size, empty if the dataset cannot be read."""
    free: int
    """Bytes free where checkpoints are written."""
    cores: int
    """Cores that this rank and its loader may run on."""
    host_cores: int
    """Cores of the whole host."""
    complaint: str = ""
    """Why the dataset cannot be read."""
    refusal: str = ""
    """Why a file as large as this rank's part of a checkpoint cannot be written and read there."""
    teacher: str = ""
    """Why the run's teacher cannot be read on this host, by its first rank."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of all findings."""

    machines: list[str] = field(default_factory=list)
    """What is wrong with a host; another allocation may do without it."""
    mistakes: list[str] = field(default_factory=list)
    """What a person has to mend before any start can work."""


def check_machines(config: RunConfig, topology: Topology) -> int:
    """Examine, judge and tell; a collective. Gives 0, or the exit code that the start must end with."""
    began = time.perf_counter()
    findings = examine(config, topology)
    verdict = judge(findings, config.machines, checkpoint_bytes(config))
    if topology.rank == 0:
        print(f"{table(findings)}; looked at in {time.perf_counter() - began:.1f} s")
        for problem in verdict.mistakes + verdict.machines + crowded(findings, config.data.workers):
            print(f"megaregion: preflight: {problem}", file=sys.stderr)
    if verdict.mistakes:
        return USER_ERROR_EXIT
    return UNFIT_EXIT if verdict.machines else 0


def examine(config: RunConfig, topology: Topology) -> list[Findings]:
    """Every rank's findings, in rank order; a collective."""
    hosts = all_gather_strings(host_name(), topology)
    inside = host_group(hosts, topology)
    first = hosts.index(hosts[topology.rank]) == topology.rank
    floats = 1 << (24 if topology.device.type == "cuda" else 20)
    seconds, exact = _multiply(topology.device)
    folder = _existing(Path(config.output) / config.name / "checkpoints")
    dataset, complaint = _read_dataset(config.data, topology, hosts, inside)
    dist.barrier(topology.world_group)
    findings = Findings(
        clock=time.time(), rank=topology.rank, host=hosts[topology.rank], versions=_versions(),
        device=_describe(topology.device), matrix=seconds, exact=exact,
        inside=_bus_bandwidth(inside, floats, topology.device),
        across=_bus_bandwidth(topology.world_group, floats, topology.device),
        dataset=dataset, complaint=complaint, free=shutil.disk_usage(folder).free,
        refusal=try_to_save(folder, checkpoint_bytes(config) // topology.world_size),
        cores=_own_cores(), host_cores=os.cpu_count() or 1,
        teacher=_look_at(config.distill.teacher) if first else "",
    )  # fmt: skip
    texts = all_gather_strings(json.dumps(dataclasses.asdict(findings)), topology)
    dist.destroy_process_group(inside)  # Or NCCL would keep memory for it as long as the run lasts.
    return [Findings(**json.loads(text)) for text in texts]


def judge(findings: Sequence[Findings], wanted: MachinesConfig, checkpoint_bytes: int) -> Verdict:
    """What is wrong by all ranks' findings and what is wanted, each in one line that names the host."""

    def versions(one: Findings) -> str:
        return ", ".join(f"{name} {version}" for name, version in one.versions.items())

    mistakes = _differ(findings, "versions", versions, "install requirements.txt there")
    for key in ("complaint", "refusal", "teacher"):
        told = [f"{one.host}: {getattr(one, key)}" for one in findings if getattr(one, key)]
        mistakes += dict.fromkeys(told)
    readable = [one for one in findings if not one.complaint]
    mistakes += _differ(readable, "dataset", lambda one: one.dataset[:12], "copy it there again")
    need = wanted.free_checkpoints * checkpoint_bytes
    short = {one.host: one.free for one in findings if one.free < need}
    mistakes += [
        f"{host} has {free / 1e9:,.1f} GB free for checkpoints, and {wanted.free_checkpoints} of them need "
        f"{need / 1e9:,.1f} GB (machines.free_checkpoints)"
        for host, free in short.items()
    ]
    machines = _differ(findings, "device", lambda one: one.device, "leave it out (sbatch --exclude)")
    machines += [f"{_place(one)} multiplies wrongly" for one in findings if not one.exact]
    machines += _slow(findings, wanted.slow_factor) + _narrow(findings, wanted) + _skewed(findings, wanted)
    return Verdict(machines, mistakes)


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: fp32 masters and two moments each, of the body and the heads' rows."""
    with torch.device("meta"):
        body = sum(p.numel() for p in RegionEncoder(config.model, config.head.embedding_dim).parameters())
    try:
        info = open_datasets(config.data, False, [()] * len(config.data.datasets)).info
        rows = info.object_classes + info.text_classes
    except UserError:
        rows = 0  # The dataset is complained of by itself.
    return 4 * 3 * (body + rows * config.head.embedding_dim)


def table(findings: Sequence[Findings]) -> str:
    """Hosts below each other: slowest rank, bandwidth inside, free disk, fewest cores, device."""
    hosts: dict[str, list[Findings]] = defaultdict(list)
    for one in findings:
        hosts[one.host].append(one)
    rows = [("host", "ranks", "product ms", "inside GB/s", "free GB", "cores a rank", "device")]
    for host, ranks in hosts.items():
        slowest, narrowest = max(one.matrix for one in ranks), min(one.inside for one in ranks)
        inside, free = f"{narrowest:.2f}" if narrowest else "-", f"{ranks[0].free / 1e9:,.0f}"
        cores = str(min(one.cores for one in ranks))
        rows.append((host, str(len(ranks)), f"{slowest * 1e3:.2f}", inside, free, cores, ranks[0].device))
    across = min(one.across for one in findings)
    return f"{aligned(rows, left=(0, 6))}\nall-reduce over all {len(findings)} ranks: {across:.2f} GB/s"


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    found["python"] = platform.python_version()
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"processor {platform.machine()}"


def _multiply(device: torch.device) -> tuple[float, bool]:
    """Seconds of a matrix product, and whether it is exact: small integers leave nothing to round."""
    size, kind = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-1, 2, (size, size), generator=generator).to(device, kind)
    columns = torch.arange(size, device=device)
    # A permutation and signs: every element of the product is known without a second product.
    right = torch.zeros(size, size, device=device, dtype=kind)
    right[columns, (columns * 5 + 3) % size] = 1
    expected = torch.empty_like(left)
    expected[:, (columns * 5 + 3) % size] = left
    seconds, exact = [], True
    for _ in range(ROUNDS):
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            product = left @ right
            events[1].record()
            torch.cuda.synchronize()
            seconds.append(events[0].elapsed_time(events[1]) / 1e3)
        else:
            began = time.thread_time()
            product = left @ right
            seconds.append(time.thread_time() - began)
        exact = exact and torch.equal(product, expected)
    return min(seconds), exact


def _bus_bandwidth(group: Group, floats: int, device: torch.device) -> float:
    """GB/s over every link of a ring: 2 (n - 1) / n of the bytes over the best round's seconds."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return 0.0
    payload, best = torch.ones(floats, device=device), float("inf")
    for _ in range(ROUNDS):
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_reduce(payload, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * (ranks - 1) / ranks * payload.numel() * 4 / best / 1e9


def _look_at(teacher: str) -> str:
    """Why a teacher's settings cannot be read, without its weights; empty where there is none."""
    try:
        if teacher:
            foreign.skeleton(teacher)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        advice = "name a folder that save_pretrained wrote or a hub id"
        return f"distill.teacher {teacher} cannot be read ({reason}); {advice}"
    return ""


def open_dataset(data: DataConfig, topology: Topology, hosts: list[str]) -> Datasets:
    """The run's datasets, whose files the first rank of each host looks at for all of them; a collective.

    Raises:
        UserError: A host cannot use it; raised on every rank.
    """
    inside = host_group(hosts, topology)
    dataset, complaint = _open_on_host(data, True, topology, hosts, inside)
    complaints = all_gather_strings(complaint, topology)
    dist.destroy_process_group(inside)
    for host, complaint in zip(hosts, complaints, strict=True):
        if complaint:
            raise UserError(complaint if len(set(hosts)) == 1 else f"{host}: {complaint}")
    assert dataset is not None
    return dataset


def _open_on_host(
    data: DataConfig, check_labels: bool, topology: Topology, hosts: list[str], host: Group
) -> tuple[Datasets | None, str]:
    """The datasets as the first rank of this host finds it, or its complaint; a collective of the host."""
    dataset, told = None, ""
    if hosts.index(hosts[topology.rank]) == topology.rank:
        try:
            dataset = open_datasets(data, check_labels)
            told = json.dumps(["", [part.written for part in dataset.parts]])
        except (UserError, OSError) as error:
            told = json.dumps([str(error), []])
    among = dataclasses.replace(topology, world_group=host, world_size=dist.get_world_size(host))
    complaint, written = json.loads(all_gather_strings(told, among)[0])
    if dataset is None and not complaint:
        try:
            dataset = open_datasets(data, False, written)
        except (UserError, OSError) as error:
            complaint = str(error)
    return dataset, complaint


def _read_dataset(data: DataConfig, topology: Topology, hosts: list[str], host: Group) -> tuple[str, str]:
    """Hash of what names the dataset's bytes, and a complaint; reads one sample of this rank's own."""
    dataset, complaint = _open_on_host(data, False, topology, hosts, host)
    if dataset is None:
        return "", complaint
    try:
        dataset.read(topology.rank * len(dataset) // topology.world_size)
        dataset.close()
        content = b"".join((part.folder / "dataset.json").read_bytes() for part in dataset.parts)
    except (UserError, OSError) as error:
        return "", str(error)
    return hashlib.sha256(content).hexdigest(), ""


def _own_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def try_to_save(folder: Path, size: int) -> str:
    """Write and read a file where checkpoints will lie; gives what went wrong, or nothing."""
    probe, block = folder / f".probe-{host_name()}-{os.getpid()}", os.urandom(2**20)
    blocks = max(1, min(size, PROBE_BYTES) // len(block))
    try:
        with probe.open("xb", buffering=0) as stream:
            written = sum(stream.write(block) for _ in range(blocks))
            os.fsync(stream.fileno())
        with probe.open("rb", buffering=0) as stream:
            whole = written == blocks * len(block) and all(stream.read(2**20) == block for _ in range(blocks))
        return "" if whole else f"{folder} does not give back what was written; checkpoints cannot lie there"
    except OSError as error:
        return f"{folder} takes no checkpoint ({error.strerror}); make it writable, or change output"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _differ(
    findings: Sequence[Findings], what: str, of: Callable[[Findings], str], way_out: str
) -> list[str]:
    """One line for every host that differs from what most have."""
    if not findings:
        return []
    usual = Counter(of(one) for one in findings).most_common(1)[0][0]
    odd = {one.host: of(one) for one in findings if of(one) != usual}
    return [f"{host} has {what} {found}, most have {usual}; {way_out}" for host, found in odd.items()]


def _slow(findings: Sequence[Findings], factor: float) -> list[str]:
    usual = statistics.median(one.matrix for one in findings)
    return [
        f"{_place(one)} takes {one.matrix * 1e3:.2f} ms for a matrix product, the median is "
        f"{usual * 1e3:.2f} ms (machines.slow_factor {factor:g})"
        for one in findings
        if factor and one.matrix > factor * usual
    ]


def _narrow(findings: Sequence[Findings], wanted: MachinesConfig) -> list[str]:
    hosts = {one.host: one.inside for one in findings if one.inside}
    narrow = [
        f"{host} reduces at {speed:.2f} GB/s inside, less than machines.inside_gbytes "
        f"{wanted.inside_gbytes:g}"
        for host, speed in hosts.items()
        if speed < wanted.inside_gbytes
    ]
    across = min(one.across for one in findings)
    if len(findings) > 1 and across < wanted.across_gbytes:
        names = ", ".join(dict.fromkeys(one.host for one in findings))
        narrow.append(
            f"all ranks reduce at {across:.2f} GB/s, less than machines.across_gbytes "
            f"{wanted.across_gbytes:g}; hosts: {names}"
        )
    return narrow


def _skewed(findings: Sequence[Findings], wanted: MachinesConfig) -> list[str]:
    usual = statistics.median(one.clock for one in findings)
    hosts = {one.host: one.clock - usual for one in findings}
    return [
        f"{host}'s clock is {skew:+.1f} s off the others' (machines.clock_skew {wanted.clock_skew:g} s)"
        for host, skew in hosts.items()
        if abs(skew) > wanted.clock_skew
    ]


def crowded(findings: Sequence[Findings], workers: int) -> list[str]:
    """Hosts whose ranks share a few of many cores: worth a line, not an end."""
    ranks = Counter(one.host for one in findings)
    few = {
        one.host: (one.cores, one.host_cores)
        for one in findings
        if one.cores < workers and 2 * one.cores * ranks[one.host] <= one.host_cores
    }
    return [
        f"{host} gives a rank {cores} of its {all_cores} cores for {workers} loader workers; "
        "raise --cpus-per-task"
        for host, (cores, all_cores) in few.items()
    ]


def _place(one: Findings) -> str:
    return f"rank {one.rank} on {one.host}"
