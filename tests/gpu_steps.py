"""Counts steps on fake CUDA tensors, prints them as JSON; what answers for CUDA must come before torch."""

from megaregion.planning.cuda_guard import load_guard

load_guard()

import json  # noqa: E402
from typing import Any  # noqa: E402

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
from megaregion.planning.dry_run import dry_run  # noqa: E402
from megaregion.planning.hardware import load_hardware  # noqa: E402
from megaregion.planning.layout import Labels  # noqa: E402
from megaregion.planning.plan import make_plan  # noqa: E402
from megaregion.planning.timing import head_kernels  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "ZeRO 1": {},
    "deeper": {"depth": 4},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "tensor 8": {"tensor": 8, "sequence": False},
    "sequence": {"tensor": 8},
    "recompute": {"recompute": True},
    "cheap": {"activation_gib": 0.09},
    "packed": {"packing": "native"},
    "twenty packed": {"packing": "native", "images": 20},
    "bf16 sums": {"grad_precision": "bf16"},
    "packed, bf16 sums": {"packing": "native", "grad_precision": "bf16"},
    "compiled": {"compile": True, "grad_precision": "bf16"},
    "1 draw": {"depth": 1, "draw_images": 640},
    "4 draws": {"depth": 1, "draw_images": 160},
    "draw after draw": {"depth": 1, "draw_images": 160, "backend": "torch"},
    "tiles": {"depth": 1, "draw_images": 640, "chunk_bytes": 2**20, "backend": "torch"},
    "all classes": {"depth": 1, "sample_rate": 1.0, "classes": 1_000_000, "dim": 64},
    "several waves": {"depth": 1, "draw_images": 640, "chunk_bytes": 2**20},
}


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
    }
    return {**ran.values()["gpu_step"], **planned}


if __name__ == "__main__":
    print(json.dumps({name: count(**changes) for name, changes in CASES.items()}))
