"""Who this process is among all ranks, the process groups it talks through, and rows that cross them.

Ranks are laid out tensor-parallel first: ranks 0 .. T-1 share one copy of the model, rank r has data
rank r // T. A single process is a world of one rank and takes the same path as 64 GPUs.

On several nodes the network between them is the narrow part, so each row crosses into a node once: on
the way out it first goes to the rank with the same place on each other node and spreads inside from
there; on the way back the ranks of a node first add up what they hold, then the nodes exchange sums.

Shapes: r rows on this rank, R rows over all ranks of a group.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.errors import UserError

Group = Any
"""A torch.distributed process group."""
# Torch 2.13 calls them so, and warns about the names that 2.11 and 2.12 have.
_NAMED = hasattr(dist, "all_gather_single")
all_gather: Any = dist.all_gather_single if _NAMED else dist.all_gather_into_tensor
reduce_scatter: Any = dist.reduce_scatter_single if _NAMED else dist.reduce_scatter_tensor
ELSEWHERE = "203.0.113.1"
"""An address that stands in documents alone; the way there is the way out."""


@dataclass(frozen=True)
class NodeGroups:
    """A data group on several nodes, cut both ways; its ranks lie node by node."""

    inside: Group
    """Those of its ranks that share this rank's node."""
    between: Group
    """Those that have this rank's place on their nodes, one per node."""


@dataclass(frozen=True)
class Topology:
    """This rank's place, and the groups it belongs to."""

    rank: int
    world_size: int
    tensor_rank: int
    """Rank among the processes that share one copy of the model."""
    tensor_size: int
    """Processes that share one copy of the model."""
    device: torch.device
    world_group: Group
    data_group: Group
    """Ranks that hold the same shard of the model and read different samples."""
    tensor_group: Group
    """Ranks that share one copy of the model and read the same samples."""
    node_groups: NodeGroups | None = None
    """The data group by nodes; None where it has one node, or one rank on each."""

    @property
    def data_rank(self) -> int:
        """Rank among the copies of the model."""
        return self.rank // self.tensor_size

    @property
    def data_size(self) -> int:
        """Copies of the model."""
        return self.world_size // self.tensor_size


def join(tensor: int, timeout_minutes: int = 30, deterministic: bool = False) -> Topology:
    """Join the process group that the launcher describes and lay the ranks out.

    The launcher is torchrun (RANK, WORLD_SIZE, LOCAL_RANK), srun (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID)
    or nobody (one process). A collective that stalls for ``timeout_minutes`` raises.
    ``deterministic`` lets this process use only kernels whose sums have a fixed order.

    Raises:
        UserError: The number of ranks is not a multiple of ``tensor``.
    """
    rank, world_size, local_rank = launched_as()
    if world_size % tensor:
        raise UserError(f"parallel.tensor must divide the number of ranks {world_size}, got {tensor}")
    if deterministic:
        # cuBLAS reads it with its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # What is new is written before it is read: filling it would only cost passes over memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if tensor > 1:
        # Kernels start in the order of their calls, so that the tensor ranks' sums run beside products.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if world_size > 1:
        # Gloo asks what this host calls itself, which on many is 127.0.1.1.
        elsewhere = ELSEWHERE if (ranks_per_node() or world_size) < world_size else ""
        if found := interface_to(os.environ.get("MASTER_ADDR", "")) or interface_to(elsewhere):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
    device = _own_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_store(rank, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=timeout_minutes),
        )
    return _lay_out(rank, world_size, tensor, device, timedelta(minutes=timeout_minutes))


def own_store(purpose: str) -> Any:
    """A connection to the launcher's store that only its owner uses, while collectives use another.

    ``purpose`` keeps its keys apart from everybody else's.
    """
    rank, world_size, _ = launched_as()
    # The agent of torchrun keeps its store over restarts, and old news with it.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"{purpose}-{start}", _store(rank, world_size, joins=True))  # type: ignore[attr-defined]


def host_name() -> str:
    """This host as SLURM calls it in its commands, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def interface_to(host: str) -> str:
    """The network interface that leads to a host; nothing inside of this one, or if no way is known."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # Sends nothing.
        own, _ = probe.getsockname()
        for name, addresses in psutil.net_if_addrs().items():
            if own in {address.address for address in addresses} and not own.startswith("127."):
                return name
    return ""


def host_group(hosts: list[str], topology: Topology) -> Group:
    """The group of the ranks that share this rank's host, given every rank's in order; a collective."""
    groups = [[rank for rank, other in enumerate(hosts) if other == host] for host in dict.fromkeys(hosts)]
    return _own_group(groups, topology.rank, timedelta(minutes=5))


def all_gather_strings(text: str, topology: Topology) -> list[str]:
    """Every rank's text, in rank order, without pickle; a collective."""
    own = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8).to(topology.device)
    group, size = topology.world_group, torch.tensor([len(text.encode())], device=topology.device)
    sizes = size.new_empty(topology.world_size)
    all_gather(sizes, size, group=group)
    longest = max(1, int(sizes.max()))
    padded = own.new_zeros(longest)
    padded[: len(own)] = own
    gathered = own.new_empty(topology.world_size * longest)
    all_gather(gathered, padded, group=group)
    rows = gathered.view(topology.world_size, longest).cpu()
    return [row[:length].numpy().tobytes().decode() for row, length in zip(rows, sizes.tolist(), strict=True)]


