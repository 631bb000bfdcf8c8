"""Memory of one image's activations: what autograd keeps of the modules as they are written.

Tests hold the formulas against the real modules.

Shapes: T image tokens, N regions, D width, M MLP width, H heads.
"""

from __future__ import annotations

from megaregion.models.recompute import LEVELS, Level
from megaregion.planning.hardware import Hardware
from megaregion.planning.layout import Layout


def activation_bytes(layout: Layout, hardware: Hardware) -> float:
    """Bytes that autograd keeps of one image and its regions from forward to backward."""
    model, tensor, spread, size = layout.config.model, layout.tensor, layout.spread, layout.itemsize
    regions, tokens = layout.config.data.regions_per_image, 1 + model.grid**2
    width, own = model.width * size, model.region_weights == "separate"
    # Pixels, the pre-norm's input, the mask, the last norm of the regions.
    outside = 3 * model.image_size**2 * size + tokens * width + regions * (tokens * size + 2 * width)
    each = {level: _kept_of_a_token(layout, hardware, level) for level in LEVELS}
    # A region token's projection is kept whole, and its turned query beside it; nothing of it is made again.
    rides = {
        "keep": each["keep"] + width / tensor,
        "cheap": each["keep"] + width / tensor,
        "full": width / spread,
    }
    kept, first = float(outside), model.depth - model.region_layers
    for number, level in enumerate(layout.levels):
        ends = number == model.depth - 1 and level != "full" and not own
        # The image tokens of the last block end at keys and values.
        norm = (1 if level == "cheap" else 2) / spread
        kept += tokens * (width * (norm + 3 / tensor) if ends else each[level])
        # The first block's region tokens are the class token's, which is kept anyway.
        kept += regions * rides[level] if number > first or (number == first and level != "full") else 0.0
        if own and number >= first and level != "full":
            kept += tokens * width * (1 / spread + 3 / tensor)
    # Own weights read what the last block has written.
    return kept + (tokens * width / spread if own and layout.levels[-1] != "full" else 0.0)


def _kept_of_a_token(layout: Layout, hardware: Hardware, level: Level = "keep") -> float:
    """Bytes of one image token in one block.

    Both norms' inputs and outputs, q, k, v, what was read, the MLP; without what the level makes again.
    """
    model, tensor, spread, size = layout.config.model, layout.tensor, layout.spread, layout.itemsize
    # A processor's attention gives what was read head by head; it is copied for the next product.
    read = 2 if hardware.device == "processor" else 1
    if level == "full":
        return size * model.width / spread
    norms, mlp = (2, 1) if level == "cheap" else (4, 2)
    cut = ((3 + read) * model.width + mlp * model.mlp_width) / tensor
    return size * (norms * model.width / spread + cut) + 4 * (model.heads / tensor + 4 / spread)


def passing_bytes(layout: Layout, hardware: Hardware) -> float:
    """Bytes of one image's gradients in the first whole block that goes back, beyond what the last one freed.

    With recompute it is also what is computed again.
    """
    model, tensor, size = layout.config.model, layout.tensor, layout.itemsize
    tokens = 1 + model.grid**2
    gradients = tokens * size * (2 * model.width + 2 * model.mlp_width / tensor)
    if layout.levels[-1] == "full":
        return gradients + tokens * _kept_of_a_token(layout, hardware)
    freed = (
        0.0
        if model.region_weights == "separate"
        else tokens * size * (2 / layout.spread + 3 / tensor) * model.width
    )
    return max(0.0, gradients - freed)
