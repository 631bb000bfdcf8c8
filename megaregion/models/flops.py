"""Floating-point operations of the encoder and of a head, counted from sizes alone.

A multiply-add is 2 operations. Only matrix products count, as in every published MFU and as
``torch.utils.flop_counter`` has it; norms, activations and rotations move bytes, they hardly compute.

Shapes: P patches, T = 1 + P image tokens, N regions of an image, D width, M MLP width, E embedding width,
R rows of a head, C classes they are scored against.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaregion.config import ModelConfig

CHANNELS = 3


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
    """The map of region tokens to embeddings."""

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
    model: ModelConfig, regions: int, embedding_dim: int, grid: tuple[int, int] | None = None
) -> EncoderFlops:
    """Count one image's forward pass as training takes it (``regions_only``).

    Args:
        model: Sizes of the transformer.
        regions: N; 0 counts the image alone, through all blocks, as export and evaluation run it.
        embedding_dim: E.
        grid: Patches along height and width, where they are not those of ``model.image_size``.
    """
    rows, columns = grid or (model.grid, model.grid)
    patches, width = rows * columns, model.width
    tokens, own = 1 + patches, model.region_weights == "separate"
    qkv, rest = 6 * width * width, 2 * width * width + 4 * width * model.mlp_width
    # With shared weights nobody reads the image tokens of the last block: it ends at keys and values.
    whole = model.depth - (1 if regions and not own else 0)
    block_reads = 4 * tokens * width
    return EncoderFlops(
        patches=2 * patches * CHANNELS * model.patch_size**2 * width,
        linears=tokens * (model.depth * qkv + whole * rest),
        attention=whole * tokens * block_reads,
        region_linears=(
            model.region_layers * (regions * (qkv + rest) + (tokens * qkv if own else 0)) if regions else 0
        ),
        region_attention=model.region_layers * regions * block_reads,
        projection=2 * regions * width * embedding_dim,
    )


def head_flops(rows: float, classes: float, dim: int, kept: float = 1.0) -> float:
    """Forward and backward of R rows against C classes of width E.

    Three products: the scores, and the gradients of rows and of centers. ``kept`` is the share of the scores
    that memory keeps from the sums to the gradient; the rest is computed twice.
    """
    return 2.0 * (4.0 - kept) * rows * classes * dim
