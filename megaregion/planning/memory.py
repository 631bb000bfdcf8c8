"""Memory of one rank, by kind, at the moments of a step when it can be greatest.

    forward of the last micro-step ends | heads | backward ............ | update
    activations at their greatest,      + rows,   activations fall,       fp32 gradients of
    ZeRO 3's gathers in flight            scores   gradients grow          this rank's part

DeepSpeed 0.19.8 is reckoned as it is. Activations are what autograd keeps of the modules as they are written;
tests hold the formulas against the real modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaregion.models.costs import RECOMPUTE, Recompute, kept_bytes
from megaregion.parallel.zero import REDUCE_BUCKET
from megaregion.planning.hardware import Hardware
from megaregion.planning.layout import HeadLayout, Layout

LIVE_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO 3 keeps gathered for their next use (stage3_max_live_parameters)."""
PREFETCH_BUCKET = 50_000_000
"""Parameters that ZeRO 3 gathers together (stage3_prefetch_bucket_size)."""
GLOO_COPY = 0.5
"""What gloo's reduce-scatter takes of its own, as a share of what it reduces; measured 0.5 to 0.6."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    kinds: dict[str, float]
    """By kind, at the moment when the sum is greatest."""
    moments: dict[str, float]
    """The sum at each moment: heads, backward, update, and forward under ZeRO 3."""
    at_rest: dict[str, float]
    """weights, masters, moments and head between two steps, nothing gathered and no room to work in."""
    activations: float
    """Kept for the backward pass by one micro-step, at their greatest."""

    @property
    def when(self) -> str:
        """The moment of the greatest sum."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak(self) -> float:
        """The greatest sum."""
        return self.moments[self.when]


def rank_memory(layout: Layout, hardware: Hardware) -> Memory:
    """Plan the memory of the fullest rank."""
    resident = _resident(layout, hardware)
    stored, growing = _gradients(layout)
    kept = activation_bytes(layout, hardware) * layout.micro_batch
    owned = layout.parameters / layout.data if layout.zero_stage else 0.0
    # What Muon sends, gets and gets back, in the type of its products.
    parts = 3 * layout.itemsize * layout.by_muon / (layout.data if layout.zero_stage else 1)
    # Before the update this rank's gradients are laid out flat, in fp32, beside themselves.
    updating = parts + owned * layout.sum_itemsize if layout.zero_stage else parts + growing
    centers = 0.0 if hardware.device == "processor" else _head_scratch(layout)
    moments = {
        "heads": {"activations": kept, "gradients": stored, "rows and scores": centers + _head_work(layout)},
        "backward": {**_backward(layout, hardware, kept), "rows and scores": centers},
        "update": {"gradients": updating + 4 * owned, "rows and scores": centers},
    }
    if layout.zero_stage == 3:
        moments["forward"] = _forward(layout, kept)
    sums = {name: sum(resident.values()) + sum(kinds.values()) for name, kinds in moments.items()}
    when = max(sums, key=lambda name: sums[name])
    kinds = {**resident, "gradients": 0.0, "activations": 0.0, "rows and scores": 0.0}
    for kind, size in moments[when].items():
        kinds[kind] += size
    return Memory(kinds, sums, _at_rest(layout), kept)


def _at_rest(layout: Layout) -> dict[str, float]:
    stage, size, parameters = layout.zero_stage, layout.itemsize, layout.parameters
    owned = parameters / layout.data if stage else float(parameters)
    # Stage 3 keeps this rank's part, and the small ones whole beside it.
    weights = size * (owned + layout.small) if stage == 3 else float(size * parameters)
    by_muon = layout.by_muon / parameters
    center = 4 + (4 if layout.config.optimizer.head_moments == "bf16" else 8)
    dim = layout.config.head.embedding_dim
    return {
        "weights": weights,
        "masters": 4 * owned if stage else 0.0,
        # The moving average lies among them; Muon keeps one moment of what it moves.
        "moments": ((12 if layout.config.optimizer.ema_decay else 8) - 4 * by_muon) * owned,
        # The steps that a center has seen and its last positive are 4 bytes each.
        "head": float(sum(head.local_classes * (dim * center + 8) for head in layout.heads.values())),
    }


def _resident(layout: Layout, hardware: Hardware) -> dict[str, float]:
    kinds = {**_at_rest(layout), "buffers": 0.0}
    if (
        layout.teacher.width
    ):  # In bf16 on a GPU; what it works with is less than what the student keeps later.
        kinds["teacher"] = layout.teacher.parameters * (4.0 if hardware.device == "processor" else 2.0)
    if layout.zero_stage == 3:
        # Gathered for their next use in the step, and the buffer that stage 3 never gives back.
        kinds["weights"] += layout.itemsize * min(layout.parameters, LIVE_PARAMETERS)
        kinds["buffers"] = float(layout.sum_itemsize * REDUCE_BUCKET)
        if hardware.device == "processor":
            kinds["buffers"] = float(layout.sum_itemsize * min(REDUCE_BUCKET, layout.parameters))
    if hardware.device == "processor":
        # What the heads work in stays from step to step (Scratch in heads/tiles.py).
        kinds["head"] += _head_scratch(layout)
    return kinds


