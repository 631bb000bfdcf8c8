"""Counts steps on fake CUDA tensors, prints them as JSON; what answers for CUDA must come before torch."""

from megaregion.planning.cuda_guard import load_guard

load_guard()

import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from megaregion.config import (  # noqa: E402
    DataConfig,
    HeadBackend,
    HeadConfig,
    HeadsConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megaregion.evaluation import encoders, network  # noqa: E402
from megaregion.models import RegionEncoder  # noqa: E402
from megaregion.planning import kernels  # noqa: E402
from megaregion.planning.dry_run import dry_run  # noqa: E402
from megaregion.planning.fake_cuda import DEVICE, fake_gpu  # noqa: E402
from megaregion.planning.hardware import load_hardware  # noqa: E402
from megaregion.planning.layout import Labels  # noqa: E402
from megaregion.planning.plan import make_plan  # noqa: E402
from megaregion.planning.timing import head_kernels  # noqa: E402
from megaregion.training.beside import collective_of  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "ZeRO 1": {},
    "deeper": {"depth": 4},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "tensor 2": {"tensor": 2},
    "tensor 8": {"tensor": 8, "sequence": False},
    "sequence": {"tensor": 8, "registers": 4},
    "recompute": {"recompute": True, "registers": 4},
    "cheap": {"activation_gib": 0.09},
    "dropped": {"drop_path": 0.3},
    "packed": {"packing": "native"},
    "twenty packed": {"packing": "native", "images": 20},
    "bf16 sums": {"grad_precision": "bf16"},
    "packed, bf16 sums": {"packing": "native", "grad_precision": "bf16"},
    "compiled": {"compile": True, "grad_precision": "bf16"},
    "deeper, compiled": {"depth": 4, "compile": True, "grad_precision": "bf16"},
    "1 draw": {"depth": 1, "draw_images": 640},
    "4 draws": {"depth": 1, "draw_images": 160},
    "draw after draw": {"depth": 1, "draw_images": 160, "backend": "torch"},
    "tiles": {"depth": 1, "draw_images": 640, "chunk_bytes": 2**20, "backend": "torch"},
    "all classes": {"depth": 1, "sample_rate": 1.0, "classes": 1_000_000, "dim": 64},
    "several waves": {"depth": 1, "draw_images": 640, "chunk_bytes": 2**20},
}


MISSED: list[str] = []
"""Where the host waits and a watchdog would not say so."""
_caller = kernels._caller


def _watched() -> str:
    frame, between = sys._getframe(1), ("/torch/_dynamo/", "/torch/_compile", "/torch/_ops", kernels.__file__)
    while frame.f_back is not None and any(place in frame.f_code.co_filename for place in between):
        frame = frame.f_back
    if not collective_of(frame):
        MISSED.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
    return _caller()


def evaluate() -> list[str]:
    """Where an evaluation on a GPU waits: class tokens of images, then maps of them."""
    model = ModelConfig(
        image_size=64, patch_size=16, width=64, depth=2, heads=2, mlp_width=128, region_layers=1
    )
    images, tally = [Image.new("RGB", (90, 60))] * 4, kernels.Tally()
    network.as_array = encoders.as_array = _fetched
    with fake_gpu():
        encoder = network.NetworkEncoder("fake", RegionEncoder(model, 32), DataConfig(), str(DEVICE))
        with kernels.KernelCounter(tally):
            encoder.images(images)
            encoder.maps(images)
    return tally.waits


def _fetched(values: Tensor) -> Tensor:
    """As far as numbers that are not there can go."""
    return values.float().cpu()


def count(
    depth: int = 3,
    tensor: int = 1,
    zero_stage: int = 1,
    sequence: bool = True,
    packing: str = "square",
    images: int = 10,
    draw_images: int = 320,
    chunk_bytes: int = 256 * 2**20,
    sample_rate: float = 0.1,
    classes: int = 100_000,
    dim: int = 256,
    drop_path: float = 0.0,
    registers: int = 0,
    backend: HeadBackend = "auto",
    **train: Any,
) -> dict[str, Any]:
    config = RunConfig(
        model=ModelConfig(
            image_size=224,
            patch_size=14,
            width=512,
            depth=depth,
            heads=8,
            mlp_width=2048,
            region_layers=min(2, depth),
            drop_path=drop_path,
            registers=registers,
        ),
        data=DataConfig(regions_per_image=10, packing=packing),  # type: ignore[arg-type]
        parallel=ParallelConfig(tensor=tensor, zero_stage=zero_stage, sequence=sequence),
        train=TrainConfig(global_batch=640, micro_batch=images * tensor, **train),
        head=HeadsConfig(
            embedding_dim=dim,
            backend=backend,
            draw_images=draw_images,
            chunk_bytes=chunk_bytes,
            object=HeadConfig(sample_rate=sample_rate),
        ),
    )
    plan = make_plan(config, load_hardware("h100x64"), Labels(classes, 8_192))
    ran = dry_run(plan, 13, gpu=True)
    planned = {
        "planned": plan.memory.activations,
        "head_kernels": sum(head_kernels(plan.layout).values()),
        "share": sum(ran.counted[kind] for kind in ("masters", "moments", "head")),
        "whole": 12 * ran.parameters,
    }
    return {**ran.values()["gpu_step"], **planned}


if __name__ == "__main__":
    kernels._caller = _watched
    found = {name: count(**changes) for name, changes in CASES.items()}
    print(json.dumps({**found, "evaluation": evaluate(), "missed": MISSED}))
