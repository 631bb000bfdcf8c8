"""What a run will find: processors, links and storage of a cluster, as the plan reckons with them.

A description is a YAML file of these fields; configs/clusters/ holds presets. Rates are those that are
reached, not those of a data sheet: ``pretrain.py --preflight`` and ``benchmark.py plan`` measure them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from megaregion.errors import UserError

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "clusters"
GIB = 2**30
MAY_BE_ZERO = ("reserve_gib", "launch_us", "latency_us", "stream_gbytes")


@dataclass(frozen=True)
class Hardware:
    """A cluster; the defaults are 64 H100."""

    name: str = "h100x64"
    """Name in the plan's head line."""
    device: Literal["gpu", "processor"] = "gpu"
    """gpu: allocated memory counts, reductions run beside the backward pass; processor: only touched
    memory counts and nothing overlaps."""
    gpus: int = 64
    """Ranks of the run."""
    gpus_per_node: int = 8
    """Ranks of a node."""
    memory_gib: float = 79.1
    """Memory of a rank, GiB."""
    reserve_gib: float = 4.0
    """Memory that no plan may use: the driver's context, NCCL's buffers, gaps in the allocator, GiB."""
    matrix_tflops: float = 700.0
    """Rate of a large product of matrices in the run's precision, TFLOP/s."""
    linear_share: float = 0.85
    """Share of that rate that products of the encoder's and the head's sizes reach."""
    attention_share: float = 0.45
    """Share of that rate that attention reaches, forward and backward together."""
    memory_gbytes: float = 2700.0
    """GB/s that passes over activations read and write (norms, turns, non-linearities)."""
    stream_gbytes: float = 0.0
    """GB/s that copies and the optimizer read and write; 0: memory_gbytes."""
    launch_us: float = 4.0
    """Microseconds of the host for one kernel; a phase takes at least its number of kernels times this."""
    inside_gbytes: float = 360.0
    """Bus bandwidth of a collective inside a node (NVLink), GB/s."""
    across_gbytes: float = 320.0
    """The same between nodes, all network cards of a node together, GB/s."""
    latency_us: float = 30.0
    """Microseconds that a collective takes whatever its size."""
    host_gbytes: float = 25.0
    """From a rank's memory to the host's, GB/s."""
    write_gbytes: float = 10.0
    """Storage under the run's folder, writing, all nodes together, GB/s."""
    read_gbytes: float = 20.0
    """Storage of the shards, reading, all nodes together, GB/s."""
    decode_images: float = 200.0
    """Images per second that one process of the loader reads, decodes, crops and resizes."""
    image_kbytes: float = 100.0
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


def load_hardware(name: str, changes: Mapping[str, Any] | None = None) -> Hardware:
    """Read a preset or a YAML file, then replace some fields.

    Args:
        name: Name of a preset, or path of a file.
        changes: Fields to replace; None values are left out.

    Raises:
        UserError: No such preset or file, an unknown field, or a value out of range.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise UserError(f"--cluster {name} is neither a preset ({known}) nor a YAML file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"--cluster {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"--cluster {path} must hold fields and values, as configs/clusters/h100x64.yaml does"
        )
    chosen = {key: value for key, value in (changes or {}).items() if value is not None}
    built = {"name": path.stem, **values, **chosen}
    types = {item.name: item.type for item in dataclasses.fields(Hardware)}
    for key, value in built.items():
        _check(key, value, types, str(path))
    hardware = Hardware(**built)
    if hardware.gpus > hardware.gpus_per_node and hardware.gpus % hardware.gpus_per_node:
        raise UserError(
            f"--gpus must be a multiple of the {hardware.gpus_per_node} GPUs of a node, got {hardware.gpus}"
        )
    if hardware.usable_bytes <= 0:
        raise UserError(
            f"reserve_gib {hardware.reserve_gib:g} leaves nothing of memory_gib {hardware.memory_gib:g}"
        )
    return hardware


def _check(key: str, value: object, types: Mapping[str, Any], place: str) -> None:
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(types)}"
        raise UserError(f"field {key} of cluster {place} is unknown; {hint}")
    if key == "device":
        if value not in ("gpu", "processor"):
            raise UserError(f"device of cluster {place} must be gpu or processor, got {value}")
    elif key != "name":
        whole = types[key] == "int"
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        least = 0.0 if key in MAY_BE_ZERO else 1e-9
        if not fits or not least <= float(value) < math.inf:  # type: ignore[arg-type]
            kind = "a whole number of at least 1" if whole else "a positive number"
            raise UserError(f"{key} of cluster {place} must be {kind}, got {value}")
