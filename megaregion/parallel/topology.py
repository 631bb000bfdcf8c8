"""Who this process is among all ranks, and the process groups it talks through.

Ranks are laid out tensor-parallel first: ranks 0 .. T-1 share one copy of the model, rank r has data
rank r // T. A single process is a world of one rank and takes the same path as 64 GPUs.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megaregion.errors import UserError

Group = Any
"""A torch.distributed process group."""


@dataclass(frozen=True)
class Topology:
    """This rank's place, and the groups it belongs to."""

    rank: int
    """Rank among all processes."""
    world_size: int
    """Number of processes."""
    tensor_rank: int
    """Rank among the processes that share one copy of the model."""
    tensor_size: int
    """Processes that share one copy of the model."""
    device: torch.device
    """Device of this rank's tensors."""
    world_group: Group
    """All ranks."""
    data_group: Group
    """Ranks that hold the same shard of the model and read different samples."""
    tensor_group: Group
    """Ranks that share one copy of the model and read the same samples."""

    @property
    def data_rank(self) -> int:
        """Rank among the copies of the model."""
        return self.rank // self.tensor_size

    @property
    def data_size(self) -> int:
        """Copies of the model."""
        return self.world_size // self.tensor_size


def join(tensor: int, timeout_minutes: int = 30) -> Topology:
    """Join the process group that the launcher describes and lay the ranks out.

    The launcher is torchrun (RANK, WORLD_SIZE, LOCAL_RANK), srun (SLURM_PROCID, SLURM_NTASKS,
    SLURM_LOCALID) or nobody (one process).

    Args:
        tensor: Ranks that share one copy of the model.
        timeout_minutes: Time after which a stalled collective raises.

    Raises:
        UserError: The number of ranks is not a multiple of tensor.
    """
    rank, world_size, local_rank = _launched_as()
    if world_size % tensor:
        raise UserError(f"parallel.tensor must divide the number of ranks {world_size}, got {tensor}")
    device = _own_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_store(rank, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=timeout_minutes),
        )
    return _lay_out(rank, world_size, tensor, device)


def leave() -> None:
    """Leave all process groups; call it last, on every rank."""
    dist.destroy_process_group()


def _lay_out(rank: int, world_size: int, tensor: int, device: torch.device) -> Topology:
    """Make the groups. Every rank makes all of them, in one order, as torch.distributed wants it."""
    tensor_groups = [list(range(first, first + tensor)) for first in range(0, world_size, tensor)]
    data_groups = [list(range(first, world_size, tensor)) for first in range(tensor)]
    return Topology(
        rank=rank,
        world_size=world_size,
        tensor_rank=rank % tensor,
        tensor_size=tensor,
        device=device,
        world_group=dist.group.WORLD,
        data_group=_own_group(data_groups, rank),
        tensor_group=_own_group(tensor_groups, rank),
    )


def _own_group(groups: list[list[int]], rank: int) -> Group:
    made = [dist.new_group(ranks) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)


def _launched_as() -> tuple[int, int, int]:
    """Rank, world size and rank on this host, as the launcher says."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def _store(rank: int, world_size: int) -> Any:
    if world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        raise UserError(
            f"MASTER_ADDR and MASTER_PORT must name the first rank's host and a free port for {world_size} "
            f"ranks, got {host}:{port} on {socket.gethostname()}; start with torchrun or slurm/launch.sh"
        )
    # torchrun's agent already serves a store there; every worker, the first too, is then a client.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
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