def gradients_of_one_pass(layout: Layout) -> float:
    """Bytes of gradients that the first of several micro-steps leaves to the next."""
    whole = float(layout.parameters * layout.sum_itemsize)
    if layout.zero_stage <= 1:
        return whole
    owned = whole / layout.data
    if layout.sums_apart:
        return owned  # In one flat piece.
    # Stage 2 keeps whole tensors of which a part is this rank's: in the mean about one more than its part.
    model = layout.config.model
    largest = model.width * max(3 * model.width, model.mlp_width) / layout.tensor * layout.sum_itemsize
    return owned if layout.zero_stage == 3 or layout.data == 1 else min(whole, owned + largest)


def _gradients(layout: Layout) -> tuple[float, float]:
    """Bytes that wait from micro-step to micro-step, and bytes when a backward pass ends."""
    once, again = gradients_of_one_pass(layout), layout.micro_steps > 1
    if layout.zero_stage <= 1:
        return (once if again else 0.0), once
    if layout.zero_stage == 2:
        return (once if again else 0.0), once * (2 if again and not layout.sums_apart else 1)
    return once, once


def _forward(layout: Layout, kept: float) -> dict[str, float]:
    """What lies beside the resident kinds in ZeRO 3's forward pass.

    Parameters are gathered into a flat piece and copied out of it one by one; the piece goes when its last
    one has been used.
    """
    size, parameters = layout.itemsize, layout.parameters
    last = min(parameters, parameters % PREFETCH_BUCKET or PREFETCH_BUCKET)
    # The last piece is used up, or the one before is and the last is on its way.
    before = min(parameters - last, PREFETCH_BUCKET)
    moments = (kept, size * last), (kept * (1 - last / parameters), size * before)
    activations, buffers = max(moments, key=sum)
    return {"activations": activations, "buffers": buffers, "gradients": _gradients(layout)[0]}


def _backward(layout: Layout, hardware: Hardware, kept: float) -> dict[str, float]:
    """What lies beside the resident kinds in the backward pass, when it begins or when gradients travel."""
    stored, growing = _gradients(layout)
    bucket, flattened = _bucket(layout, hardware)
    begins = {
        "activations": kept + _passing_bytes(layout, hardware) * layout.micro_batch,
        "gradients": stored,
        # A processor gives no memory to a buffer before something is written there.
        "buffers": _product_copies(layout) if hardware.device == "processor" else bucket,
    }
    if layout.zero_stage < 3:
        return _greater(begins, {"gradients": growing, "buffers": flattened + bucket})
    # The first bucket is full when a part of the model has still to go back; it is reduced from a copy.
    full = min(REDUCE_BUCKET, layout.parameters)
    copies = 1 + (GLOO_COPY if hardware.device == "processor" else 0.0)
    travelling = {
        "activations": kept * (1 - full / layout.parameters),
        "gradients": stored,
        "buffers": layout.sum_itemsize * full * copies,
    }
    return _greater(begins, travelling)


def _product_copies(layout: Layout) -> float:
    """Bytes of the widest linear's weight gradient and of what a processor's library copies for it.

    It copies both operands and the result (megaregion/processor.py).
    """
    model = layout.config.model
    width, wide = model.width, model.mlp_width / layout.tensor
    rows = layout.micro_batch * model.tokens
    return layout.itemsize * (rows * (width + wide) + 2 * width * wide)


def _bucket(layout: Layout, hardware: Hardware) -> tuple[float, float]:
    """Bytes of the buffer in which gradients are reduced, and of their flat copy while they travel.

    On a processor the buffer holds no more than the gradients do; stage 1 moves them there when the backward
    pass is over, so that they lie in one place or in the other.
    """
    if layout.zero_stage not in (1, 2):
        return 0.0, 0.0
    size = layout.sum_itemsize
    filled = float(min(REDUCE_BUCKET, layout.parameters) * size)
    flattened = filled if layout.data > 1 else 0.0
    if hardware.device == "gpu":
        return float(2 * REDUCE_BUCKET * size), flattened
    return (filled if layout.zero_stage == 2 else 0.0), flattened