class GatheringRows:
    """Rows of all ranks, on their way; every rank has as many."""

    def __init__(self, rows: Tensor, group: Group, nodes: NodeGroups | None = None) -> None:
        """Send this rank's rows; :meth:`arrive` waits for all."""
        self._nodes = nodes
        # Held here, since what is being sent must not be freed.
        self._sent = rows.contiguous()
        first = group if nodes is None else nodes.between
        self._received = rows.new_empty((len(rows) * first.size(), *rows.shape[1:]))
        self._work = all_gather(self._received, self._sent, group=first, async_op=True)

    def arrive(self) -> Tensor:
        """Wait for the rows of all ranks, [R, ...]; a GPU's queue waits, not the host. Call it once."""
        if self._work is not None:
            self._work.wait()
        rows, each = self._received, len(self._sent)
        if self._nodes is None:
            return rows
        inside, between = self._nodes.inside, self._nodes.between
        by_place = rows.new_empty((inside.size() * len(rows), *rows.shape[1:]))
        all_gather(by_place, rows, group=inside)
        shape = (inside.size(), between.size(), each, *rows.shape[1:])
        return by_place.view(shape).transpose(0, 1).flatten(0, 2)


def scatter_sums(
    rows: Tensor, group: Group, nodes: NodeGroups | None = None, sum_dtype: torch.dtype | None = None
) -> Tensor:
    """The way back of the gather: sum all ranks' parts of all rows [R, ...], give each its own, [r, ...].

    With ``nodes`` it goes node by node, and sums are added in another order. They travel and add up as
    ``sum_dtype``, the rows' own type if None.
    """
    each, sum_dtype = len(rows) // group.size(), sum_dtype or rows.dtype
    if nodes is None:
        return _reduce_scatter(rows.to(sum_dtype), each, group)
    inside, between = nodes.inside, nodes.between
    by_node = rows.view(between.size(), inside.size(), each, *rows.shape[1:])
    # One copy turns and widens.
    by_place = by_node.transpose(0, 1).to(sum_dtype, memory_format=torch.contiguous_format).flatten(0, 2)
    return _reduce_scatter(_reduce_scatter(by_place, between.size() * each, inside), each, between)


def _reduce_scatter(rows: Tensor, each: int, group: Group) -> Tensor:
    own = rows.new_empty((each, *rows.shape[1:]))
    reduce_scatter(own, rows.contiguous(), group=group)
    return own


def leave() -> None:
    """Leave all process groups once every rank is here; call it last, on every rank."""
    dist.barrier()
    dist.destroy_process_group()


def _lay_out(rank: int, world_size: int, tensor: int, device: torch.device, timeout: timedelta) -> Topology:
    """Make the groups. Every rank makes all of them, in one order, as torch.distributed wants it."""
    tensor_groups = [list(range(first, first + tensor)) for first in range(0, world_size, tensor)]
    data_groups = [list(range(first, world_size, tensor)) for first in range(tensor)]
    nodes = node_lists(world_size, tensor, _agreed_ranks_per_node(world_size))
    return Topology(
        rank=rank,
        world_size=world_size,
        tensor_rank=rank % tensor,
        tensor_size=tensor,
        device=device,
        world_group=dist.group.WORLD,
        data_group=_own_group(data_groups, rank, timeout),
        tensor_group=_own_group(tensor_groups, rank, timeout),
        node_groups=nodes and NodeGroups(*(_own_group(groups, rank, timeout) for groups in nodes)),
    )


def node_lists(
    world_size: int, tensor: int, ranks_per_node: int
) -> tuple[list[list[int]], list[list[int]]] | None:
    """Ranks of all groups inside nodes, and of all between them.

    None unless every one of several nodes holds several whole copies of the model; neighbours share a node.
    """
    nodes, copies = world_size // ranks_per_node, ranks_per_node // tensor
    if ranks_per_node % tensor or world_size % ranks_per_node or nodes < 2 or copies < 2:
        return None
    inside = [
        list(range(node * ranks_per_node + first, (node + 1) * ranks_per_node, tensor))
        for node in range(nodes)
        for first in range(tensor)
    ]
    return inside, [list(range(place, world_size, ranks_per_node)) for place in range(ranks_per_node)]


def _agreed_ranks_per_node(world_size: int) -> int:
    """Ranks on every node if all ranks were told the same number, else all: then nothing is cut by nodes."""
    if world_size == 1:
        return 1
    told = ranks_per_node() or world_size
    # Nodes of different sizes are each told their own; unequal groups would wait for each other for ever.
    ends = torch.tensor([told, -told])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return told if int(ends[0]) == -int(ends[1]) else world_size


def ranks_per_node() -> int | None:
    """Ranks on a node as the launcher tells; None if it does not, or tells of different nodes.

    torchrun sets LOCAL_WORLD_SIZE; srun sets SLURM_STEP_TASKS_PER_NODE, as in ``8(x2)`` or ``8,4``.
    """
    for key in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if key in os.environ:
            found = re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ[key])
            return int(found[1]) if found and int(found[1]) else None
    return None


def _own_group(groups: list[list[int]], rank: int, timeout: timedelta) -> Group:
    made = [dist.new_group(ranks, timeout=timeout) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)


def launched_as() -> tuple[int, int, int]:
    """Rank, world size and rank on this host, as the launcher says."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def _store(rank: int, world_size: int, joins: bool = False) -> Any:
    if world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        raise UserError(
            f"MASTER_ADDR and MASTER_PORT must name the first rank's host and a free port for {world_size} "
            f"ranks, got {host}:{port} on {socket.gethostname()}; start with torchrun or slurm/launch.sh"
        )
    # torchrun's agent already serves a store there; every worker, the first too, is then a client.
    serves = rank == 0 and not joins and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), world_size, serves, timeout=timedelta(minutes=10)
    )


def _own_device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", "1")))
    if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun sets OMP_NUM_THREADS=1; without it every rank would take every core.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
    return torch.device("cpu")
