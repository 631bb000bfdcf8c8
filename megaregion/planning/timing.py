"""Seconds of one step by phase: operations over rates, bytes over bandwidths, kernels over the host's pace.

Matrix products run at ``linear_share`` of the matrix rate, attention at ``attention_share``; what stands
between them (norms, rotations, activations, residual sums) reads and writes memory. A phase takes at least
as long as the host needs to start its kernels. Collectives that run beside a phase count where they last
longer.

Shapes: T image tokens, N regions, D width, M MLP width, E embedding width, R rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaregion.heads.tiles import ELEMENTS
from megaregion.models.costs import encoder_flops, head_flops
from megaregion.planning.hardware import Hardware
from megaregion.planning.layout import HeadLayout, Layout
from megaregion.planning.traffic import Transfer, list_transfers

KERNELS = {
    "forward": 11, "backward": 31, "sums": 11, "head": 50, "draw": 60, "tile": 33, "block of centers": 34,
}  # fmt: skip
"""Kernels of one block's forward and backward pass and of adding up its gradients in another type, of a head
in a micro-step, of a draw, of a tile, and of updating some centers. Drawing is the host's, beside the
encoder's pass."""
CHEAP_SHARE = 0.03
"""What recomputing norms and activations alone costs, of a forward pass: about 1% of a step."""
STATE_BYTES = 12
"""Bytes of a parameter in a checkpoint: fp32 value and two moments."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank."""

    phases: dict[str, float]
    """data, forward, head, backward, optimizer, communication, save; each without what another hides."""
    links: dict[str, float]
    """Seconds that each kind of collective keeps the links busy, hidden or not."""
    flops: float
    """Operations of the encoder of a step on one rank, as MFU counts them."""
    notes: dict[str, float]
    """save_blocks and save_writes (s), head_kernels (s of the host), images_read (bytes of a node)."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.phases.values())


def step_time(layout: Layout, hardware: Hardware) -> StepTime:
    """Plan one step."""
    forward, backward = _encoder(layout, hardware)
    head, host = _heads(layout, hardware)
    update = _optimizer(layout, hardware)
    transfers = list_transfers(layout, hardware)
    links = {one.name: one.seconds(hardware, layout.tensor) for one in transfers}
    exposed = sum(
        _exposed(one, links[one.name], {"forward": forward, "backward": backward, "none": 0.0})
        for one in transfers
    )
    blocks, writes = save_seconds(layout, hardware)
    save = blocks / layout.config.checkpoint.every
    busy = forward + backward + head + update + exposed + save
    flops = encoder_flops(
        layout.config.model, layout.config.data.regions_per_image, layout.config.head.embedding_dim
    ).training
    phases = {
        "data": _data(layout, hardware, busy),
        "forward": forward,
        "head": head,
        "backward": backward,
        "optimizer": update,
        "communication": exposed,
        "save": save,
    }
    read = layout.config.train.global_batch * hardware.image_kbytes * 1e3 / hardware.nodes
    notes = {"save_blocks": blocks, "save_writes": writes, "head_kernels": host, "images_read": read}
    return StepTime(phases, links, flops * layout.images / layout.tensor, notes)


def checkpoint_bytes(layout: Layout) -> float:
    """Bytes of one checkpoint: masters and moments of body and heads."""
    classes = layout.labels.object_classes + layout.labels.text_classes
    whole = layout.body.on_rank(1)
    return float(STATE_BYTES * (whole + classes * layout.config.head.embedding_dim))


def save_seconds(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Seconds for which a save stops training, and seconds until it is on the disk.

    Each rank sees every tensor of its tensor rank on the way to its own share, gathered over the data ranks.
    """
    size = checkpoint_bytes(layout)
    gathered = STATE_BYTES * layout.parameters if layout.data > 1 else 0
    copied = size / layout.ranks / (hardware.host_gbytes * 1e9) + gathered / (hardware.inside_gbytes * 1e9)
    writes = size / (hardware.write_gbytes * 1e9)
    return (copied if layout.config.checkpoint.asynchronous else copied + writes), copied + writes


