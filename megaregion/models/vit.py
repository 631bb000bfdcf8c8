"""The encoder: one token a patch, a class token, and region tokens that ride along.

Without regions it is transformers' ``MLCDVisionModel``. A region token is a class token that sees only
its region: it starts as a copy of the class token's state, goes through the last ``region_layers`` blocks
with the class token's angle, and reads the keys and values of its own patches. Image tokens never see
region tokens, so patch features are the same, bit for bit, with and without regions.

The modules know no rank. Where sequence parallelism puts another ``Stream`` in, [B, T, D] between the linears
of the blocks stands for this rank's part of the tokens, [rows, D]; where the linears are cut, H counts the
heads of this rank.

Shapes: B images of H x W pixels, P patches (row by row), T = 1 + P image tokens (class token first),
N regions an image, D width, H heads, d head width, E embedding width, S tokens of all images in one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaregion.config import Activation, ModelConfig
from megaregion.errors import UserError
from megaregion.models.linear import Linear
from megaregion.models.recompute import Level, everywhere, remade
from megaregion.models.rotary import Rotation, packed_rotation, rotation, split_and_turn, turn

CHANNELS = 3


class Stream:
    """Tokens whole, as one process has them.

    Sequence parallelism puts another in its place, under which what lies between the linears (norms, sums)
    sees only this rank's part of the tokens, [rows, D], and the linears take and give such parts. A part may
    end in rows that pad it.
    """

    def cut(self, tokens: Tensor) -> Tensor:
        """This rank's part of tokens that every rank has whole, [B, T, D]."""
        return tokens

    def join(self, part: Tensor, images: int, tokens: int) -> Tensor:
        """All ranks' parts as [B, T, D], for computations that every rank repeats.

        Args:
            part: This rank's part.
            images: B.
            tokens: T.
        """
        return part


