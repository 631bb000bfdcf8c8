"""Seconds of one step by phase: operations over rates, bytes over bandwidths, kernels over the host's pace.

Matrix products run at ``linear_share`` of the matrix rate, attention at ``attention_share``; what stands
between them (norms, rotations, activations, residual sums) reads and writes memory. A phase takes at least
as long as the host needs to start its kernels. Collectives that run beside a phase count where they last
longer. A ring over n ranks sends (n - 1) / n of a gather's or a scatter's bytes from each rank, twice that
for an all-reduce.

Shapes: T image tokens, N regions, D width, M MLP width, E embedding width, R rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megaregion.config import ModelConfig
from megaregion.heads.tiles import ELEMENTS
from megaregion.models.costs import EncoderFlops, encoder_flops, head_flops
from megaregion.parallel.muon import flops
from megaregion.parallel.zero import REDUCE_BUCKET
from megaregion.planning.hardware import Hardware
from megaregion.planning.layout import HeadLayout, Layout, block_count
from megaregion.planning.memory import LIVE_PARAMETERS

KERNELS = {
    "forward": 11, "backward": 33, "dropped": 5, "sums": 11, "block of centers": 34, "matrix": 40,
}  # fmt: skip
"""Kernels of one block's forward and backward pass, of the latter's under stochastic depth besides, of adding
up its gradients in another type, of updating some centers, and of Muon for a matrix, as a dry run counts
them."""
COMPILED_KERNELS = {"forward": 10, "backward": 35}
"""Those of a compiled block."""
HEAD_KERNELS = {
    "micro-step": 17, "grouped": 13, "wave": 8,
    "head": 25, "draw": 12, "block": 39, "tile": 34, "tile again": 14,
}  # fmt: skip
"""Kernels of the heads, as a dry run counts them: of a micro-step, beside them of each head whose draws go
together, of each of its waves; or of a head and of each of its draws, blocks of rows and tiles. Drawing is
the host's, beside the encoder's pass."""
CHEAP_SHARE = 0.03
"""What recomputing norms and activations alone costs, of a forward pass: about 1% of a step."""
STATE_BYTES = 12
"""Bytes of a parameter in a checkpoint: fp32 value and two moments."""

Group = Literal["data", "tensor", "world"]
Phase = Literal["forward", "backward", "none"]


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a step."""

    name: str
    sent: float
    """Bytes that each rank sends in a step."""
    network: float
    """Bytes that leave each node in a step."""
    seconds: float
    """Seconds of a step that it keeps the links busy, hidden or not."""
    beside: Phase
    """The phase that it runs beside; none stops everything else."""
    within: float
    """Share of that phase that it can run beside."""
    tail: float
    """Share that nothing can hide, since it starts when that phase ends."""

    def exposed(self, phases: dict[str, float]) -> float:
        """Seconds that no phase hides."""
        if self.beside == "none":
            return self.seconds
        tail = self.tail * self.seconds
        return tail + max(0.0, self.seconds - tail - self.within * phases[self.beside])


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank."""

    phases: dict[str, float]
    """data, forward, head, backward, optimizer, communication, save; each without what another hides."""
    transfers: tuple[Transfer, ...]
    flops: float
    """Operations of the encoder of a step on one rank, as MFU counts them."""
    notes: dict[str, float]
    """save_blocks and save_writes (s), head_kernels (s of the host), images_read (bytes of a node), and
    with Muon muon (operations of all ranks)."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.phases.values())


def step_time(layout: Layout, hardware: Hardware) -> StepTime:
    """Plan one step."""
    config = layout.config
    forward, backward = _encoder(layout, hardware)
    head, host = _heads(layout, hardware)
    blocks, writes = save_seconds(layout, hardware)
    transfers = (*_body(layout, hardware), *_activations(layout, hardware), *_rows(layout, hardware))
    phases = {
        "data": 0.0,
        "forward": forward,
        "head": head,
        "backward": backward,
        "optimizer": _optimizer(layout, hardware),
        "communication": sum(
            transfer.exposed({"forward": forward, "backward": backward}) for transfer in transfers
        ),
        "save": blocks / config.checkpoint.every,
    }
    phases["data"] = _data(layout, hardware, sum(phases.values()))
    flops = _counted(layout).training
    read = config.train.global_batch * hardware.image_kbytes * 1e3 / hardware.nodes
    notes = {"save_blocks": blocks, "save_writes": writes, "head_kernels": host, "images_read": read}
    notes |= {"muon": float(muon_flops(config.model))} if layout.by_muon else {}
    return StepTime(phases, transfers, flops * layout.images / layout.tensor, notes)


