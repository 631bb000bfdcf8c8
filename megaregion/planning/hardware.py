"""What a plan reckons with: processors, links and storage of a cluster, and what is to be curated there.

A description is a YAML file of these fields; configs/clusters/ holds presets. Rates are those that are
reached, not those of a data sheet: ``pretrain.py --preflight`` and ``benchmark.py plan`` measure them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megaregion.bounds import LARGE, PositiveInt, Real, Text, Whole
from megaregion.errors import UserError
from megaregion.files import home
from megaregion.settings import check, flag_name, read_file

PRESETS = home("configs") / "clusters"
GIB = 2**30

Gib = Annotated[float, Real(0, 10**6, "GIB")]
Rate = Annotated[float, Real(0, 10**6, "GB/S", above=True)]
Efficiency = Annotated[float, Real(0, 10, "SHARE", above=True)]
Latency = Annotated[float, Real(0, 10**6, "US")]
Ranks = Annotated[int, Whole(1, 10**6, "RANKS")]


@dataclass(frozen=True)
class Hardware:
    """A cluster; the defaults are 64 H100."""

    name: str = "h100x64"
    """Name in the plan's head line."""
    device: Literal["gpu", "processor"] = "gpu"
    """gpu: allocated memory counts, reductions run beside the backward pass; processor: only touched
    memory counts and nothing overlaps."""
    gpus: Ranks = 64
    """Ranks of the run."""
    gpus_per_node: Ranks = 8
    """Ranks of a node."""
    memory_gib: Gib = 79.1
    """Memory of a rank, GiB."""
    reserve_gib: Gib = 4.0
    """Memory that no plan may use: the driver's context, NCCL's buffers, gaps in the allocator, GiB."""
    matrix_tflops: Annotated[float, Real(0, 10**6, "TFLOP/S", above=True)] = 700.0
    """Rate of a large product of matrices in the run's precision, TFLOP/s."""
    linear_share: Efficiency = 0.85
    """Share of that rate that products of the encoder's and the head's sizes reach."""
    attention_share: Efficiency = 0.45
    """Share of that rate that attention reaches, forward and backward together."""
    memory_gbytes: Rate = 2700.0
    """GB/s that passes over activations read and write (norms, turns, non-linearities)."""
    stream_gbytes: Annotated[float, Real(0, 10**6, "GB/S")] = 0.0
    """GB/s that copies and the optimizer read and write; 0: memory_gbytes."""
    launch_us: Latency = 4.0
    """Microseconds of the host for one kernel; a phase takes at least its number of kernels times this."""
    inside_gbytes: Rate = 360.0
    """Bus bandwidth of a collective inside a node (NVLink), GB/s."""
    across_gbytes: Rate = 320.0
    """The same between nodes, all network cards of a node together, GB/s."""
    latency_us: Latency = 30.0
    """Microseconds that a collective takes whatever its size."""
    host_gbytes: Rate = 25.0
    """From a rank's memory to the host's, GB/s."""
    write_gbytes: Rate = 10.0
    """Storage under the run's folder, writing, all nodes together, GB/s."""
    read_gbytes: Rate = 20.0
    """Storage of the shards, reading, all nodes together, GB/s."""
    decode_images: Annotated[float, Real(0, 10**6, "IMAGES/S", above=True)] = 200.0
    """Images per second that one process of the loader reads, decodes, crops and resizes."""
    image_kbytes: Annotated[float, Real(0, 10**6, "KB", above=True)] = 100.0
    """Mean size of a stored image, kB."""

    @property
    def nodes(self) -> int:
        """Nodes of the run."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def usable_bytes(self) -> float:
        """Memory of a rank that a plan may use."""
        return (self.memory_gib - self.reserve_gib) * GIB

    def sized(self, gpus: int) -> Hardware:
        """The same machines, more or fewer of them; storage grows with the nodes it serves."""
        per_node = min(self.gpus_per_node, gpus)
        share = max(1.0, gpus / self.gpus)
        return dataclasses.replace(
            self,
            gpus=gpus,
            gpus_per_node=per_node,
            write_gbytes=self.write_gbytes * share,
            read_gbytes=self.read_gbytes * share,
        )


def load_hardware(name: str) -> Hardware:
    """Read a preset, or the YAML file of a path.

    Raises:
        UserError: No such preset or file, an unknown field, or a value out of bounds.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise UserError(f"--cluster {name} is neither a preset ({known}) nor a YAML file")
    hardware = read_file(Hardware(name=path.stem), path)
    check_hardware(hardware)
    return hardware


def check_hardware(hardware: Hardware) -> None:
    """Check a cluster.

    Raises:
        UserError: A value is out of bounds or contradicts another.
    """
    check(hardware, say=flag_name)
    if hardware.gpus > hardware.gpus_per_node and hardware.gpus % hardware.gpus_per_node:
        raise UserError(
            f"--gpus must be a multiple of the {hardware.gpus_per_node} GPUs of a node, got {hardware.gpus}"
        )
    if hardware.usable_bytes <= 0:
        raise UserError(
            f"--reserve-gib {hardware.reserve_gib:g} leaves nothing of --memory-gib {hardware.memory_gib:g}"
        )


@dataclass(frozen=True)
class Load:
    """What is to be curated."""

    images: Annotated[int, Whole(1, LARGE, "IMAGES")] = 400_000_000
    """Images of the dataset."""
    regions: Annotated[float, Real(0, 1000, "REGIONS")] = 5.0
    """Object regions of an image that are embedded."""
    cores: PositiveInt = 12
    """Processor cores beside each GPU."""
    grid: Annotated[int, Whole(1, 256)] = 16
    """SAM: points along each side of the prompt grid."""
    masks: Annotated[int, Whole(0, 10**5)] = 200
    """SAM: masks of an image that are good enough to be brought to its size."""
    clusters: PositiveInt = 1_000_000
    """Centers of k-means."""
    passes: PositiveInt = 20
    """Passes of k-means."""
    encoder: Annotated[str, Text("FOLDER")] = ""
    """Folder with config.json of the encoder; CLIP ViT-L/14 at 224 px if empty."""
    sam: Annotated[str, Text("FOLDER")] = ""
    """Folder with config.json of SAM; SAM ViT-B if empty."""
