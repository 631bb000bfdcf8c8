"""Hours of curation's stages on a cluster: networks counted on fake CUDA tensors, the host's work measured.

A GPU takes the time of products and attention at the cluster's rates and, after it, that of passing over all
else that is read and written; or that of starting the kernels, if it is longer. Decoders work beside it, so
the slower of GPU, cores and storage counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megaregion.planning.fake_cuda import DEVICE, fake_gpu
from megaregion.planning.hardware import Hardware, Load
from megaregion.planning.kernels import KernelCounter, Tally
from megaregion.schemas.evaluation import aligned

Networks = Mapping[str, tuple[int, Callable[[], Any]]]


@dataclass(frozen=True)
class Count:
    """What a GPU is asked to do for one row of a batch."""

    flops: float
    """Of products and convolutions."""
    attention: float
    """FLOPs of attention."""
    moved: float
    """Bytes that all but products read and write."""
    kernels: float
    waits: int
    """Where the host waits for the GPU in a batch, before it takes the result."""
    width: int
    """Channels of the result."""

    def seconds(self, hardware: Hardware) -> float:
        """Time of a GPU."""
        rate = 1e12 * hardware.matrix_tflops
        products = self.flops / (rate * hardware.linear_share)
        attention = self.attention / (rate * hardware.attention_share)
        passes = self.moved / (1e9 * hardware.memory_gbytes)
        return max(products + attention + passes, 1e-6 * self.kernels * hardware.launch_us)


@dataclass(frozen=True)
class StagePlan:
    """One stage's time."""

    stage: str
    engine: str
    gpu: float
    """Seconds of a GPU for an image."""
    core: float
    """Seconds of a core for an image."""
    hours: float
    """Of the whole cluster."""
    bound: str
    """What it waits for: gpu, its core, all cores or storage."""


def count(build: Callable[[torch.device], Networks]) -> dict[str, Count]:
    """Count a batch of each network; ``load_guard`` must have run before torch was imported."""
    found = {}
    with fake_gpu():
        for name, (rows, run) in build(DEVICE).items():
            run()  # What is made once.
            tally = Tally()
            with FlopCounterMode(display=False) as flops, KernelCounter(tally):
                sent = run()
            by_kind = flops.get_flop_counts().get("Global", {})
            attention = sum(number for kind, number in by_kind.items() if "attention" in str(kind))
            found[name] = Count(
                (sum(by_kind.values()) - attention) / rows,
                attention / rows,
                tally.other_bytes / rows,
                tally.calls / rows,
                len(tally.waits),
                tree_leaves(sent)[0].shape[-1],
            )
    return found


def plan_stages(
    load: Load, hardware: Hardware, counts: Mapping[str, Count], host: Mapping[str, float]
) -> list[StagePlan]:
    """Time of each stage with a network; ``host`` has seconds of a core by what is done."""
    encoder, sam = (name.rstrip("/").rsplit("/", 1)[-1] for name in (load.encoder, load.sam))
    crops, width = load.regions, counts["crop"].width
    products = 2 * crops * load.clusters * width * load.passes
    finishing = load.masks * host["mask"] + host["rank"]
    rows = {
        ("propose", sam or "SAM ViT-B"): (
            counts["image"].seconds(hardware) + load.masks * counts["mask"].seconds(hardware),
            host["decode"] + host["view"] + host["objectness"] + finishing, finishing,
        ),
        ("ocr", "rapidocr on cores"): (0.0, host["decode"] + host["ocr"], 0.0),
        ("embed", encoder or "CLIP ViT-L/14"): (
            crops * counts["crop"].seconds(hardware), host["decode"] + crops * host["crop"], 0.0
        ),
        ("cluster", f"{load.passes} passes"): (
            products / (1e12 * hardware.matrix_tflops * hardware.linear_share), 0.0, 0.0
        ),
    }  # fmt: skip
    storage = 1e3 * hardware.image_kbytes / (1e9 * hardware.read_gbytes) * hardware.gpus
    plans = []
    for (stage, engine), (gpu, core, own) in rows.items():
        # What the process of a GPU does itself, none of its decoders can do for it.
        shares = {
            "gpu": gpu,
            "its core": own,
            "cores": core / load.cores,
            "storage": storage if core else 0.0,
        }
        bound = max(shares, key=lambda name: shares[name])
        hours = load.images * shares[bound] / hardware.gpus / 3600
        plans.append(StagePlan(stage, engine, gpu, core, hours, bound))
    return plans


def text(load: Load, hardware: Hardware, plans: Sequence[StagePlan], host: Mapping[str, float]) -> str:
    """The plan as a table, with what was assumed and measured."""
    head = ("stage", "engine", "GPU ms an image", "core ms an image", "hours", "waits for")
    rows = [
        (
            plan.stage, plan.engine, f"{1e3 * plan.gpu:.2f}", f"{1e3 * plan.core:.1f}",
            f"{plan.hours:,.1f}", plan.bound,
        )
        for plan in plans
    ]  # fmt: skip
    measured = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in host.items())
    again = 2 * load.images * host["decode"] / 3600
    return (
        f"{load.images:,} images, {load.images * load.regions:,.0f} regions on {hardware.name}: "
        f"{hardware.gpus} GPUs with {load.cores} cores each\n{aligned([head, *rows], left=(0, 1, 5))}\n"
        f"  measured here, ms of a core: {measured}\n"
        f"  of it decoding each image three times instead of once: {again:,.0f} core-hours; stages "
        "share a decode where all three run on cores"
    )


def values(
    plans: Sequence[StagePlan], counts: Mapping[str, Count], host: Mapping[str, float]
) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "stages": [asdict(plan) for plan in plans],
        "counts": {name: asdict(count) for name, count in counts.items()},
        "core_seconds": dict(host),
    }
