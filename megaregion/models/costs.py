"""What the encoder and a head cost, from sizes alone: operations, and activations kept for the backward pass.

A multiply-add is 2 operations. Only matrix products count, as in every published MFU and as
``torch.utils.flop_counter`` has it; norms, activations and rotations move bytes, they hardly compute.

A block's backward pass may compute again what it does not keep:

    keep    everything that autograd wants: 8 D + 2 M numbers a token and block
    cheap   outputs of norms and of the MLP's non-linearity are made again from their inputs, at about 1% of
            the time: 6 D + M numbers
    full    only the block's input is kept and its forward pass runs again: D numbers, a third more time

Shapes: P patches, T image tokens (class token, registers, patches), N regions of an image, D width, M MLP
width, E embedding width, R rows of a head, C classes they are scored against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megaregion.config import ModelConfig, RunConfig

CHANNELS = 3

Recompute = Literal["keep", "cheap", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("keep", "cheap", "full")
GIB = 2**30


@dataclass(frozen=True)
class EncoderFlops:
    """Forward operations of one image and its regions, by what does them."""

    patches: int
    """Patch embedding; its backward has no gradient of the pixels."""
    linears: int
    """Linears of the blocks, image tokens."""
    attention: int
    """Image tokens reading image tokens."""
    region_linears: int
    """Linears of the blocks, region tokens; with weights of their own, also the keys and values they read."""
    region_attention: int
    """Region tokens reading image tokens."""
    projection: int
    """The maps of region tokens to embeddings, and of patches to a teacher's features."""

    @property
    def forward(self) -> int:
        """All of one forward pass."""
        return self.patches + self.differentiated

    @property
    def differentiated(self) -> int:
        """What has a gradient by its input and one by its weights (or by its second operand)."""
        return self.linears + self.attention + self.region_linears + self.region_attention + self.projection

    @property
    def training(self) -> int:
        """Forward and backward of one image; what checkpointing computes again is no work done."""
        return 2 * self.patches + 3 * self.differentiated


def encoder_flops(
    model: ModelConfig,
    regions: int,
    embedding_dim: int,
    grid: tuple[int, int] | None = None,
    teacher_width: int = 0,
) -> EncoderFlops:
    """Count one image's forward pass as training takes it (``regions_only`` but with a teacher).

    Args:
        model: Sizes of the transformer.
        regions: N; 0 counts the image alone, through all blocks, as export and evaluation run it.
        embedding_dim: E.
        grid: Patches along height and width, where they are not those of ``model.image_size``.
        teacher_width: C of the teacher whose features of patches are learned, 0 without one.
    """
    rows, columns = grid or (model.grid, model.grid)
    patches, width = rows * columns, model.width
    tokens, own = model.leading + patches, model.region_weights == "separate"
    qkv, rest = 6 * width * width, 2 * width * width + 4 * width * model.mlp_width
    # With shared weights only a teacher's loss reads the image tokens of the last block.
    whole = model.depth - (1 if regions and not own and not teacher_width else 0)
    block_reads = 4 * tokens * width
    return EncoderFlops(
        patches=2 * patches * CHANNELS * model.patch_size**2 * width,
        linears=tokens * (model.depth * qkv + whole * rest),
        attention=whole * tokens * block_reads,
        region_linears=(
            model.region_layers * (regions * (qkv + rest) + (tokens * qkv if own else 0)) if regions else 0
        ),
        region_attention=model.region_layers * regions * block_reads,
        projection=2 * width * (regions * embedding_dim + patches * teacher_width),
    )


def head_flops(rows: float, classes: float, dim: int, kept: float = 1.0) -> float:
    """Forward and backward of R rows against C classes of width E.

    Three products: the scores, and the gradients of rows and of centers. ``kept`` is the share of the scores
    that memory keeps from the sums to the gradient; the rest is computed twice.
    """
    return 2.0 * (4.0 - kept) * rows * classes * dim


def kept_bytes(
    model: ModelConfig, tokens: int, recompute: Recompute, item: int, tensor: int = 1, spread: int = 1
) -> int:
    """Activations that one block keeps for its backward pass, in bytes.

    Args:
        model: Sizes of the transformer.
        tokens: Tokens of the micro-batch that pass through the block.
        recompute: What is kept and what not.
        item: Bytes of a number.
        tensor: Ranks that share the heads and the MLP.
        spread: Ranks that share the tokens between the linears.
    """
    width, mlp = model.width, model.mlp_width
    numbers = {
        "keep": 4 * width / spread + (4 * width + 2 * mlp) / tensor,
        "cheap": 2 * width / spread + (4 * width + mlp) / tensor,
        "full": width / spread,
    }[recompute]
    return round(tokens * numbers * item)


def choose_recompute(
    model: ModelConfig, tokens: int, item: int, budget: float, tensor: int = 1, spread: int = 1
) -> tuple[Recompute, ...]:
    """What each block computes again to fit a budget at the least time; all full where nothing fits.

    The budget is in bytes for what all blocks keep, 0 for no bound; the rest as in :func:`kept_bytes`.
    """
    if budget <= 0:
        return everywhere("keep", model.depth)
    keep, cheap, full = (
        kept_bytes(model, tokens, recompute, item, tensor, spread) for recompute in RECOMPUTE
    )
    # The last blocks' activations live the shortest: they are the ones that keep the most.
    if (spare := budget - model.depth * cheap) >= 0:
        kept = min(model.depth, int(spare // max(1, keep - cheap)))
        return everywhere("cheap", model.depth - kept) + everywhere("keep", kept)
    # A block that runs again has all it keeps in memory for a while, beside the others' inputs.
    spare = budget - cheap - model.depth * full
    kept = max(0, int(spare // max(1, cheap - full)))
    return everywhere("full", model.depth - kept) + everywhere("cheap", kept)


def everywhere(recompute: Recompute, blocks: int) -> tuple[Recompute, ...]:
    """The same for so many blocks."""
    return (recompute,) * blocks


def recompute_of_run(config: RunConfig, micro_batch: int, image_size: int) -> tuple[Recompute, ...]:
    """What each block computes again, by train.recompute and train.activation_gib; the size in pixels."""
    if config.train.recompute:
        return everywhere("full", config.model.depth)
    return choose_recompute(
        config.model,
        micro_batch * (config.model.leading + (image_size // config.model.patch_size) ** 2),
        config.train.value_bytes,
        config.train.activation_gib * GIB,
        config.parallel.tensor,
        config.parallel.tensor if config.parallel.tokens_cut else 1,
    )
