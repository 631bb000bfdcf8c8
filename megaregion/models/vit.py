"""The encoder: one token a patch, a class token, and region tokens that ride along.

Without regions it is transformers' ``MLCDVisionModel``. A region token is a class token that sees only
its region: it starts as a copy of the class token's state, or as a learned query, goes through the last
``region_layers`` blocks with the class token's angle, and reads the keys and values of its own patches. Image
tokens never see region tokens, so patch features are the same, bit for bit, with and without regions.

The modules know no rank. Inside the blocks tokens are rows of a matrix: all B T image tokens or all B N
region tokens, or this rank's part of them where sequence parallelism puts another ``Stream`` in. Where tensor
parallelism cuts the linears, H counts the heads of this rank.

A register is a token of no place that takes part in the image's attention. Region tokens read neither
registers nor the class token: both hold what lies outside of the region.

Shapes: B images of H x W pixels, P patches (row by row), T image tokens (class token, registers, patches),
N regions an image, R rows of tokens, D width, H heads, d head width, E embedding width. Where the images of a
batch share one sequence, queries, keys and values have a B of 1, and S counts the tokens of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaregion.config import ModelConfig
from megaregion.errors import UserError
from megaregion.models.costs import Recompute, everywhere
from megaregion.models.layers import (
    AGAIN,
    Linear,
    PatchEmbedding,
    activated,
    apart,
    norm_beside,
    only_products_kept,
    packed_attention,
    recomputed,
)
from megaregion.models.rotary import Packing, Rotation, packed_rotation, rotation, split_and_turn


class Stream:
    """The residual stream: rows between the blocks' linears; all of them, as one process has them.

    Sequence parallelism puts another in its place, under which norms and residual sums see only this rank's
    rows, and the linears take and give such parts. A part may end in rows that pad it.
    """

    def scatter(self, tokens: Tensor) -> Tensor:
        """This rank's rows [R, D] of tokens that every rank has whole, [B, T, D]."""
        return tokens.flatten(0, 1)

    def gather(self, rows: Tensor, images: int, tokens: int) -> Tensor:
        """All ranks' rows [R, D] as tokens [B, T, D], for computations that every rank repeats."""
        return rows.view(images, tokens, -1)


class Attention(nn.Module):
    """Multi-head attention with 2D rotary positions and one fused projection.

    The rows of ``qkv`` are laid out (H, 3, d): cut into equal parts, each holds whole heads, so the module
    need not know how many heads its linears have.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)

    def project(self, image: Tensor, angles: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of normed image tokens [R, D], [B, H, T, d] each; q and k turned."""
        return split_and_turn(self._by_heads(self.qkv(image), angles.sequences, len(angles.cos)), angles)

    def project_regions(self, regions: Tensor, angles: Rotation, count: int) -> Tensor:
        """Queries of normed region tokens [R, D], turned by the class token's angle, [B, H, N, d]."""
        tokens = angles.images * count
        fused = self._by_heads(self.qkv(regions), tokens, 1)
        query, _, _ = split_and_turn(fused, angles.of_class_tokens(tokens))
        return query.squeeze(2).unflatten(0, (angles.images, count)).transpose(1, 2)

    def _by_heads(self, qkv: Tensor, images: int, tokens: int) -> Tensor:
        """The fused projection of all tokens, without rows that pad a part, as [B, tokens, H, 3, d]."""
        if len(qkv) > images * tokens:
            qkv = qkv[: images * tokens]
        return qkv.view(images, tokens, -1, 3, self.head_dim)

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Let queries read the image; returns what this rank's heads read, [B Q, H d], for ``out``.

        Args:
            query: Queries, [B, H, Q, d].
            key: Keys of the image's tokens, [B, H, T, d].
            value: Values of the image's tokens, [B, H, T, d].
            mask: Added to the scores, [B, 1, Q, T]; 0 where a query sees a token, -inf where not.
            packing: How images share one sequence, if they do; shapes are then those of ``packed_attention``.
        """
        if packing is None:
            read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            read = packed_attention(query, key, value, mask, packing)
        return read.transpose(1, 2).flatten(2).flatten(0, 1)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    # Not a call of the module: in a backward pass ZeRO 3 would take it for the next one's forward pass.
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _sum(written: Tensor, tokens: Tensor, kept: Tensor | None, branch: int) -> Tensor:
    """Add tokens to what a linear has just written, in its place: the sum needs no memory of its own.

    A linear of a matrix gives no view; the gradient of a sum into a view would be copied whole. ``kept`` are
    factors of a block's two branches, [R, 2]: attention, MLP.
    """
    if kept is not None:
        return torch.addcmul(tokens, written, kept[:, branch, None])
    # A compiler finds the place by itself, and must not see it changed where it makes a part again.
    return written + tokens if torch.compiler.is_compiling() else written.add_(tokens)


class MLP(nn.Module):
    """Two linears with a non-linearity between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)
        self.quick = config.activation == "quick_gelu"

    def forward(self, x: Tensor, cheap: bool = False) -> Tensor:
        """Map tokens [R, D] to [R, D]; if ``cheap``, backward makes the non-linearity's result again."""
        hidden, bias = apart(self.fc1, x)
        active = activated(hidden, bias, self.quick)
        again = partial(activated, bias=None, quick=self.quick)
        with recomputed(active, hidden, again) if cheap else nullcontext():
            y: Tensor = self.fc2(active)
        return y


