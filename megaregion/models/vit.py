"""The vision transformer: one token a patch, a class token, and region tokens that ride along.

Without regions it is transformers' ``MLCDVisionModel``. A region token is a class token that sees only
its region: it starts as a copy of the class token's state, goes through the last ``region_layers`` blocks
with the class token's angle, and reads the keys and values of its own patches. Image tokens never see
region tokens, so patch features are the same, bit for bit, with and without regions.

Shapes: B images of H x W pixels, P patches (row by row), N regions an image, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaregion.config import ModelConfig
from megaregion.errors import UserError
from megaregion.models.block import Block
from megaregion.models.recompute import Level, everywhere
from megaregion.models.rotary import packed_rotation, rotation
from megaregion.models.stream import Stream

CHANNELS = 3


class Tokens(NamedTuple):
    """What the transformer gives; neither part has gone through the last norm (see ``pool``)."""

    image: Tensor
    """Class token, then patches, [B, 1 + P, D]; [B, 0, D] if only regions were asked for."""
    regions: Tensor | None
    """Region tokens, [B, N, D]; None if no regions were given."""


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