def save_seconds(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Seconds for which a save stops training, and seconds until it is on the disk.

    ZeRO 3 gathers every tensor of a tensor rank on the way to each rank's share; ZeRO 1 and 2 gather nothing.
    """
    centers = sum(layout.labels.by_kind.values()) * layout.config.head.embedding_dim
    size = STATE_BYTES * (layout.all_parameters + centers) - 4 * layout.by_muon * layout.tensor
    gathered = STATE_BYTES * layout.parameters if layout.zero_stage == 3 else 0
    copied = size / layout.ranks / (hardware.host_gbytes * 1e9) + gathered / (hardware.inside_gbytes * 1e9)
    writes = size / (hardware.write_gbytes * 1e9)
    return (copied if layout.config.checkpoint.asynchronous else copied + writes), copied + writes


def _encoder(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Seconds of the forward and of the backward passes."""
    config, images, tensor = layout.config, layout.images, layout.tensor
    counted = _counted(layout)
    rate = hardware.matrix_tflops * 1e12
    linears = (counted.linears + counted.region_linears) / tensor + counted.projection
    reads = (counted.attention + counted.region_attention) / tensor
    products = linears / (rate * hardware.linear_share)
    attention = reads / (rate * hardware.attention_share)
    patches = counted.patches / (rate * hardware.linear_share)
    out, back = _moved(layout, hardware)
    memory = hardware.memory_gbytes * 1e9
    forward = images * (products + attention + patches + out / memory)
    # Blocks that run again, and norms and activations that are made again.
    full, cheap = (layout.recompute.count(level) / config.model.depth for level in ("full", "cheap"))
    again = forward * (full + CHEAP_SHARE * cheap)
    backward = images * (2 * (products + attention) + patches + back / memory) + again
    kernels = (
        layout.micro_steps * hardware.launch_us * 1e-6 * (config.model.depth + config.model.region_layers)
    )
    each = {**KERNELS, **(COMPILED_KERNELS if config.train.compile else {})}
    behind = each["backward"] + each["forward"] * full + (each["sums"] if layout.sums_apart else 0)
    behind += each["dropped"] if config.model.drop_path and not config.train.compile else 0
    taught = images * layout.teacher.flops / tensor / (rate * hardware.linear_share)
    return max(forward, kernels * each["forward"]) + taught, max(backward, kernels * behind)


def _counted(layout: Layout) -> EncoderFlops:
    config = layout.config
    regions, dim = config.data.regions_per_image, config.head.embedding_dim
    return encoder_flops(config.model, regions, dim, teacher_width=layout.teacher.width)


def _moved(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Bytes that the passes between products read and write for one image, forward and backward.

    In widths of a token: norms 4, splitting and turning q, k, v 6 (12 on a processor, which takes several
    passes), residual sums 6, the activation 2 M. On the way back norms, with the sums, 8, the activation 3 M,
    and biases that are not summed on the way (of cut linears M and 5, two of them over whole tokens on every
    rank); a processor adds gradients and sums biases in passes of their own. Stochastic depth weighs the
    gradients of two branches, 4, one of which then sums its bias in a pass of its own.
    """
    model, tensor, spread = layout.config.model, layout.tensor, layout.spread
    tokens = model.tokens * (model.depth - (0 if layout.teacher.width else 1))
    tokens += layout.config.data.regions_per_image * model.region_layers
    width, mlp, size = model.width, model.mlp_width / tensor, layout.itemsize
    turns = 12 if hardware.device == "processor" else 6
    out = (10 / spread + turns / tensor) * width + 2 * mlp
    norms, biases, active = (8, 1, 3) if tensor == 1 else (8, 2, 4)
    if hardware.device == "processor":
        norms, biases, active = 16, 2, 4
    back = (norms / spread + biases + (turns + 3) / tensor) * width + active * mlp
    back += (5 if model.drop_path else 0) / spread * width
    return tokens * size * out, tokens * size * back


def head_kernels(layout: Layout) -> dict[str, float]:
    """Kernels of each head in a micro-step; what the heads share is the first one's."""
    each, found = HEAD_KERNELS, dict[str, float]()
    for kind, head in layout.heads.items():
        block = each["block"] + head.tiles * each["tile"] + head.again * each["tile again"]
        apart = each["head"] + head.draws * (each["draw"] + head.blocks * block)
        found[kind] = each["grouped"] + head.waves * each["wave"] if head.waves else apart
        found[kind] += each["micro-step"] if len(found) == 1 else 0
    return found


def _heads(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Seconds of all heads' losses and gradients, and what the host needs to start their kernels."""
    seconds = host = 0.0
    kernels = head_kernels(layout)
    for kind, head in layout.heads.items():
        kept = 1.0 if head.waves else 1 - head.again / head.tiles
        flops = head_flops(head.rows, head.drawn, layout.config.head.embedding_dim, kept)
        products = flops / (hardware.matrix_tflops * 1e12 * hardware.linear_share)
        passes = _score_bytes(head, layout, hardware) / (hardware.memory_gbytes * 1e9)
        starts = layout.micro_steps * kernels[kind] * hardware.launch_us * 1e-6
        seconds += max(layout.micro_steps * (products + passes), starts)
        host += starts
    return seconds, host


def _score_bytes(head: HeadLayout, layout: Layout, hardware: Hardware) -> float:
    """Bytes that one micro-step's scores, rows and centers move.

    Of draws that go together a score is written once and read by two products, in the operands' type. Else it
    is fp32: written 4, maximum 4, exponential 8, sum 4, times its row's factor 8, read by two products 8;
    narrow operands are written (6) and read (4) instead. On a processor tiles stay in the cache.
    """
    dim, narrow = layout.config.head.embedding_dim, layout.itemsize
    drawn = head.draws * head.drawn * dim
    if head.waves:
        # Rows normalised, read by three kernels, weighed; their gradient cleared, written, scaled, sent back.
        rows = head.rows * dim * (4 * 4 + narrow * 7)
        # Fetched and made unit, read by a product, gradient written; of several draws collected in a matrix.
        centers = drawn * (8 + 2 * narrow) + (
            4 * (drawn + head.local_classes * dim) if head.draws > 1 else 0.0
        )
        return head.rows * head.drawn * 3 * narrow + rows + centers
    score = 0 if hardware.device == "processor" else 38 if narrow == 2 else 36
    rows = head.rows * dim * (4 * 6 + narrow * 4)
    # Fetched, made unit, gradient set to zero, added to, gathered.
    return head.rows * head.drawn * score + rows + drawn * 4 * (9 if head.sampled else 2)


def _optimizer(layout: Layout, hardware: Hardware) -> float:
    """Seconds of moving body and centers, with what ZeRO copies on the way."""
    stage, size, dim = layout.zero_stage, layout.itemsize, layout.config.head.embedding_dim
    parameters = layout.parameters
    if stage == 0:
        # The norm, then AdamW's four reads and three writes.
        moved = float(parameters * (4 + 28))
    else:
        owned = parameters / layout.data
        # Flat gradients in fp32, their norm, the clip, AdamW, the copy back.
        moved = owned * (12 + 4 + 8 + 28 + 4 + size)
        # Gradients go to a bucket, are averaged, laid out for the reduction and brought back.
        times = layout.micro_steps if stage >= 2 else 1
        moved += times * parameters * 8 * layout.sum_itemsize
        if stage < 3:
            # Those of a micro-step are widened, read 2 and written 4, and added to the sums of earlier ones.
            later = layout.micro_steps - 1
            widened = 6 * layout.micro_steps if layout.sums_apart else 0
            moved += parameters * (widened + later * 3 * layout.sum_itemsize)
    touched = sum(head.touched for head in layout.heads.values())
    # Correction and norm of the gradients, then weight and two moments read, moved and written back.
    moved += touched * dim * 4 * (6 + 14)
    blocks = touched * dim / ELEMENTS[hardware.device]
    host = blocks * KERNELS["block of centers"] * hardware.launch_us * 1e-6
    seconds, kernels = _muon(layout, hardware)
    # A part of a matrix is read and written as fp32 10 times and in the products' type 8 times.
    shared = layout.data if stage else 1
    moved += layout.by_muon / shared * (40 + 8 * size - 28)
    return max(moved / (hardware.stream_gbytes or hardware.memory_gbytes) / 1e9 + seconds, host + kernels)


def muon_flops(model: ModelConfig) -> int:
    """Operations that orthogonalise the blocks' matrices, once a step over all ranks."""
    return block_count(model) * (
        4 * flops(model.width, model.width) + 2 * flops(model.width, model.mlp_width)
    )


def _muon(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Seconds of Muon's products on the busiest rank, and of the host that starts their kernels."""
    if not layout.by_muon:
        return 0.0, 0.0
    model, ranks = layout.config.model, layout.ranks if layout.zero_stage else layout.tensor
    most = max(3 * flops(model.width, model.width), flops(model.width, model.mlp_width))
    own = max(muon_flops(model) / ranks, most)
    started = max(1.0, 6 * block_count(model) / ranks) * KERNELS["matrix"] * hardware.launch_us * 1e-6
    return own / (hardware.matrix_tflops * 1e12 * hardware.linear_share), started


def _data(layout: Layout, hardware: Hardware, busy: float) -> float:
    """Seconds of a step that a rank waits for its images."""
    workers = layout.config.data.workers
    if workers == 0:
        return layout.images / hardware.decode_images
    decoded = layout.images / (workers * hardware.decode_images)
    read = layout.config.train.global_batch * hardware.image_kbytes * 1e3 / (hardware.read_gbytes * 1e9)
    return max(0.0, max(decoded, read) - busy)


def _transfer(
    layout: Layout,
    hardware: Hardware,
    name: str,
    group: Group,
    sent: float,
    calls: float,
    beside: tuple[Phase, float, float] = ("none", 1.0, 0.0),
) -> Transfer:
    """So many collectives of a group in which each rank sends so many bytes in all.

    A data group that spans nodes shares their network cards with the other data groups of its nodes, one for
    each tensor rank.
    """
    ranks = {"data": layout.data, "tensor": layout.tensor, "world": layout.ranks}[group]
    groups = layout.tensor if group == "data" else 1
    crosses = ranks > 1 and ranks * groups > hardware.gpus_per_node
    bus = hardware.inside_gbytes
    if crosses:
        bus = min(bus, hardware.across_gbytes / min(groups, hardware.gpus_per_node))
    seconds = calls * hardware.latency_us * 1e-6 + sent / (bus * 1e9) if ranks > 1 else 0.0
    return Transfer(name, sent, sent * groups if crosses else 0.0, seconds, *beside)


def _body(layout: Layout, hardware: Hardware) -> list[Transfer]:
    """Gradients over the data ranks, and the parameters that ZeRO brings back."""
    stage, micro_steps = layout.zero_stage, layout.micro_steps
    size, summed = layout.parameters * layout.itemsize, layout.parameters * layout.sum_itemsize
    ring, buckets = (layout.data - 1) / layout.data, max(1, -(-layout.parameters // REDUCE_BUCKET))
    overlaps = hardware.device == "gpu" and stage > 0
    # DeepSpeed reduces after every micro-step from stage 2 on, and in stages 0 to 2 by all-reduce.
    times = micro_steps if stage >= 2 else 1
    sent = times * (1 if stage == 3 else 2) * ring * summed
    beside: Phase = "backward" if overlaps else "none"
    reduced = _transfer(
        layout, hardware, "gradients", "data", sent, times * buckets, (beside, 1.0, 1 / buckets)
    )
    if stage == 0:
        return [reduced]
    parts = 2 * layout.by_muon / layout.data * layout.itemsize
    muons = [_transfer(layout, hardware, "muon's matrices", "world", parts, 2)] if layout.by_muon else []
    gathers = 1
    if stage == 3:
        gathers = micro_steps * (1 if layout.parameters <= LIVE_PARAMETERS else 2)
    calls = gathers * (layout.config.model.depth if stage == 3 else 2)
    beside = "forward" if overlaps and stage == 3 else "none"
    sent = gathers * ring * size
    parameters = _transfer(layout, hardware, "parameters", "data", sent, calls, (beside, 1.0, 0.0))
    return [reduced, *muons, parameters]


def _activations(layout: Layout, hardware: Hardware) -> list[Transfer]:
    """Sums of activations over the tensor ranks, in each block behind attention and MLP, and on the way back.

    A sum is an all-reduce; where tokens are cut it is a scatter, and a gather comes before the next linear.
    On the way back a column-cut linear sends beside its products, a row-cut one waits.
    """
    model, tensor, cut = layout.config.model, layout.tensor, layout.config.parallel.tokens_cut
    if tensor == 1:
        return []
    tokens = (model.depth - 1) * model.tokens
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
    within = columns if cut else columns / 2
    return [
        _transfer(layout, hardware, "activations", "tensor", alone * once, alone * calls / 4 * blocks),
        _transfer(
            layout, hardware, "activations, hidden", "tensor", beside * once, calls * blocks,
            (overlaps, within, 0.0),
        ),
    ]  # fmt: skip


def _rows(layout: Layout, hardware: Hardware) -> list[Transfer]:
    """Region rows and labels to all data ranks, their gradients back, and the sums of scores."""
    data, world, steps = layout.data, layout.ranks, layout.micro_steps
    ring, slots = steps * (data - 1) / data, layout.config.data.label_slots
    values = layout.micro_rows * layout.config.head.embedding_dim
    labels = layout.micro_rows * (slots + 1) * 8
    sums = sum(head.rows * (slots + 2) * 4 for head in layout.heads.values())
    blocks = sum(2 * head.waves or head.draws * head.blocks for head in layout.heads.values())
    sent = steps * 2 * (world - 1) / world * sums
    return [
        _transfer(
            layout, hardware, "region rows", "data", ring * (values * layout.itemsize + labels), 2 * steps
        ),
        _transfer(layout, hardware, "row gradients", "data", ring * values * layout.sum_itemsize, steps),
        _transfer(layout, hardware, "row sums", "world", sent, steps * (blocks + 6)),
    ]