class PatchEmbedding(nn.Module):
    """A linear map of each patch's pixels, without bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.width, CHANNELS, self.patch, self.patch))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to patch tokens [B, P, D] in the weight's type."""
        batch, channels, height, width = images.shape
        rows, columns = height // self.patch, width // self.patch
        patches = images.to(self.weight.dtype).view(batch, channels, rows, self.patch, columns, self.patch)
        # Patches do not overlap: the convolution is one matrix product, which every backend does well.
        pixels = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        return F.linear(pixels, self.weight.flatten(1))


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
        """Project the image's tokens.

        Args:
            image: Normalised image tokens, [B, T, D].
            angles: Angles of the T tokens.

        Returns:
            Queries, keys and values, [B, H, T, d] each; queries and keys turned.
        """
        return split_and_turn(self._by_heads(self.qkv(image), angles.images, len(angles.cos)), angles)

    def project_regions(self, regions: Tensor, angles: Rotation, shape: tuple[int, int]) -> Tensor:
        """Project region tokens to queries, turned by the class token's angle.

        Args:
            regions: Normalised region tokens, [B, N, D].
            angles: Angles of the image.
            shape: B and N.

        Returns:
            Queries, [B, H, N, d].
        """
        query = self._by_heads(self.qkv(regions), *shape)[:, :, :, 0].transpose(1, 2)
        return turn(query, angles.class_angle.cos(), angles.class_angle.sin())

    def _by_heads(self, qkv: Tensor, images: int, tokens: int) -> Tensor:
        """The fused projection of all tokens, without rows that pad a cut, as [B, tokens, H, 3, d]."""
        rows = qkv.flatten(0, -2)
        if len(rows) > images * tokens:
            rows = rows[: images * tokens]
        return rows.view(images, tokens, -1, 3, self.head_dim)

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Let queries read the image.

        Args:
            query: Queries, [B, H, Q, d].
            key: Keys of the image's tokens, [B, H, T, d].
            value: Values of the image's tokens, [B, H, T, d].
            mask: Added to the scores, [B, 1, Q, T]; 0 where a query sees a token, -inf where not.
            lengths: Tokens of each image where images share one sequence; keys are then [1, H, S, d] and
                masks [1, 1, Q, S], S the tokens of all; queries are too, or [images, H, Q, d] with a mask.

        Returns:
            What the queries read, projected, [B, Q, D].
        """
        if lengths is None:
            read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            read = packed_attention(query, key, value, mask, lengths)
        out: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: tuple[int, ...]
) -> Tensor:
    """Let every image's queries read that image's tokens.

    On a GPU in half precision one kernel takes all images (flash attention over their boundaries); elsewhere
    each image is a call of its own, which costs no operation that a mask would throw away.

    Args:
        query: Queries of the image tokens, [1, H, S, d]; with a mask those of regions, [I, H, N, d].
        key: Keys, [1, H, S, d].
        value: Values, [1, H, S, d].
        mask: What each region sees, [1, 1, N, S], 0 or -inf; None for image tokens.
        lengths: Tokens of each image, in their order in the sequence.

    Returns:
        What was read, in the shape of the queries.
    """
    if mask is None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _by_boundaries(query, key, value, lengths)
    keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    if mask is None:
        own = zip(query.split(lengths, dim=2), keys, values, strict=True)
        return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in own], dim=2)
    parts = zip(query.split(1), keys, values, mask.split(lengths, dim=3), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=m) for q, k, v, m in parts])


def _by_boundaries(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(query.device, non_blocking=True)
    # The kernel wants [S, H, d].
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    read = varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths))
    assert isinstance(read, Tensor)
    return read.transpose(0, 1)[None]


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid form of gelu, as in CLIP's first weights."""
    return x * torch.sigmoid(1.702 * x)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    # Not a call of the module: in a backward pass ZeRO 3 would take it for the next one's forward pass.
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """Two linears with a non-linearity between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, cheap: bool = False) -> Tensor:
        """Map tokens [..., D] to [..., D].

        Args:
            x: Tokens.
            cheap: Compute the non-linearity again in the backward pass instead of keeping its result.
        """
        hidden: Tensor = self.fc1(x)
        active = self.activation(hidden)
        with remade(active, hidden, self.activation) if cheap else nullcontext():
            y: Tensor = self.fc2(active)
        return y


class Block(nn.Module):
    """A pre-norm block; ``region`` holds the region tokens' own weights, if they have any.

    Attributes:
        cheap: Make what norms and the non-linearity give to image tokens again in the backward pass.
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
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block.

        Region tokens go through calls of their own: the rounding of a matrix product depends on how many
        rows it has, and image tokens must not change by a bit when regions come along.

        Args:
            image: Image tokens, [B, T, D].
            regions: Region tokens, [B, N, D], or None where no region rides along.
            angles: Angles of the image's tokens.
            mask: What each region sees, [B, 1, N, T], 0 or -inf; None without regions.
            image_ends_here: Nobody reads the image tokens after this block: return those that came in.

        Returns:
            Image tokens and region tokens after the block.
        """
        normed = self.norm1(image)
        with remade(normed, image, partial(_norm, self.norm1)) if self.cheap else nullcontext():
            query, key, value = self.attention.project(normed, angles)
        if regions is not None and self.region is None:
            regions = self._read(regions, key, value, angles, mask)
        if not (image_ends_here and self.region is None):
            # Into what the linears have just written: the sums need no memory of their own.
            image = self.attention.mix(query, key, value, lengths=angles.lengths).add_(image)
            image = self._mlp(image).add_(image)
        if regions is not None and self.region is not None:
            # Own weights read what the block has written, or the last block's would get no gradient.
            _, key, value = self.region.attention.project(self.region.norm1(image), angles)
            regions = self.region._read(regions, key, value, angles, mask)
        return image, regions

    def _mlp(self, image: Tensor) -> Tensor:
        normed = self.norm2(image)
        with remade(normed, image, partial(_norm, self.norm2)) if self.cheap else nullcontext():
            return self.mlp(normed, self.cheap)

    def _read(
        self, regions: Tensor, key: Tensor, value: Tensor, angles: Rotation, mask: Tensor | None
    ) -> Tensor:
        assert mask is not None
        images = angles.images if angles.lengths is None else len(angles.lengths)
        query = self.attention.project_regions(self.norm1(regions), angles, (images, mask.shape[2]))
        regions = self.attention.mix(query, key, value, mask, angles.lengths).add_(regions)
        return self.mlp(self.norm2(regions)).add_(regions)


class Tokens(NamedTuple):
    """What the transformer gives; neither part has gone through the last norm (see ``pool``)."""

    image: Tensor
    """Class token, then patches, [B, 1 + P, D]; [B, 0, D] if only regions were asked for."""
    regions: Tensor | None
    """Region tokens, [B, N, D]; None if no regions were given."""


class VisionTransformer(nn.Module):
    """Image tokens and region tokens of a batch; weights are set by ``initialise`` or loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stream = Stream()
        self._levels = everywhere("keep", config.depth)
        self.first_region_block = config.depth - config.region_layers
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.class_pos_emb = nn.Parameter(torch.empty(1, config.head_dim // 2))
        self.pre_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        separate = config.region_weights == "separate"
        self.blocks = nn.ModuleList(
            Block(config, separate_regions=separate and index >= self.first_region_block)
            for index in range(config.depth)
        )
        self.post_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    @property
    def levels(self) -> tuple[Level, ...]:
        """What each block's backward pass computes again instead of keeping."""
        return self._levels

    @levels.setter
    def levels(self, levels: tuple[Level, ...]) -> None:
        self._levels = levels
        for block, level in zip(self.blocks, levels, strict=True):
            block.cheap = level == "cheap"  # type: ignore[assignment]

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        regions_only: bool = False,
        grids: tuple[tuple[int, int], ...] | None = None,
    ) -> Tokens:
        """Encode images, and regions of them.

        Args:
            images: Normalised images, [B, 3, H, W]; H and W are multiples of the patch size.
            visible: True where a region covers a patch, [B, N, P]; every region sees at least one.
            regions_only: Skip what only the image's tokens need of the last block.
            grids: Rows and columns of each image's patches where images share one sequence of S tokens, each
                image's class token in front of its patches. Images are then the patches of all, [P, 3, p, p],
                visible is [N, P], and image tokens come out as [1, S, D].

        Returns:
            Image tokens and region tokens, before the last norm.

        Raises:
            UserError: The patch size does not divide the images.
            ValueError: The mask does not fit the images.
        """
        # A view of the parameter, not the parameter: ZeRO 3 takes a parameter's data away before backward.
        class_angle, theta = self.class_pos_emb[0], self.config.rope_theta
        if grids is None:
            angles = rotation(class_angle, *self._grid(images), theta, len(images))
            image: Tensor = self.patch_embedding(images)
            image = torch.cat((self.class_embedding.expand(len(image), 1, -1), image), dim=1)
        else:
            angles = packed_rotation(class_angle, grids, theta)
            image = self._one_sequence(self.patch_embedding(images)[:, 0], grids)
        image = self.pre_norm(image)
        mask = None if visible is None else _mask(visible, image, grids)
        whole = image.shape
        image, regions = self.stream.cut(image), None
        for index, block in enumerate(self.blocks):
            if visible is not None and index == self.first_region_block:
                classes = _class_tokens(self.stream.join(image, *whole[:2]), angles.lengths)
                riders = classes.expand(-1, visible.shape[-2], -1)
                regions = self.stream.cut(riders)
            image_ends = regions_only and visible is not None and index == len(self.blocks) - 1
            inputs = (image, regions, angles, mask, image_ends)
            if self._levels[index] == "full" and torch.is_grad_enabled():
                image, regions = checkpoint(block, *inputs, use_reentrant=False)
            else:
                image, regions = block(*inputs)
        if regions is not None:
            regions = self.stream.join(regions, *riders.shape[:2])
        if regions_only:
            return Tokens(image.new_empty(whole[0], 0, whole[2]), regions)
        return Tokens(self.stream.join(image, *whole[:2]), regions)

    def _one_sequence(self, patches: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
        """Put each image's class token in front of its patches, [P, D] to [1, S, D]."""
        counts = [rows * columns for rows, columns in grids]
        if len(patches) != sum(counts):
            raise ValueError(f"grids hold {sum(counts)} patches, got {len(patches)}")
        own = self.class_embedding[None]
        return torch.cat([part for image in patches.split(counts) for part in (own, image)])[None]

    def pool(self, tokens: Tensor) -> Tensor:
        """Norm class tokens or region tokens [..., D] into features [..., D]."""
        features: Tensor = self.post_norm(tokens)
        return features

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch or not height or not width:
            raise UserError(
                f"image height and width must be multiples of model.patch_size {patch}, got {height} x "
                f"{width}; use {max(1, height // patch) * patch} x {max(1, width // patch) * patch}"
            )
        return height // patch, width // patch


def _class_tokens(image: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
    """Each image's class token, [B, 1, D]."""
    if lengths is None:
        return image[:, :1]
    return torch.cat([own[:, :1] for own in image.split(lengths, dim=1)])


def _mask(visible: Tensor, image: Tensor, grids: tuple[tuple[int, int], ...] | None) -> Tensor:
    """Turn what regions see into what is added to their scores.

    [B, N, P] becomes [B, 1, N, 1 + P]; in one sequence [N, P] becomes [1, 1, N, S].
    """
    batch, tokens, _ = image.shape
    if grids is not None:
        parts = visible.split([rows * columns for rows, columns in grids], dim=1)
        visible = torch.cat([F.pad(part, (1, 0)) for part in parts], dim=1)[None, :, 1:]
    if visible.dim() != 3 or visible.shape[0] != batch or visible.shape[2] != tokens - 1:
        raise ValueError(
            f"visible must have the shape [{batch}, regions, {tokens - 1}], got {list(visible.shape)}"
        )
    mask = image.new_full((batch, 1, visible.shape[1], tokens), float("-inf"))
    mask[:, 0, :, 1:].masked_fill_(visible, 0.0)
    return mask


class RegionEncoder(nn.Module):
    """One embedding for each region of each image; the transformer alone is what gets exported."""

    def __init__(self, config: ModelConfig, embedding_dim: int) -> None:
        super().__init__()
        self.vit = VisionTransformer(config)
        self.projection = nn.Linear(config.width, embedding_dim, bias=False)

    def forward(
        self, images: Tensor, visible: Tensor, grids: tuple[tuple[int, int], ...] | None = None
    ) -> Tensor:
        """Embed regions.

        Args:
            images: Normalised images, [B, 3, H, W].
            visible: True where a region covers a patch, [B, N, P].
            grids: Rows and columns of each image's patches where images share one sequence; images are
                then the S patches of all, [S, 3, p, p], and visible is [N, S].

        Returns:
            Region embeddings, not normalised, [B, N, E].
        """
        tokens = self.vit(images, visible, regions_only=True, grids=grids)
        embeddings: Tensor = self.projection(self.vit.pool(tokens.regions))
        return embeddings


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: on matrices, not on biases, norms and single tokens."""
    return parameter.dim() >= 2 and not name.endswith("class_pos_emb")