def _encoder(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Seconds of the forward and of the backward passes."""
    config, images, tensor = layout.config, layout.images, layout.tensor
    regions = config.data.regions_per_image
    counted = encoder_flops(config.model, regions, config.head.embedding_dim)
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
    behind = KERNELS["backward"] + KERNELS["forward"] * full + (KERNELS["sums"] if layout.sums_apart else 0)
    return max(forward, kernels * KERNELS["forward"]), max(backward, kernels * behind)


def _moved(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Bytes that the passes between products read and write for one image, forward and backward.

    In widths of a token: norms 4, splitting and turning q, k, v 6 (12 on a processor, which takes several
    passes), residual sums 6, the activation 2 M; on the way back also the biases' sums, two of them over
    whole tokens on every rank.
    """
    model, tensor, spread = layout.config.model, layout.tensor, layout.spread
    tokens = (1 + model.grid**2) * (model.depth - 1)
    tokens += layout.config.data.regions_per_image * model.region_layers
    width, mlp, size = model.width, model.mlp_width / tensor, layout.itemsize
    turns = 12 if hardware.device == "processor" else 6
    out = (10 / spread + turns / tensor) * width + 2 * mlp
    back = (16 / spread + 2 + (turns + 3) / tensor) * width + 4 * mlp
    return tokens * size * out, tokens * size * back


def _heads(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Seconds of all heads' losses and gradients, and what the host needs to start their kernels."""
    dim = layout.config.head.embedding_dim
    seconds = host = 0.0
    for head in layout.heads.values():
        flops = head_flops(head.rows, head.drawn, dim, head.kept)
        products = flops / (hardware.matrix_tflops * 1e12 * hardware.linear_share)
        passes = _score_bytes(head, layout, hardware) / (hardware.memory_gbytes * 1e9)
        tiles = -(-head.tiles.total_classes // head.tiles.classes)
        blocks = -(-head.tiles.total_rows // head.tiles.rows)
        kernels = KERNELS["head"] + head.draws * (KERNELS["draw"] + blocks * tiles * KERNELS["tile"])
        starts = layout.micro_steps * kernels * hardware.launch_us * 1e-6
        seconds += max(layout.micro_steps * (products + passes), starts)
        host += starts
    return seconds, host


def _score_bytes(head: HeadLayout, layout: Layout, hardware: Hardware) -> float:
    """Bytes that one micro-step's scores, rows and centers move.

    A score in fp32: written 4, maximum 4, exponential 8, sum 4, times its row's factor 8, read by two
    products 8; narrow operands are written (6) and read (4) instead. On a processor tiles stay in the cache.
    """
    dim = layout.config.head.embedding_dim
    score = 0 if hardware.device == "processor" else 38 if layout.itemsize == 2 else 36
    rows = head.rows * dim * (4 * 6 + layout.itemsize * 4)
    # Fetched, made unit, gradient set to zero, added to, gathered.
    centers = head.draws * head.drawn * dim * 4 * (9 if head.sampled else 2)
    return head.rows * head.drawn * score + rows + centers


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
    touched = sum(head.touched for head in layout.heads.values())
    # Correction and norm of the gradients, then weight and two moments read, moved and written back.
    moved += touched * dim * 4 * (6 + 14)
    blocks = touched * dim / ELEMENTS[hardware.device]
    host = blocks * KERNELS["block of centers"] * hardware.launch_us * 1e-6
    return max(moved / (hardware.stream_gbytes or hardware.memory_gbytes) / 1e9, host)


def _data(layout: Layout, hardware: Hardware, busy: float) -> float:
    """Seconds of a step that a rank waits for its images."""
    workers = layout.config.data.workers
    if workers == 0:
        return layout.images / hardware.decode_images
    decoded = layout.images / (workers * hardware.decode_images)
    read = layout.config.train.global_batch * hardware.image_kbytes * 1e3 / (hardware.read_gbytes * 1e9)
    return max(0.0, max(decoded, read) - busy)


def _exposed(transfer: Transfer, busy: float, phases: dict[str, float]) -> float:
    """Seconds of a collective that no phase hides."""
    if transfer.beside == "none":
        return busy
    tail = transfer.tail * busy
    return tail + max(0.0, busy - tail - transfer.within * phases[transfer.beside])
