"""A vision encoder with features of regions: AutoModel.from_pretrained(folder, trust_remote_code=True).

A region token is a class token that sees only its region. It starts as a copy of the class token's state,
goes through the last ``region_layers`` blocks, and reads the keys and values of its own patches; the image is
encoded once for all its regions. This file needs torch and transformers (4.57 or 5) and nothing else.

Shapes: B images of H x W pixels, P = rows * columns patches (row by row), N regions of one image, M the most
of any image, D width, E width of the projection, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MLCDVisionConfig, MLCDVisionModel
from transformers.models.mlcd.modeling_mlcd import MLCDEncoderLayer

TOLERANCE = 1e-9
"""Rounding must not decide whether a patch that is covered by exactly the threshold is visible."""


class RegionVisionModel(MLCDVisionModel):
    """MLCDVisionModel with region features; ``forward`` is that of the plain class."""

    def __init__(self, config: MLCDVisionConfig) -> None:
        super().__init__(config)
        own = getattr(config, "region_weights", "shared") == "separate"
        layers = [MLCDEncoderLayer(config) for _ in range(config.region_layers)] if own else []
        self.region_layers = nn.ModuleList(layers)
        width = getattr(config, "projection_dim", None)
        self.projection = nn.Linear(config.hidden_size, width, bias=False) if width else None
        self.post_init()

    @torch.no_grad()
    def get_region_features(
        self,
        pixel_values: Tensor,
        boxes: Sequence[Any] | None = None,
        masks: Sequence[Any] | None = None,
        projected: bool | None = None,
    ) -> list[Tensor]:
        """One feature for each region of each image; images may have different numbers, also none.

        A patch belongs to a region that covers at least ``config.patch_coverage`` of it; a region that
        covers no patch so far sees the one nearest to its center.

        Args:
            pixel_values: Normalised images, [B, 3, H, W]; the patch divides H and W.
            boxes: For each image its boxes [N, 4]: x0, y0, x1, y1 in pixels of ``pixel_values``.
            masks: For each image its masks, bool [N, H, W], or None to take its boxes. A region with a mask
                is judged by it and not by its box.
            projected: Give what the heads classified, [N, E]; False gives the normed tokens, [N, D]. None
                takes the projection where the folder has one.

        Returns:
            B tensors, each with a row per region.

        Raises:
            ValueError: Boxes and masks do not fit the images, or there is no projection to apply.
        """
        if projected and self.projection is None:
            raise ValueError("this folder has no projection; use projected=False")
        height, width = pixel_values.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"the patch of {patch} px does not divide images of {height} x {width} px")
        seen = [
            self._visible(*region, height, width)
            for region in _regions(boxes, masks, len(pixel_values), height, width)
        ]
        counts = [len(each) for each in seen]
        # A padding region sees the whole image: any would do, but one that sees nothing has no softmax.
        visible = torch.ones(len(seen), max(counts), (height // patch) * (width // patch), dtype=torch.bool)
        for row, each in zip(visible, seen, strict=True):
            row[: len(each)] = each
        tokens = self._region_tokens(pixel_values, visible.to(pixel_values.device))
        features = self._body.post_layernorm(tokens)
        if self.projection is not None and projected is not False:
            features = self.projection(features)
        return [each[:count] for each, count in zip(features, counts, strict=True)]

    @property
    def _body(self) -> Any:
        """What holds the layers: transformers 4 wraps it, 5 does not."""
        return getattr(self, "vision_model", self)

    def _visible(self, boxes: Tensor, masks: Tensor | None, height: int, width: int) -> Tensor:
        """Which patches each region sees, bool [N, P]."""
        patch = self.config.patch_size
        share, middle = _covered_by_boxes(boxes, patch, height, width)
        if masks is not None:
            share, center = _covered_by_masks(masks, patch)
            # An empty mask has no center; its box has one, if it was given.
            empty = (share.sum((1, 2), keepdim=True) == 0)[:, :, 0]
            middle = torch.where(empty, middle, center) if len(middle) == len(center) else center
        least = getattr(self.config, "patch_coverage", 0.5)
        visible = (share >= least - TOLERANCE) & (share > 0)
        rows, columns = height // patch, width // patch
        for n in torch.nonzero(~visible.flatten(1).any(1)).flatten().tolist():
            x, y = (middle[n] / patch).floor().long().tolist()
            visible[n, min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)] = True
        return visible.flatten(1)

    def _region_tokens(self, pixels: Tensor, visible: Tensor) -> Tensor:
        """Region tokens before the last norm, [B, M, D]; ``visible`` is bool [B, M, P]."""
        count = self.config.region_layers
        states = self(pixel_values=pixels, output_hidden_states=True).hidden_states[-count - 1 :]
        rows, columns = (side // self.config.patch_size for side in pixels.shape[-2:])
        cos, sin = self._angles(rows, columns, pixels.device)
        mask = torch.zeros(len(visible), 1, visible.shape[1], 1 + visible.shape[2], device=pixels.device)
        mask[:, 0, :, 0] = -torch.inf
        mask[:, 0, :, 1:].masked_fill_(~visible, -torch.inf)
        tokens = states[0][:, :1].expand(-1, visible.shape[1], -1)
        for index, layer in enumerate(self._body.encoder.layers[-count:]):
            if len(self.region_layers):
                # Own weights read what the block has written.
                tokens = _read(self.region_layers[index], tokens, states[index + 1], cos, sin, mask)
            else:
                tokens = _read(layer, tokens, states[index], cos, sin, mask)
        return tokens

    def _angles(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of all tokens' angles, class token first, [1 + P, d]."""
        class_angle = self._body.class_pos_emb.float()
        pairs = class_angle.shape[-1]
        theta = (getattr(self.config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        frequencies = 1.0 / theta ** (torch.arange(0, pairs, 2, dtype=torch.float32, device=device) / pairs)
        y = torch.arange(rows, dtype=torch.float32, device=device)[:, None, None] * frequencies
        x = torch.arange(columns, dtype=torch.float32, device=device)[None, :, None] * frequencies
        grid = torch.cat((y.expand(-1, columns, -1), x.expand(rows, -1, -1)), dim=-1).flatten(0, 1)
        angles = torch.cat((class_angle, grid)).repeat(1, 2)
        return angles.cos(), angles.sin()


def _read(layer: Any, tokens: Tensor, image: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    """Pass region tokens through one block: they read the image's tokens, nobody reads them."""
    attention = layer.self_attn
    heads, width = attention.num_heads, attention.head_dim
    normed, source = layer.layer_norm1(tokens), layer.layer_norm1(image)
    query = _turn(attention.q_proj(normed).unflatten(-1, (heads, width)), cos[:1], sin[:1])
    key = _turn(attention.k_proj(source).unflatten(-1, (heads, width)), cos, sin)
    value = attention.v_proj(source).unflatten(-1, (heads, width))
    read = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask.to(query.dtype)
    )
    tokens = tokens + attention.out_proj(read.transpose(1, 2).flatten(2))
    out: Tensor = tokens + layer.mlp(layer.layer_norm2(tokens))
    return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [B, T, H, d] by angles [T, d]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = x.float() * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return turned.to(x.dtype)


def _regions(
    boxes: Sequence[Any] | None, masks: Sequence[Any] | None, images: int, height: int, width: int
) -> list[tuple[Tensor, Tensor | None]]:
    """Boxes [N, 4] and perhaps masks [N, H, W] of every image, on the CPU."""
    if boxes is None and masks is None:
        raise ValueError("give boxes, masks or both")
    for name, given in (("boxes", boxes), ("masks", masks)):
        if given is not None and len(given) != images:
            raise ValueError(f"{name} must have an entry for each of {images} images, got {len(given)}")
    regions = []
    for index in range(images):
        mask = None if masks is None else masks[index]
        shape = None if mask is None else torch.as_tensor(mask).cpu().bool().reshape(-1, height, width)
        box = torch.zeros(0, 4) if boxes is None or boxes[index] is None else torch.as_tensor(boxes[index])
        if shape is None and (boxes is None or boxes[index] is None):
            raise ValueError(f"image {index} has neither boxes nor masks; give an empty list for no region")
        box = box.detach().cpu().double().reshape(-1, 4)
        if shape is not None and len(box) not in (0, len(shape)):
            raise ValueError(f"image {index} has {len(box)} boxes and {len(shape)} masks")
        regions.append((box, shape))
    return regions


def _covered_by_boxes(boxes: Tensor, patch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Share of each patch that each box covers, [N, rows, columns], and the boxes' centers (x, y), [N, 2]."""
    shares = []
    for low, high, side in ((1, 3, height), (0, 2, width)):
        edges = torch.arange(0, side + 1, patch, dtype=torch.float64)
        start = torch.maximum(edges[:-1], boxes[:, low, None])
        end = torch.minimum(edges[1:], boxes[:, high, None])
        shares.append((end - start).clamp(min=0) / patch)
    limits = boxes.new_tensor([width, height, width, height])
    middle = torch.minimum(boxes.clamp(min=0), limits).reshape(-1, 2, 2).mean(1)
    return shares[0][:, :, None] * shares[1][:, None, :], middle


def _covered_by_masks(masks: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """The same of masks; their centers are those of their area."""
    share = F.avg_pool2d(masks.double()[:, None], patch)[:, 0]
    total = share.sum((1, 2)).clamp(min=TOLERANCE)
    y = (torch.arange(share.shape[1], dtype=torch.float64) + 0.5) * patch
    x = (torch.arange(share.shape[2], dtype=torch.float64) + 0.5) * patch
    middle = torch.stack(((share.sum(1) * x).sum(1), (share.sum(2) * y).sum(1)), dim=1) / total[:, None]
    return share, middle
