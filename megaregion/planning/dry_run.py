"""One rank of a large job, built in this process: what it holds beside its plan, and what it asks of a GPU.

torch's "fake" process group answers every collective at once, so any rank of any number can be built, with
the code of a real start: the encoder cut by megatron's layers, DeepSpeed's engine, the heads' shards. On the
processor an image goes through it and back; weights and matrix products are left as the allocator gave them.
On a GPU that is not there, fake tensors, which hold no numbers at all, take a step of one micro-step:

    batch to the device | encoder | heads | encoder's backward pass (with ZeRO's copies) | norms and update
    | what a checkpoint gathers and copies to the host

What a count can tell: bytes, kernels, operations, where the host waits, what autograd keeps, and operands on
two devices, which raise. What it cannot: seconds, and the inside of a Triton kernel.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megaregion.checkpoint.saver import Snapshot
from megaregion.checks import batching
from megaregion.data.batch import OBJECT, TEXT, Batch, Findings, Sample, collate
from megaregion.errors import UserError
from megaregion.heads.sharded import ClassShardedHead
from megaregion.models.layers import compile_blocks, run_and_count, use_narrow
from megaregion.models.vit import RegionEncoder, decays, matrices, partial_gradients, tensor_parallel_plan
from megaregion.parallel import topology
from megaregion.parallel.tensor_parallel import parallelize
from megaregion.parallel.topology import Topology
from megaregion.parallel.zero import ZeroEngine
from megaregion.planning.compiled import counted_compilation
from megaregion.planning.fake_cuda import DEVICE, fake_cuda
from megaregion.planning.hardware import GIB
from megaregion.planning.kernels import KernelCounter, Tally, count_nodes
from megaregion.planning.layout import TEXT_TOKENS, Layout
from megaregion.planning.memory import activation_bytes, gradients_of_one_pass
from megaregion.planning.plan import Plan
from megaregion.processor import is_narrow
from megaregion.schemas.evaluation import aligned
from megaregion.training.losses import Heads
from megaregion.training.state import own_pieces
from megaregion.training.trainer import draw_kept

MIB = 2**20
TOLERANCE = 0.05
"""Share by which the plan's memory may be off."""
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.mkldnn._linear_pointwise)


