"""One step of one rank on a GPU that is not there: the trainer's own parts, and what they ask of the device.

    batch to the device | encoder | heads | encoder's backward pass (with ZeRO's copies) | norms and update

What a count can tell: kernels, bytes, operations, where the host waits, what autograd keeps, and operands on
two devices, which raise. What it cannot: seconds, and the inside of a Triton kernel.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megaregion.checks import batching
from megaregion.data.batch import OBJECT, TEXT, Batch
from megaregion.errors import UserError
from megaregion.models.layers import run_and_count
from megaregion.models.vit import RegionEncoder, decays, partial_gradients, tensor_parallel_plan
from megaregion.parallel.tensor_parallel import parallelize
from megaregion.parallel.topology import Topology
from megaregion.parallel.zero import ZeroEngine
from megaregion.planning.fake_gpu.counter import KernelCounter, Tally, graph_nodes
from megaregion.planning.fake_gpu.device import DEVICE, fake_cuda
from megaregion.planning.layout import Layout
from megaregion.tables import aligned
from megaregion.training.heads import Heads

TOKENS, LONG = 16, 5
"""Label slots of a region, and how many of them a text region of the counted batch fills."""


@dataclass(frozen=True)
class CountedStep:
    """What a step of one micro-step asks of the device."""

    parts: dict[str, Tally]
    """By part of the step, in its order."""
    kept: int
    """Bytes that autograd keeps of the encoder's forward pass, parameters left out."""
    nodes: Counter[str]
    """Nodes of the encoder's backward graph by name."""

    @property
    def waits(self) -> list[str]:
        """Where the host waits inside a micro-step, as file:line."""
        return [wait for name, tally in self.parts.items() if name != "update" for wait in tally.waits]

    def check(self, planned: float, tolerance: float) -> None:
        """Compare what autograd keeps with the plan.

        Raises:
            UserError: The plan is off by more than the tolerance.
        """
        off = planned / self.kept - 1
        if abs(off) > tolerance:
            raise UserError(
                f"the plan's activations are off by {off:+.1%} from what autograd keeps on a GPU (at most "
                f"{tolerance:.0%}); report it, the plan cannot be trusted for this config"
            )

    def values(self) -> dict[str, Any]:
        """All counts, for JSON."""
        parts = {
            name: {
                "kernels": tally.calls,
                "bytes": tally.moved.total(),
                "other_bytes": tally.other_bytes,
                "flops": tally.flops,
                "waits": tally.waits,
                "most": dict(tally.kernels.most_common(12)),
            }
            for name, tally in self.parts.items()
        }
        return {"parts": parts, "kept": self.kept, "copy_slices": self.nodes["CopySlices"]}

    def text(self, planned: float) -> str:
        """The counts as a table.

        Args:
            planned: Bytes that autograd was planned to keep.
        """
        rows = [("", "kernels", "GB moved", "GB outside products", "TFLOP", "host waits")]
        for name, tally in self.parts.items():
            moved, other = tally.moved.total() / 1e9, tally.other_bytes / 1e9
            flops, waits = f"{tally.flops / 1e12:.2f}", str(len(tally.waits))
            rows.append((name, f"{tally.calls:,}", f"{moved:.1f}", f"{other:.1f}", flops, waits))
        places = [f"{place} ({count})" for place, count in Counter(self.waits).items()]
        return (
            f"one micro-step and the update, on fake CUDA tensors\n{aligned(rows, indent='  ')}\n"
            f"  kept for the backward pass: {self.kept / 2**30:.2f} GiB, planned {planned / 2**30:.2f}\n"
            f"  waits inside the micro-step: {', '.join(places) or 'none'}\n"
            f"  CopySlices in the backward graph: {self.nodes['CopySlices']}"
        )