def _head_work(layout: Layout) -> float:
    """Rows of all data ranks and their gradients."""
    dim, rows = layout.config.head.embedding_dim, layout.micro_rows
    gathered = rows * dim * (layout.itemsize + (4 if layout.itemsize == 2 else 0))
    return gathered + len(layout.heads) * rows * dim * 4


def _head_scratch(layout: Layout) -> float:
    """Scores of a draw, its centers, and the gradients of those that took part in the step so far."""
    return sum(_scratch(head, layout) for head in layout.heads.values())


def _scratch(head: HeadLayout, layout: Layout) -> float:
    row = layout.config.head.embedding_dim * 4
    if head.waves:
        narrow = layout.itemsize
        held = 1 if head.waves == 1 or layout.ranks == 1 else 2
        scores = narrow * head.rows * head.drawn * held / head.waves
        drawn = head.draws * head.drawn
        # Unit centers and their gradients, of all draws; those of all classes are the matrix.
        several = head.local_classes if head.draws * layout.micro_steps > 1 else 0.0
        gradients = row * ((drawn + several) if head.sampled else head.local_classes)
        return scores + (drawn + head.rows) * row * narrow / 4 + gradients
    tiles = min(head.cut.kept + 1, head.tiles)
    buffers = min(2 if layout.ranks > 1 else 1, head.blocks)
    scores = 4 * buffers * tiles * head.cut.rows * head.cut.classes
    if not head.sampled:
        return scores + head.local_classes * row
    several = head.draws * layout.micro_steps > 1
    # Centers and gradients of a draw; with several draws the first one's stay, and all meet in one matrix.
    return scores + row * (2 * head.drawn + (head.drawn + head.local_classes if several else 0.0))


def _greater(*choices: dict[str, float]) -> dict[str, float]:
    return max(choices, key=lambda kinds: sum(kinds.values()))


def activation_bytes(layout: Layout, hardware: Hardware) -> float:
    """Bytes that autograd keeps of one image and its regions from forward to backward."""
    model, tensor, spread, size = layout.config.model, layout.tensor, layout.spread, layout.itemsize
    regions, tokens = layout.config.data.regions_per_image, model.tokens
    width, own = model.width * size, model.region_weights == "separate"
    # Pixels, the pre-norm's input, the mask, the last norm of the regions.
    outside = 3 * model.image_size**2 * size + tokens * width + regions * (tokens * size + 2 * width)
    each = {level: _kept_of_a_token(layout, hardware, level) for level in RECOMPUTE}
    # Nothing of a region token is made again but in whole blocks; it has a query, and no key and no value.
    ride = each["keep"] - 2 * width / tensor
    rides = {"keep": ride, "cheap": ride, "full": width / spread}
    kept, first = float(outside), model.depth - model.region_layers
    for number, level in enumerate(layout.recompute):
        ends = number == model.depth - 1 and level != "full" and not own and not layout.teacher.width
        # The image tokens of the last block end at keys and values.
        norm = (1 if level == "cheap" else 2) / spread
        kept += tokens * (width * (norm + 3 / tensor) if ends else each[level])
        kept += regions * rides[level] if number >= first else 0.0
        if own and number >= first and level != "full":
            kept += tokens * width * (1 / spread + 3 / tensor)
    if layout.teacher.width:  # Patches before and behind the last norm, and in fp32 both features.
        kept += model.grid**2 * (2 * width + 8 * layout.teacher.width)
    # Own weights read what the last block has written.
    return kept + (tokens * width / spread if own and layout.recompute[-1] != "full" else 0.0)


def _kept_of_a_token(layout: Layout, hardware: Hardware, level: Recompute = "keep") -> float:
    """Bytes of one image token in one block."""
    model, tensor, spread, size = layout.config.model, layout.tensor, layout.spread, layout.itemsize
    kept = float(kept_bytes(model, 1, level, size, tensor, spread))
    if level == "full":
        return kept
    # A processor's attention gives what was read head by head; of several it is copied for the next product.
    copied = hardware.device == "processor" and model.heads > tensor
    return kept + copied * size * model.width / tensor + 4 * (model.heads / tensor + 4 / spread)


def _passing_bytes(layout: Layout, hardware: Hardware) -> float:
    """Bytes of one image's gradients in the first whole block that goes back, beyond what the last one freed.

    With recompute it is also what is computed again.
    """
    model, tensor, size = layout.config.model, layout.tensor, layout.itemsize
    tokens = model.tokens
    gradients = tokens * size * (2 * model.width + 2 * model.mlp_width / tensor)
    if layout.recompute[-1] == "full":
        return gradients + tokens * _kept_of_a_token(layout, hardware)
    freed = (
        0.0
        if model.region_weights == "separate" or layout.teacher.width
        else tokens * size * (2 / layout.spread + 3 / tensor) * model.width
    )
    return max(0.0, gradients - freed)