@dataclass(frozen=True)
class DryRun:
    """What a rank holds and does, and what was planned for it."""

    rank: int
    parameters: int
    """Body parameters of the rank's shard of the model."""
    planned_parameters: int
    counted: dict[str, int]
    """Bytes by kind."""
    planned: dict[str, float]
    parts: dict[str, Tally]
    """By part of a step on a GPU, in its order; empty for a processor."""
    copy_slices: int
    """Sums of the encoder's backward graph that copy what they are added to."""
    scores: float
    """Of all heads' rows with the classes that are drawn for them on this rank, as planned."""

    @property
    def waits(self) -> list[str]:
        """Where the host waits inside a micro-step, as file:line."""
        between = ("update", "checkpoint")
        return [wait for name, tally in self.parts.items() if name not in between for wait in tally.waits]

    def off(self, kind: str) -> float:
        """Share by which the plan of a kind is above (or below, negative) what was counted."""
        return _off(self.counted[kind], self.planned[kind])

    def check(self) -> None:
        """Compare.

        Raises:
            UserError: The plan is off by more than the tolerance, in sum, in the number of parameters, or in
                what autograd keeps on a GPU.
        """
        counted, planned = sum(self.counted.values()), sum(self.planned.values())
        worst = max(self.counted, key=lambda kind: abs(self.planned[kind] - self.counted[kind]))
        if self.parts and abs(self.off("activations")) > TOLERANCE:
            counted, planned, worst = self.counted["activations"], self.planned["activations"], "activations"
        if abs(_off(counted, planned)) > TOLERANCE or self.parameters != self.planned_parameters:
            raise UserError(
                f"the plan is off by {_off(counted, planned):+.1%} from what rank {self.rank} holds (at most "
                f"{TOLERANCE:.0%}), most by {worst}: planned {self.planned[worst] / GIB:.2f} GiB, counted "
                f"{self.counted[worst] / GIB:.2f} GiB; report it, the plan cannot be trusted for this config"
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
                "of_scores": tally.of_scores,
                "moved": dict(tally.moved.most_common(12)),
                "most": dict(tally.kernels.most_common(12)),
            }
            for name, tally in self.parts.items()
        }
        held = {name: getattr(self, name) for name in ("rank", "parameters", "planned_parameters")}
        held |= {"counted": self.counted, "planned": self.planned}
        step = {"parts": parts, "kept": self.counted["activations"], "copy_slices": self.copy_slices}
        step |= {"scores": self.scores}
        return {"dry_run": held, "gpu_step": step if parts else None}

    def text(self) -> str:
        """Counted and planned bytes below each other, and the counts of a step on a GPU."""
        total = "total", sum(self.counted.values()), sum(self.planned.values())
        rows = [("", "counted MiB", "planned MiB", "off")]
        rows += [
            (kind, f"{counted / MIB:,.1f}", f"{planned / MIB:,.1f}", f"{_off(counted, planned):.1%}")
            for kind, counted, planned in [*((k, v, self.planned[k]) for k, v in self.counted.items()), total]
        ]
        text = (
            f"rank {self.rank}, built with a fake process group\n{aligned(rows, indent='  ')}\n"
            f"  parameters  {self.parameters:,} counted, {self.planned_parameters:,} planned"
        )
        return f"{text}\n\n{self._step_text()}" if self.parts else text

    def _step_text(self) -> str:
        rows = [("", "kernels", "GB moved", "GB outside products", "TFLOP", "host waits")]
        for name, tally in self.parts.items():
            moved, other = tally.moved.total() / 1e9, tally.other_bytes / 1e9
            flops, waits = f"{tally.flops / 1e12:.2f}", str(len(tally.waits))
            rows.append((name, f"{tally.calls:,}", f"{moved:.1f}", f"{other:.1f}", flops, waits))
        heads = self.parts["heads"]
        each, rest = (size / self.scores for size in (heads.of_scores, heads.moved.total() - heads.of_scores))
        places = [f"{place} ({count})" for place, count in Counter(self.waits).items()]
        return (
            f"one micro-step, the update and a save, on fake CUDA tensors\n{aligned(rows, indent='  ')}\n"
            f"  waits inside the micro-step: {', '.join(places) or 'none'}\n"
            f"  CopySlices in the backward graph: {self.copy_slices}\n"
            f"  bytes of each of {self.scores / 1e6:,.0f} million scores of heads: {each:.1f} of its own, "
            f"{rest:.1f} of rows and centers"
        )


def _off(counted: float, planned: float) -> float:
    return planned / counted - 1 if counted else 0.0