class Block(nn.Module):
    """A pre-norm block; ``region`` holds the region tokens' own weights, if they have any.

    ``cheap``: what norms and the non-linearity give to image tokens is made again in the backward pass.
    """

    def __init__(self, config: ModelConfig, separate_regions: bool = False) -> None:
        super().__init__()
        self.cheap = False
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.region = Block(config) if separate_regions else None

    def forward(
        self,
        image: Tensor,
        regions: Tensor | None,
        angles: Rotation,
        mask: Tensor | None,
        image_ends_here: bool = False,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block; returns the image tokens and the region tokens after it.

        Region tokens go through calls of their own: the rounding of a matrix product depends on how many rows
        it has, and image tokens must not change by a bit when regions come along.

        Args:
            image: Image tokens, [R, D].
            regions: Region tokens, [R, D], or None where no region rides along.
            angles: Angles of the image's tokens.
            mask: What each region sees of its image, [B, 1, N, T], 0 or -inf; None without regions.
            image_ends_here: Nobody reads the image tokens after this block: return those that came in.
            kept: What stochastic depth leaves of each row's two residual branches; None leaves all.
        """
        if self.cheap and torch.compiler.is_compiling():
            return only_products_kept(self._run, image, regions, angles, mask, image_ends_here, kept)
        return self._run(image, regions, angles, mask, image_ends_here, kept)

    def _run(
        self,
        image: Tensor,
        regions: Tensor | None,
        angles: Rotation,
        mask: Tensor | None,
        image_ends_here: bool,
        kept: Kept | None,
    ) -> tuple[Tensor, Tensor | None]:
        of_image, of_regions = (None, None) if kept is None else kept
        image, normed = norm_beside(image, self.norm1)
        with self._renormed(normed, image, self.norm1):
            query, key, value = self.attention.project(normed, angles)
        if regions is not None and self.region is None:
            regions = self._read(regions, key, value, angles, mask, of_regions)
        if not (image_ends_here and self.region is None):
            read = self.attention.mix(query, key, value, packing=angles.packing)
            image, normed = self._attended(read, image, of_image)
            with self._renormed(normed, image, self.norm2):
                image = _sum(self.mlp(normed, self.cheap), image, of_image, 1)
        if regions is not None and self.region is not None:
            # Own weights read what the block has written, or the last block's would get no gradient.
            _, key, value = self.region.attention.project(self.region.norm1(image), angles)
            regions = self.region._read(regions, key, value, angles, mask, of_regions)
        return image, regions

    def _renormed(self, normed: Tensor, image: Tensor, norm: nn.LayerNorm) -> AbstractContextManager[object]:
        """Let autograd keep a norm's input in the place of its output, if the block is cheap."""
        return recomputed(normed, image, partial(_norm, norm)) if self.cheap else nullcontext()

    def _read(
        self,
        regions: Tensor,
        key: Tensor,
        value: Tensor,
        angles: Rotation,
        mask: Tensor | None,
        kept: Tensor | None,
    ) -> Tensor:
        """Region tokens after they have read the image's keys and values, [R, D]."""
        assert mask is not None
        regions, normed = norm_beside(regions, self.norm1)
        query = self.attention.project_regions(normed, angles, mask.shape[2])
        read = self.attention.mix(query, key, value, mask, angles.packing)
        regions, normed = self._attended(read, regions, kept)
        return _sum(self.mlp(normed), regions, kept, 1)

    def _attended(self, read: Tensor, tokens: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [R, D] with what they read, and normed for the MLP."""
        if kept is None:
            mixed, bias = apart(self.attention.out, read)
        else:  # The bias is weighed row by row, as the rest of the branch.
            mixed, bias = self.attention.out(read), None
        return norm_beside(_sum(mixed, tokens, kept, 0), self.norm2, bias)


class Kept(NamedTuple):
    """Factors of the residual branches of one block: 0 where one is dropped, more than 1 where not."""

    image: Tensor
    """Of image tokens, [R, 2], attention and MLP."""
    regions: Tensor
    """Of region tokens, [R, 2]: those of their images."""


class Tokens(NamedTuple):
    """What the transformer gives; neither part has gone through the last norm (see ``pool``)."""

    image: Tensor
    """Class token, registers, patches, [B, T, D]; [B, 0, D] if only regions were asked for."""
    regions: Tensor | None
    """Region tokens, [B, N, D]; None if no regions were given."""


class VisionTransformer(nn.Module):
    """Image tokens and region tokens of a batch; weights are set by ``initialise`` or loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stream = Stream()
        self.first_region_block = config.depth - config.region_layers
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.class_pos_emb = nn.Parameter(torch.empty(1, config.head_dim // 2))
        registers = torch.empty(config.registers, config.width)
        self.register_tokens = nn.Parameter(registers) if config.registers else None
        learned = config.region_start == "learned"
        self.region_query = nn.Parameter(torch.empty(config.width)) if learned else None
        self.pre_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        separate = config.region_weights == "separate"
        self.blocks = nn.ModuleList(
            Block(config, separate_regions=separate and index >= self.first_region_block)
            for index in range(config.depth)
        )
        self.post_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.recompute = everywhere("keep", config.depth)

    @property
    def recompute(self) -> tuple[Recompute, ...]:
        """What each block's backward pass computes again instead of keeping."""
        return self._recompute

    @recompute.setter
    def recompute(self, blocks: tuple[Recompute, ...]) -> None:
        self._recompute = blocks
        for block, own in zip(self.blocks, blocks, strict=True):
            block.cheap = own == "cheap"  # type: ignore[assignment]

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        regions_only: bool = False,
        grids: tuple[tuple[int, int], ...] | None = None,
        kept: Tensor | None = None,
    ) -> Tokens:
        """Image tokens and region tokens, before the last norm.

        Args:
            images: Normalised images, [B, 3, H, W]; H and W are multiples of the patch size.
            visible: True where a region covers a patch, [B, N, P]; every region sees at least one.
            regions_only: Skip what only the image's tokens need of the last block.
            grids: Rows and columns of each image's patches where images share one sequence of S tokens, each
                image's class token in front of its patches. Images are then the patches of all, [P, 3, p, p],
                visible is [N, P], and image tokens come out as [1, S, D].
            kept: What stochastic depth leaves of each image's residual branches, [images, 2 L], two a block;
                an image's regions go with it. None, as in evaluation, leaves all.

        Raises:
            UserError: The patch size does not divide the images.
            ValueError: The mask does not fit the images.
        """
        angles, image = self._embed(images, grids)
        mask = None if visible is None else _mask(visible, image, angles.packing, self.config.leading)
        sequences, tokens, width = image.shape
        image, regions, last = self.stream.scatter(image), None, len(self.blocks) - 1
        leaves = self._by_rows(kept, angles, tokens, 0 if visible is None else visible.shape[-2])
        for index, block in enumerate(self.blocks):
            if visible is not None and index == self.first_region_block:
                first: Tensor | None = self.region_query
                if first is None:
                    first = angles.class_tokens(self.stream.gather(image, sequences, tokens))
                # Copies: kernels walk along rows, and ZeRO 3 takes a parameter's data away before backward.
                regions = first.expand(angles.images, visible.shape[-2], -1).contiguous()
                regions = self.stream.scatter(regions)
            image_ends = regions_only and visible is not None and index == last
            inputs = (image, regions, angles, mask, image_ends, leaves[index])
            if self._recompute[index] == "full" and torch.is_grad_enabled():
                image, regions = checkpoint(block, *inputs, **AGAIN)
            else:
                image, regions = block(*inputs)
        if visible is not None and regions is not None:
            regions = self.stream.gather(regions, angles.images, visible.shape[-2])
        if regions_only:
            return Tokens(image.new_empty(sequences, 0, width), regions)
        return Tokens(self.stream.gather(image, sequences, tokens), regions)

    def _by_rows(
        self, kept: Tensor | None, angles: Rotation, tokens: int, regions: int
    ) -> Sequence[Kept | None]:
        """Each block's factors of rows, of those of images [images, 2 L], of T tokens and N regions each."""
        if kept is None:
            return [None] * len(self.blocks)
        kept, packing = kept.to(self.class_embedding.dtype), angles.packing
        spread = [kept[:, None].expand(-1, count, -1) for count in (tokens, regions)]
        if packing is not None:
            spread[0] = kept.index_select(0, packing.places // max(packing.lengths))[None]
        parts = (self.stream.scatter(rows).split(2, dim=1) for rows in spread)
        return [Kept(*own) for own in zip(*parts, strict=True)]

    def _embed(self, images: Tensor, grids: tuple[tuple[int, int], ...] | None) -> tuple[Rotation, Tensor]:
        """The angles of all tokens, and the tokens that enter the first block, [B, T, D] or [1, S, D]."""
        # A view of the parameter, not the parameter: ZeRO 3 takes a parameter's data away before backward.
        class_angle, theta = self.class_pos_emb[0], self.config.rope_theta
        registers = self.register_tokens
        if grids is None:
            angles = rotation(class_angle, *self._grid(images), theta, len(images), self.config.registers)
            own = [self.class_embedding.expand(len(images), 1, -1)]
            own += [] if registers is None else [registers.expand(len(images), -1, -1)]
            return angles, self.pre_norm(torch.cat((*own, self.patch_embedding(images)), dim=1))
        patches = self.patch_embedding(images)[:, 0]
        if len(patches) != (held := sum(rows * columns for rows, columns in grids)):
            raise ValueError(f"grids hold {held} patches, got {len(patches)}")
        angles = packed_rotation(class_angle, grids, theta, self.config.registers)
        assert angles.packing is not None
        return angles, self.pre_norm(angles.packing.spread(patches, self.class_embedding, registers)[None])

    def pool(self, tokens: Tensor) -> Tensor:
        """Norm class tokens or region tokens [..., D] into features [..., D]."""
        features: Tensor = self.post_norm(tokens)
        return features

    def _grid(self, images: Tensor) -> tuple[int, int]:
        (height, width), patch = images.shape[-2:], self.config.patch_size
        if height % patch or width % patch or not height or not width:
            raise UserError(
                f"image height and width must be multiples of model.patch_size {patch}, got {height} x "
                f"{width}; use {max(1, height // patch) * patch} x {max(1, width // patch) * patch}"
            )
        return height // patch, width // patch


def _mask(visible: Tensor, image: Tensor, packing: Packing | None, leading: int = 1) -> Tensor:
    """Turn what regions see into what is added to their scores; nobody sees the ``leading`` tokens.

    [B, N, P] becomes [B, 1, N, T]; of packed images [N, P] becomes [images, 1, N, columns].
    """
    # One sequence has no images to tell apart.
    stacked, patches = [len(image)], image.shape[1] - leading
    if packing is not None:
        stacked, patches = [], len(packing.patches)
    *found, _, seen_patches = visible.shape
    if (found, seen_patches) != (stacked, patches):
        wanted = ", ".join(map(str, [*stacked, "regions", patches]))
        raise ValueError(f"visible must have the shape [{wanted}], got {list(visible.shape)}")
    if packing is not None:
        nothing = visible.new_zeros(leading, len(visible))
        seen = packing.spread(visible.T, nothing[0], nothing[1:]).index_select(0, packing.columns)
        visible = seen.unflatten(0, (len(packing.lengths), -1)).transpose(1, 2)[..., leading:]
    images, regions, patches = visible.shape
    # A GPU's kernel wants rows that begin at multiples of 16, and copies others in every block.
    columns = -(-(leading + patches) // 16) * 16
    mask = image.new_full((images, 1, regions, columns), float("-inf"))[..., : leading + patches]
    mask[:, 0, :, leading:].masked_fill_(visible, 0.0)
    return mask


class RegionEncoder(nn.Module):
    """One embedding for each region of each image; the transformer alone is what gets exported."""

    def __init__(self, config: ModelConfig, embedding_dim: int, teacher_width: int = 0) -> None:
        super().__init__()
        self.vit = VisionTransformer(config)
        self.projection = nn.Linear(config.width, embedding_dim, bias=False)
        self.to_teacher = nn.Linear(config.width, teacher_width) if teacher_width else None

    def forward(
        self,
        images: Tensor,
        visible: Tensor,
        grids: tuple[tuple[int, int], ...] | None = None,
        kept: Tensor | None = None,
        taught: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed regions, not normalised, [B, N, E]; arguments as of :meth:`VisionTransformer.forward`.

        With a teacher's features of the patches, [B, P, C], also how far the own are from them: 1 - cosine,
        its mean over an image's patches, summed over images, 0-d.
        """
        tokens = self.vit(images, visible, regions_only=taught is None, grids=grids, kept=kept)
        embeddings: Tensor = self.projection(self.vit.pool(tokens.regions))
        if taught is None or self.to_teacher is None:
            return embeddings
        own = self.to_teacher(self.vit.pool(tokens.image[:, self.vit.config.leading :]))
        return embeddings, (1 - F.cosine_similarity(own.float(), taught.float(), dim=-1)).mean(1).sum()


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: on matrices, not on biases, norms and single tokens."""
    return parameter.dim() >= 2 and not name.endswith(("class_pos_emb", "register_tokens"))


def learning_rate_factor(name: str, config: ModelConfig, decay: float) -> float:
    """Factor of a parameter's learning rate: ``decay`` to the number of blocks above it.

    What comes before the blocks counts as one more below them; norms and projections behind them have 1.
    """
    before, _, rest = name.partition("blocks.")
    above = config.region_layers if before.endswith("region_query") else config.depth
    if rest:
        above = config.depth - 1 - int(rest.partition(".")[0])
    return 1.0 if before.startswith(("projection", "to_teacher", "vit.post_norm")) else float(decay**above)


Cut = Literal["column", "row"]
CUTS: dict[str, Cut] = {"qkv": "column", "out": "row", "fc1": "column", "fc2": "row"}
"""How ranks may share a linear. column: each holds some outputs (rows of the weight, and their biases); row:
some inputs (columns of the weight), and the sum over ranks plus one replicated bias is the output."""


def tensor_parallel_plan(model: nn.Module) -> dict[str, Cut]:
    """The cut of every linear that ranks may share, by module name; all else is whole on every rank."""
    return {
        name: CUTS[name.rpartition(".")[2]]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in CUTS
    }


def matrices(name: str, config: ModelConfig) -> tuple[int, int] | None:
    """How many matrices a block's weight holds, and how many rows of each in turn; None of all else."""
    linear = name.removesuffix(".weight").rpartition(".")[2]
    if linear not in CUTS:
        return None
    return (3, config.head_dim) if linear == "qkv" else (1, 1)


def partial_gradients(model: nn.Module, tokens_cut: bool) -> list[str]:
    """Names of the whole parameters to which each rank sends back only what its own heads or tokens do.

    The sum over ranks is their gradient. ``tokens_cut``: the tokens between linears are cut too.
    """
    norms = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias") if tokens_cut else ()
    return [name for name, _ in model.named_parameters() if name.endswith(("class_pos_emb", *norms))]
