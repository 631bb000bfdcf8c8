"""One rank of a large job, built in this process: its real tensors beside the plan's.

torch's "fake" process group answers every collective at once, so any rank of any number can be built, with
the code of a real start: the encoder cut by megatron's layers, DeepSpeed's engine, the heads' shards. One
image goes through it, with the operations of a processor, to see what autograd keeps. Weights are left as the
allocator gave them; nothing is learned here.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megaregion.errors import UserError
from megaregion.heads.sharded import ClassShardedHead
from megaregion.models.plan import partial_gradients, tensor_parallel_plan
from megaregion.models.recompute import watch_kept
from megaregion.models.vit import RegionEncoder, decays
from megaregion.parallel.topology import Topology
from megaregion.planning.activations import activation_bytes
from megaregion.planning.hardware import GIB, Hardware
from megaregion.planning.layout import Layout
from megaregion.planning.memory import gradients_of_one_pass
from megaregion.planning.plan import Plan

TOLERANCE = 0.05
"""Share by which the plan's memory may be off."""


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
        counted = self.counted[kind]
        return self.planned[kind] / counted - 1 if counted else 0.0

    def text(self) -> str:
        """Counted and planned below each other."""
        lines = [
            f"rank {self.rank}, built with a fake process group",
            f"  {'':12}{'counted MiB':>12}{'planned MiB':>12}{'off':>8}",
        ]
        lines += [
            f"  {kind:12}{size / 2**20:>12,.1f}{self.planned[kind] / 2**20:>12,.1f}{self.off(kind):>8.1%}"
            for kind, size in self.counted.items()
        ]
        counted, planned = self.total
        lines.append(
            f"  {'total':12}{counted / 2**20:>12,.1f}{planned / 2**20:>12,.1f}{planned / counted - 1:>8.1%}"
        )
        lines.append(f"  parameters  {self.parameters:,} counted, {self.planned_parameters:,} planned")
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "rank": self.rank,
            "parameters": self.parameters,
            "planned_parameters": self.planned_parameters,
            "counted": self.counted,
            "planned": self.planned,
        }

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


def build_rank(plan: Plan, rank: int) -> BuiltRank:
    """Build one rank of the planned job, pass an image through it, and count its tensors.

    Args:
        plan: The plan.
        rank: The rank, of all ranks.

    Raises:
        UserError: There is no such rank.
    """
    layout = plan.layout
    if not 0 <= rank < layout.ranks:
        raise UserError(f"--dry-run must name a rank in [0, {layout.ranks - 1}], got {rank}")
    with _fake_group(rank, plan.hardware, layout.tensor) as topology, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = _Body(layout, topology)
        counted = body.at_rest()
        heads = [_head(kind, layout, topology) for kind in layout.heads]
        counted["head"] = sum(_bytes(p.tensor for p in head.state().values()) for head in heads)
        counted["activations"] = round(body.kept * layout.micro_batch)
        # ZeRO 3 compares notes with the other ranks before its first pass, and there are none.
        if layout.zero_stage < 3:
            body.pass_one_image()
            counted["gradients"] = body.gradients()
        parameters = body.parameters
    return BuiltRank(rank, parameters, layout.parameters, counted, _planned(plan, rank))


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
def _fake_group(rank: int, hardware: Hardware, tensor: int) -> Iterator[Topology]:
    """The place of a rank among ranks that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megaregion.parallel import topology

    local, ranks = hardware.gpus_per_node, hardware.gpus
    told = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update({name: str(value) for name, value in told.items()})
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield topology.join(tensor)
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


class _Body:
    """The encoder of one rank under its engine, as the trainer builds it."""

    def __init__(self, layout: Layout, topology: Topology) -> None:
        from megaregion.parallel.tensor_parallel import parallelize
        from megaregion.parallel.zero import ZeroEngine

        config = layout.config
        with _Unset():
            model = RegionEncoder(config.model, config.head.embedding_dim)
        model.vit.levels = layout.levels
        cut = config.parallel.tokens_cut
        partial = partial_gradients(model, cut)
        places = parallelize(model, tensor_parallel_plan(model), partial, topology, cut)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._config, self._device = config, topology.device
        self._several = layout.micro_steps > 1
        if config.train.precision == "bf16":
            model = model.to(torch.bfloat16)
        # As many images as share the tokens: their parts have no rows that only pad them.
        self.kept = self._kept_of_images(model, layout.spread) / layout.spread
        """Bytes that autograd keeps of one image from forward to backward."""
        self._engine = ZeroEngine(model.to(topology.device), places, config, topology, decays)

    def at_rest(self) -> dict[str, int]:
        """Bytes of what stays from step to step, by the plan's kinds."""
        held = self._engine.held()
        return {kind: _bytes(held[kind]) for kind in ("weights", "masters", "moments")}

    def pass_one_image(self) -> None:
        """Send one image forward and back."""
        self._engine.backward(self._engine(*self._images(1)).float().sum(), last=not self._several)

    def gradients(self) -> int:
        """Bytes of gradients that wait for the next micro-step, or for the update."""
        return _bytes(self._engine.held()["gradients"])

    def _kept_of_images(self, model: RegionEncoder, count: int) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> None:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

        with watch_kept(note):
            embeddings = model(*self._images(count))
        size = _bytes(tensor for place, tensor in kept.items() if place not in own)
        del embeddings
        return size

    def _images(self, count: int) -> tuple[Tensor, Tensor]:
        model, regions = self._config.model, self._config.data.regions_per_image
        kind = torch.bfloat16 if self._config.train.precision == "bf16" else torch.float32
        images = torch.zeros(count, 3, model.image_size, model.image_size, device=self._device, dtype=kind)
        return images, torch.ones(count, regions, model.grid**2, dtype=torch.bool, device=self._device)


def _head(kind: str, layout: Layout, topology: Topology) -> ClassShardedHead:
    config, labels = layout.config, layout.labels
    return ClassShardedHead(
        config.head.object if kind == "object" else config.head.text,
        labels.object_classes if kind == "object" else labels.text_classes,
        config.head.embedding_dim,
        world_group=topology.world_group,
        data_group=topology.data_group,
        tensor_group=topology.tensor_group,
        seed=config.seed,
        name=kind,
        optimizer=config.optimizer,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share memory count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