def dry_run(plan: Plan, rank: int, gpu: bool = False) -> DryRun:
    """Build one rank of the planned job, send a micro-batch through it, and count.

    Args:
        plan: The plan.
        rank: The rank, of all ranks.
        gpu: Whether it takes a whole step on fake CUDA tensors; ``load_guard`` must have run before torch
            was imported.

    Raises:
        UserError: There is no such rank.
    """
    layout = plan.layout
    cut, marked, parts = batching(layout.config, layout.data), _labels(layout), dict[str, Tally]()
    # A processor gets as many images as share the tokens: their parts have no rows that only pad them.
    batch = _batch(layout, marked, layout.micro_batch if gpu else layout.spread)

    def part(name: str, work: Callable[[], Any]) -> Any:
        with KernelCounter(parts.setdefault(name, Tally())):
            return work()

    device, tensors = (DEVICE, fake_cuda(marked)) if gpu else (torch.device("cpu"), _Unmultiplied())
    compilation = counted_compilation() if gpu and layout.config.train.compile else nullcontext()
    with _fake_group(rank, plan, device) as place, tensors, compilation, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters, engine, heads = _build(layout, place)
        if gpu:  # What is made once in a process: constants of the pixels, tables of the angles.
            engine(*_inputs(batch, layout, device))
        sent = part("batch", lambda: heads.send_labels(batch))
        inputs = part("batch", lambda: _inputs(batch, layout, device))
        found, kept = part(
            "encoder", lambda: run_and_count(engine.parameters.values(), lambda: engine(*inputs))
        )
        embeddings, *taught = found if layout.teacher.width else (found,)
        copies, gradient = count_nodes(embeddings, "CopySlices"), torch.ones_like(embeddings)
        if gpu:
            gradient = part(
                "heads", lambda: heads.loss(embeddings, sent, batch.keys, 0, 0, cut, refuse=False).gradient
            )
        # On a processor as if other micro-steps followed: reduced gradients would lie in buffers.
        part(
            "backward",
            lambda: engine.backward(sum(taught, (embeddings.float() * gradient.float()).sum()), gpu),
        )
        counted = {
            **state_bytes(engine, heads.by_kind.values()),
            "activations": round(kept / len(batch.keys) * layout.micro_batch),
        }
        if not gpu:
            counted["gradients"] = storage_bytes(engine.held()["gradients"])
        else:
            part("update", lambda: _update(engine, heads))
            part("checkpoint", lambda: Snapshot(place.device).take(own_pieces(engine, heads)))
    planned = _planned(plan, rank, "gpu" if gpu else "processor")
    own = {kind: planned[kind] for kind in counted}
    scores = sum(head.rows * head.drawn for head in layout.heads.values())
    return DryRun(rank, parameters, layout.parameters, counted, own, parts if gpu else {}, copies, scores)


def state_bytes(engine: ZeroEngine, heads: Iterable[ClassShardedHead]) -> dict[str, int]:
    """Bytes of what stays from step to step, by the plan's kinds."""
    held = engine.held()
    return {
        **{kind: storage_bytes(held[kind]) for kind in ("weights", "masters", "moments")},
        "head": sum(storage_bytes(piece.tensor for piece in head.state().values()) for head in heads),
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share memory count once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _planned(plan: Plan, rank: int, device: Literal["gpu", "processor"]) -> dict[str, float]:
    """What is counted of this rank, as it was planned."""
    layout, spaces = plan.layout, plan.layout.labels.by_kind
    here = dataclasses.replace(plan.hardware, device=device)
    # The last ranks may hold fewer classes than the fullest, for which the plan is.
    full = sum(head.local_classes for head in layout.heads.values())
    own = sum(
        max(0, min(head.local_classes, spaces[kind] - rank * head.local_classes))
        for kind, head in layout.heads.items()
    )
    return {
        **plan.memory.at_rest,
        "head": plan.memory.at_rest["head"] * own / max(1, full),
        "activations": activation_bytes(layout, here) * layout.micro_batch,
        "gradients": gradients_of_one_pass(layout),
    }


@contextmanager
def _fake_group(rank: int, plan: Plan, device: torch.device) -> Iterator[Topology]:
    """The place of a rank among ranks that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    local, ranks = plan.hardware.gpus_per_node, plan.hardware.gpus
    if not 0 <= rank < ranks:
        raise UserError(f"--dry-run must name a rank in [0, {ranks - 1}], got {rank}")
    told = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    # DeepSpeed would look for a device and say on stdout what it found.
    environment = {**{name: str(value) for name, value in told.items()}, "DS_ACCELERATOR": "cpu"}
    with patch.dict(os.environ, environment):
        from deepspeed.runtime.zero import partitioned_param_coordinator

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        name = "assert_ints_same_as_other_ranks"  # By which ZeRO 3 would compare notes with the others.
        with patch.object(partitioned_param_coordinator, name, lambda ints: None):
            try:
                yield dataclasses.replace(topology.join(plan.layout.tensor), device=device)
            finally:
                dist.destroy_process_group()


class _Unmultiplied(TorchDispatchMode):
    """Leaves matrix products as the allocator gave them: a processor takes minutes for a large model's."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function._overloadpacket not in PRODUCTS or function._schema.is_mutable:
            return function(*arguments, **named)
        arguments, named = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (arguments, named))
        product: Tensor = function(*arguments, **named)
        return torch.empty_like(product, device="cpu")


