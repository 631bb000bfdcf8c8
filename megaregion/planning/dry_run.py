"""One rank of a large job, built in this process: its real tensors beside the plan's.

torch's "fake" process group answers every collective at once, so any rank of any number can be built, with
the code of a real start: the encoder cut by megatron's layers, DeepSpeed's engine, the heads' shards. One
image goes through it, with the operations of a processor, to see what autograd keeps. Weights and matrix
products are left as the allocator gave them; nothing is learned here.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megaregion.errors import UserError
from megaregion.heads.sharded import ClassShardedHead
from megaregion.models.layers import run_and_count
from megaregion.models.vit import RegionEncoder, decays, partial_gradients, tensor_parallel_plan
from megaregion.parallel import topology
from megaregion.parallel.topology import Topology
from megaregion.parallel.zero import ZeroEngine
from megaregion.planning.hardware import GIB
from megaregion.planning.layout import Layout
from megaregion.planning.memory import activation_bytes, gradients_of_one_pass
from megaregion.planning.plan import Plan
from megaregion.tables import aligned

if TYPE_CHECKING:
    from megaregion.planning.fake_gpu.step import CountedStep

MIB = 2**20
TOLERANCE = 0.05
"""Share by which the plan's memory may be off."""


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.mkldnn._linear_pointwise)


@dataclass(frozen=True)
class BuiltRank:
    """What a rank holds, and what was planned for it; bytes."""

    rank: int
    parameters: int
    """Body parameters of the rank's shard of the model."""
    planned_parameters: int
    counted: dict[str, int]
    planned: dict[str, float]

    @property
    def total(self) -> tuple[float, float]:
        """Counted and planned."""
        return float(sum(self.counted.values())), sum(self.planned.values())

    def off(self, kind: str) -> float:
        """Share by which the plan of a kind is above (or below, negative) what was counted."""
        return _off(self.counted[kind], self.planned[kind])

    def text(self) -> str:
        """Counted and planned below each other."""
        sizes = {kind: (float(size), self.planned[kind]) for kind, size in self.counted.items()}
        rows = [("", "counted MiB", "planned MiB", "off")]
        rows += [
            (kind, f"{counted / MIB:,.1f}", f"{planned / MIB:,.1f}", f"{_off(counted, planned):.1%}")
            for kind, (counted, planned) in {**sizes, "total": self.total}.items()
        ]
        return (
            f"rank {self.rank}, built with a fake process group\n{aligned(rows, indent='  ')}\n"
            f"  parameters  {self.parameters:,} counted, {self.planned_parameters:,} planned"
        )

    def check(self) -> None:
        """Compare.

        Raises:
            UserError: The plan is off by more than the tolerance, in sum or in the number of parameters.
        """
        counted, planned = self.total
        worst = max(self.counted, key=lambda kind: abs(self.planned[kind] - self.counted[kind]))
        if abs(planned / counted - 1) > TOLERANCE or self.parameters != self.planned_parameters:
            raise UserError(
                f"the plan is off by {planned / counted - 1:+.1%} from what rank {self.rank} holds (at most "
                f"{TOLERANCE:.0%}), most by {worst}: planned {self.planned[worst] / GIB:.2f} GiB, counted "
                f"{self.counted[worst] / GIB:.2f} GiB; report it, the plan cannot be trusted for this config"
            )


def _off(counted: float, planned: float) -> float:
    return planned / counted - 1 if counted else 0.0