def count_step(layout: Layout, place: Topology) -> CountedStep:
    """Run one step of a rank on fake CUDA tensors; :func:`load_guard` must have run before torch came.

    Args:
        layout: The run on its ranks.
        place: The rank's place; its groups are of torch's fake backend.
    """
    # Given centers are a file of the dataset, and as many numbers as any others.
    config = replace(layout.config, head=replace(layout.config.head, init="random"))
    labels = _labels(layout)
    info = SimpleNamespace(
        object_classes=layout.labels.object_classes, text_classes=layout.labels.text_classes
    )
    dataset: Any = SimpleNamespace(info=info, folder=None)
    host_batch, cut = _batch(layout, labels), batching(config, layout.data)
    parts: dict[str, Tally] = {}

    def part(name: str, work: Callable[[], Any]) -> Any:
        with KernelCounter(parts.setdefault(name, Tally())):
            return work()

    with fake_cuda(labels), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _encoder(layout)
        tokens_cut = config.parallel.tokens_cut
        plan, partial = tensor_parallel_plan(model), partial_gradients(model, tokens_cut)
        placements = parallelize(model, plan, partial, place, tokens_cut)
        engine = ZeroEngine(model.to(DEVICE), placements, config, place, decays)
        heads = Heads(config, dataset, place)
        # What is made once in a process: constants of the pixels, tables of the angles.
        engine(*_inputs(host_batch.to(DEVICE), layout))

        sent = part("batch", lambda: heads.send_labels(host_batch))
        inputs = part("batch", lambda: _inputs(host_batch.to(DEVICE), layout))
        embeddings, kept = part("encoder", lambda: run_and_count(model.parameters(), lambda: engine(*inputs)))
        nodes = graph_nodes(embeddings)
        loss = part("heads", lambda: heads.loss(embeddings, sent, host_batch.keys, 0, 0, cut, refuse=False))
        part(
            "backward",
            lambda: engine.backward((embeddings.float() * loss.gradient.float()).sum(), last=True),
        )
        part("update", lambda: _update(engine, heads))
    return CountedStep(parts, kept, nodes)


def _update(engine: ZeroEngine, heads: Heads) -> None:
    norm = engine.norm(heads.norm_squared())
    engine.update(lr=1e-3)
    heads.step(1e-3, engine.clip_coefficient(norm))


def _encoder(layout: Layout) -> RegionEncoder:
    """Built where it stays and in its final type: a fake parameter that moves becomes another one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if layout.config.train.bf16 else torch.float32)
    try:
        with DEVICE:
            model = RegionEncoder(layout.config.model, layout.config.head.embedding_dim)
    finally:
        torch.set_default_dtype(before)
    model.vit.recompute = layout.recompute
    return model


def _inputs(batch: Batch, layout: Layout) -> tuple[Any, ...]:
    images = batch.images.bfloat16() if layout.config.train.bf16 else batch.images
    return images, batch.visible, batch.grids


def _labels(layout: Layout) -> Tensor:
    """Labels of the micro-step's regions over all data ranks, their kinds behind them."""
    rng = torch.Generator().manual_seed(0)
    rows, spaces = layout.micro_rows, layout.labels
    marked = torch.full((rows, TOKENS + 1), -1)
    text = torch.rand(rows, generator=rng) < (spaces.text_share if spaces.text_classes else 0.0)
    marked[:, -1] = torch.where(text, TEXT, OBJECT)
    marked[~text, 0] = torch.randint(spaces.object_classes, (int((~text).sum()),), generator=rng)
    marked[text, :LONG] = torch.randint(max(1, spaces.text_classes), (int(text.sum()), LONG), generator=rng)
    return marked


def _batch(layout: Layout, marked: Tensor) -> Batch:
    """This rank's micro-batch as the loader gives it, every image of the greatest size."""
    config, images = layout.config, layout.micro_batch
    regions, grid, patch = config.data.regions_per_image, config.model.grid, config.model.patch_size
    own = marked[: images * regions].view(images, regions, -1)
    pixels: tuple[int, ...] = (images, 3, grid * patch, grid * patch)
    visible: tuple[int, ...] = (images, regions, grid**2)
    grids = None
    if config.data.packing == "native":
        pixels, visible = (images * grid**2, 3, patch, patch), (regions, images * grid**2)
        grids = ((grid, grid),) * images
    return Batch(
        positions=torch.arange(images),
        keys=[str(number) for number in range(images)],
        pixels=torch.zeros(pixels, dtype=torch.uint8),
        visible=torch.ones(visible, dtype=torch.bool),
        kinds=own[..., -1].to(torch.int8),
        labels=own[..., :-1].contiguous(),
        mean=config.data.mean,
        std=config.data.std,
        grids=grids,
    )