def _build(layout: Layout, place: Topology) -> tuple[int, ZeroEngine, Heads]:
    """Parameters of the rank's shard of the encoder, its engine and its heads, as the trainer builds them."""
    # Given centers are a file of the dataset, and as many numbers as any others; which are near is unknown.
    head = layout.config.head
    head = dataclasses.replace(head, init="random", object=dataclasses.replace(head.object, near_classes=0.0))
    config = dataclasses.replace(layout.config, head=head)
    before, fake = torch.get_default_dtype(), place.device.type == "cuda"
    torch.set_default_dtype(torch.bfloat16 if config.train.bf16 else torch.float32)
    try:
        # In its final type, and a fake one where it stays: if it moved it would become another.
        with place.device if fake else torch.device("meta"):
            model = RegionEncoder(config.model, config.head.embedding_dim, layout.teacher.width)
    finally:
        torch.set_default_dtype(before)
    if not fake:  # Pages that nobody writes cost no memory.
        model.to_empty(device=place.device)
    model.vit.recompute = layout.recompute
    if is_narrow(config.train.precision, place.device):
        use_narrow(model.vit.blocks)
    if fake and config.train.compile:
        compile_blocks(model.vit.blocks)
    cut = config.parallel.tokens_cut
    places = parallelize(model, tensor_parallel_plan(model), partial_gradients(model, cut), place, cut)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    by_muon = partial(matrices, config=config.model)
    engine = ZeroEngine(model.to(place.device), places, config, place, decays, matrices=by_muon)
    info = SimpleNamespace(
        object_classes=layout.labels.object_classes, text_classes=layout.labels.text_classes
    )
    dataset: Any = SimpleNamespace(info=info, folder=None)
    return parameters, engine, Heads(config, dataset, place)


def _update(engine: ZeroEngine, heads: Heads) -> None:
    norm = engine.norm(heads.norm_squared())
    engine.update(lr=1e-3)
    heads.step(1e-3, engine.clip_coefficient(norm))


def _inputs(batch: Batch, layout: Layout, device: torch.device) -> tuple[Any, ...]:
    kept, batch = draw_kept(layout.config, batch.positions, device), batch.to(device)
    images = batch.images.bfloat16() if layout.config.train.bf16 else batch.images
    inputs, width = (images, batch.visible, batch.grids, kept), layout.teacher.width
    patches = layout.config.model.grid**2
    # A teacher's features, as if they were there already.
    return (*inputs, images.new_ones(len(images), patches, width)) if width else inputs


def _labels(layout: Layout) -> Tensor:
    """Labels of the micro-step's regions over all data ranks, their kinds behind them."""
    rng = torch.Generator().manual_seed(0)
    rows, spaces = layout.micro_rows, layout.labels
    marked = torch.full((rows, layout.config.data.label_slots + 1), -1)
    text = torch.rand(rows, generator=rng) < spaces.shares["text"]
    marked[:, -1] = torch.where(text, TEXT, OBJECT)
    most = layout.config.data.max_object_labels
    marked[~text, :most] = torch.randint(spaces.object_classes, (int((~text).sum()), most), generator=rng)
    tokens = min(TEXT_TOKENS, layout.config.data.max_text_tokens)
    marked[text, :tokens] = torch.randint(
        max(1, spaces.text_classes), (int(text.sum()), tokens), generator=rng
    )
    return marked


def _batch(layout: Layout, marked: Tensor, images: int) -> Batch:
    """So many images of this rank as the loader gives them, every one of the greatest size."""
    config = layout.config
    nowhere: Any = None
    regions, grid, side = config.data.regions_per_image, config.model.grid, config.model.image_size
    own = marked[: images * regions].view(images, regions, -1).numpy()
    samples = (
        Sample(
            str(number), number, nowhere, grid, grid, (), np.ones((regions, grid**2), np.bool_),
            kinds=own[number, :, -1], labels=own[number, :, :-1], pixels=np.zeros((side, side, 3), np.uint8),
        )
        for number in range(images)
    )  # fmt: skip
    return collate(samples, images, config.data, Findings())