def build_rank(plan: Plan, rank: int) -> BuiltRank:
    """Build one rank of the planned job, pass an image through it, and count its tensors.

    Args:
        plan: The plan.
        rank: The rank, of all ranks.

    Raises:
        UserError: There is no such rank.
    """
    layout = plan.layout
    # Also where there is a GPU: what autograd keeps is planned for a processor.
    group = _fake_group(rank, plan, torch.device("cpu"))
    with group as place, warnings.catch_warnings(), _Unmultiplied():
        warnings.simplefilter("ignore")
        model, places = _encoder(layout, place)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        # As many images as share the tokens: their parts have no rows that only pad them.
        images = _images(layout, layout.spread)
        _, kept = run_and_count(model.parameters(), lambda: model(*images))
        engine = ZeroEngine(model, places, layout.config, place, decays)
        heads = [_head(kind, layout, place) for kind in layout.heads]
        activations = round(kept / layout.spread * layout.micro_batch)
        counted = {**state_bytes(engine, heads), "activations": activations}
        # ZeRO 3 compares notes with the other ranks before its first pass, and there are none.
        if layout.zero_stage < 3:
            engine.backward(engine(*_images(layout, 1)).float().sum(), last=layout.micro_steps == 1)
            counted["gradients"] = storage_bytes(engine.held()["gradients"])
    return BuiltRank(rank, parameters, layout.parameters, counted, _planned(plan, rank))


def count_gpu_step(plan: Plan, rank: int) -> CountedStep:
    """Run a step of one rank of the planned job on fake CUDA tensors; ``load_guard`` must have run.

    Raises:
        UserError: There is no such rank.
    """
    from megaregion.planning.fake_gpu.device import DEVICE
    from megaregion.planning.fake_gpu.step import count_step

    with _fake_group(rank, plan, DEVICE) as place:
        return count_step(plan.layout, place)


def state_bytes(engine: ZeroEngine, heads: Iterable[ClassShardedHead]) -> dict[str, int]:
    """Bytes of what stays from step to step, by the plan's kinds."""
    held = engine.held()
    return {
        **{kind: storage_bytes(held[kind]) for kind in ("weights", "masters", "moments")},
        "head": sum(storage_bytes(piece.tensor for piece in head.state().values()) for head in heads),
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share memory count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _planned(plan: Plan, rank: int) -> dict[str, float]:
    """What is counted of this rank, as it was planned."""
    layout = plan.layout
    here = dataclasses.replace(plan.hardware, device="processor")
    # The last ranks may hold fewer classes than the fullest, for which the plan is.
    spaces = {"object": layout.labels.object_classes, "text": layout.labels.text_classes}
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
    before = {name: os.environ.get(name) for name in told}
    os.environ.update({name: str(value) for name, value in told.items()})
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield dataclasses.replace(topology.join(plan.layout.tensor), device=device)
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Unset(TorchFunctionMode):
    """Leaves new parameters as the allocator gave them: pages that nobody writes cost no memory."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return named["tensor"] if named and "tensor" in named else arguments[0]
        return function(*arguments, **(named or {}))


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


def _encoder(layout: Layout, place: Topology) -> tuple[RegionEncoder, Any]:
    """The encoder of one rank, and the places of its parameters, as the trainer builds them."""
    from megaregion.parallel.tensor_parallel import parallelize

    config = layout.config
    with _Unset():
        model = RegionEncoder(config.model, config.head.embedding_dim)
    model.vit.recompute = layout.recompute
    cut = config.parallel.tokens_cut
    places = parallelize(model, tensor_parallel_plan(model), partial_gradients(model, cut), place, cut)
    return model.to(_dtype(layout)), places


def _images(layout: Layout, count: int) -> tuple[Tensor, Tensor]:
    """Images of zeros, and regions that see all of them."""
    model, regions = layout.config.model, layout.config.data.regions_per_image
    images = torch.zeros(count, 3, model.image_size, model.image_size, dtype=_dtype(layout))
    return images, torch.ones(count, regions, model.grid**2, dtype=torch.bool)


def _dtype(layout: Layout) -> torch.dtype:
    return torch.bfloat16 if layout.config.train.bf16 else torch.float32


def _head(kind: str, layout: Layout, place: Topology) -> ClassShardedHead:
    labels = layout.labels
    classes = {"object": labels.object_classes, "text": labels.text_classes}
    return ClassShardedHead(kind, layout.config, classes[kind], place)
