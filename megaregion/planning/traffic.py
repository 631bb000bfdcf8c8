"""What crosses the links in one step: who sends how much, inside nodes and between them.

A ring over n ranks sends (n - 1) / n of a gather's or a scatter's bytes from each rank, twice that for an
all-reduce. A data group that spans nodes shares their network cards with the other data groups of its nodes,
one for each tensor rank.

Shapes: T image tokens, N regions, D width, E embedding width, R rows of a micro-step over all data ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megaregion.planning.hardware import Hardware
from megaregion.planning.layout import Layout
from megaregion.planning.memory import LIVE_PARAMETERS

Group = Literal["data", "tensor", "world"]
Phase = Literal["forward", "backward", "none"]


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step."""

    name: str
    group: Group
    ranks: int
    """Ranks of the group."""
    sent: float
    """Bytes that each rank sends in a step."""
    calls: float
    """Collectives in a step."""
    beside: Phase = "none"
    """The phase that it runs beside; none stops everything else."""
    within: float = 1.0
    """Share of that phase that it can run beside."""
    tail: float = 0.0
    """Share that nothing can hide, since it starts when that phase ends."""

    def crosses(self, hardware: Hardware, tensor: int) -> bool:
        """Whether the group spans nodes."""
        reach = self.ranks * (tensor if self.group == "data" else 1)
        return self.ranks > 1 and reach > hardware.gpus_per_node

    def network(self, hardware: Hardware, tensor: int) -> float:
        """Bytes that leave each node in a step."""
        groups = tensor if self.group == "data" else 1
        return self.sent * groups if self.crosses(hardware, tensor) else 0.0

    def seconds(self, hardware: Hardware, tensor: int) -> float:
        """Seconds of a step that the links are busy."""
        if self.ranks < 2:
            return 0.0
        bus = hardware.inside_gbytes
        if self.crosses(hardware, tensor):
            groups = min(tensor, hardware.gpus_per_node) if self.group == "data" else 1
            bus = min(bus, hardware.across_gbytes / groups)
        return self.calls * hardware.latency_us * 1e-6 + self.sent / (bus * 1e9)


def list_transfers(layout: Layout, hardware: Hardware) -> list[Transfer]:
    """Every kind of collective of a step."""
    return [*_body(layout, hardware), *_tensor(layout, hardware), *_heads(layout)]


def _body(layout: Layout, hardware: Hardware) -> list[Transfer]:
    stage, micro_steps, data = layout.zero_stage, layout.micro_steps, layout.data
    size, summed = layout.parameters * layout.itemsize, layout.parameters * layout.sum_itemsize
    ring = (data - 1) / data
    buckets = max(1, -(-layout.parameters // layout.bucket))
    overlaps = hardware.device == "gpu" and stage > 0
    # DeepSpeed reduces after every micro-step from stage 2 on, and in stages 0 to 2 by all-reduce.
    times = micro_steps if stage >= 2 else 1
    reduced = Transfer(
        "gradients",
        "data",
        data,
        sent=times * (1 if stage == 3 else 2) * ring * summed,
        calls=times * buckets,
        beside="backward" if overlaps else "none",
        tail=1 / buckets,
    )
    if stage == 0:
        return [reduced]
    gathers = 1
    if stage == 3:
        gathers = micro_steps * (1 if layout.parameters <= LIVE_PARAMETERS else 2)
    spread = Transfer(
        "parameters",
        "data",
        data,
        sent=gathers * ring * size,
        calls=gathers * (layout.config.model.depth if stage == 3 else 2),
        beside="forward" if overlaps and stage == 3 else "none",
    )
    return [reduced, spread]


def _tensor(layout: Layout, hardware: Hardware) -> list[Transfer]:
    """Sums of activations over the tensor ranks, in each block behind attention and MLP, and on the way back.

    A sum is an all-reduce; where tokens are cut it is a scatter, and a gather comes before the next linear.
    On the way back a column-cut linear sends beside its products, a row-cut one waits.
    """
    model, tensor, cut = layout.config.model, layout.tensor, layout.config.parallel.tokens_cut
    if tensor == 1:
        return []
    tokens = (model.depth - 1) * (1 + model.grid**2)
    rides = model.region_layers * layout.config.data.regions_per_image
    size = (tokens + rides) * model.width * layout.itemsize * layout.images
    once = (tensor - 1) / tensor * size
    blocks = (model.depth - 1 + model.region_layers) * layout.micro_steps
    # Forward passes, with those of blocks that run again.
    passes = 1 + layout.recompute.count("full") / model.depth
    # Of a backward pass's products those of column-cut linears, half of them the weights' gradients.
    columns = (3 * model.width + model.mlp_width) / (4 * model.width + 2 * model.mlp_width)
    overlaps: Phase = "backward" if hardware.device == "gpu" else "none"
    if cut:
        # Gather, scatter, twice; behind them the gathers of the row-cut linears' gradients.
        alone, beside, calls = 4 * passes + 2, 4.0, 4.0
    else:
        # An all-reduce sends twice what a gather does.
        alone, beside, calls = 4 * passes, 4.0, 2.0
    return [
        Transfer("activations", "tensor", tensor, alone * once, alone * calls / 4 * blocks),
        Transfer(
            "activations, hidden",
            "tensor",
            tensor,
            beside * once,
            calls * blocks,
            beside=overlaps,
            within=columns if cut else columns / 2,
        ),
    ]


def _heads(layout: Layout) -> list[Transfer]:
    rows, data, world, steps = layout.micro_rows, layout.data, layout.ranks, layout.micro_steps
    ring, slots = (data - 1) / data, layout.config.data.max_text_tokens
    features = rows * layout.config.head.embedding_dim * layout.itemsize
    labels = rows * (slots + 1) * 8
    sums = sum(head.rows * (slots + 2) * 4 for head in layout.heads.values())
    blocks = sum(head.draws * -(-head.tiles.total_rows // head.tiles.rows) for head in layout.heads.values())
    return [
        Transfer("region rows", "data", data, steps * ring * (features + labels), 2 * steps),
        Transfer("row gradients", "data", data, steps * ring * features, steps),
        Transfer("row sums", "world", world, steps * 2 * (world - 1) / world * sums, steps * (blocks + 6)),
    ]
