"""A vision encoder with features of regions: AutoModel.from_pretrained(folder, trust_remote_code=True).

A region token is a class token that sees only its region. It starts as a copy of the class token's state, or
as a learned query, goes through the last ``region_layers`` blocks, and reads the keys and values of its own
patches; the image is encoded once for all its regions. This file needs torch and transformers (4.57 or 5) and
nothing else.

Shapes: B images of H x W pixels, P = rows * columns patches (row by row), K registers, N regions of one
image, M the most of any image, D width, E width of the projection, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MLCDVisionConfig, MLCDVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mlcd.modeling_mlcd import MLCDEncoderLayer, MLCDVisionEmbeddings

TOLERANCE = 1e-9
"""Rounding must not decide whether a patch that is covered by exactly the threshold is visible."""


@dataclass
class RegionOutput(BaseModelOutputWithPooling):
    """What MLCDVisionModel gives, and the regions."""

    region_features: Tensor | None = None
    """[B, M, E], or [B, M, D] without the projection."""


class RegionVisionModel(MLCDVisionModel):
    """MLCDVisionModel with region features; ``forward`` without regions is that of the plain class."""

    def __init__(self, config: MLCDVisionConfig) -> None:
        super().__init__(config)
        own = getattr(config, "region_weights", "shared") == "separate"
        layers = [MLCDEncoderLayer(config) for _ in range(config.region_layers)] if own else []
        self.region_layers = nn.ModuleList(layers)
        learned = getattr(config, "region_start", "class") == "learned"
        self.region_query = nn.Parameter(torch.randn(config.hidden_size)) if learned else None
        width = getattr(config, "region_dim", None)
        self.projection = nn.Linear(config.hidden_size, width, bias=False) if width else None
        self._registers = getattr(config, "num_register_tokens", 0)
        if self._registers:
            self._body.embeddings = RegisterEmbeddings(config)
            rotary = self._body.vision_rotary_embedding
            rotary.register_forward_hook(partial(_leave_unturned, self._registers))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        visible: Tensor | None = None,
        projected: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The plain class's output, with ``region_features`` if there are boxes, masks or ``visible``.

        Tensors only, so that it can be compiled, exported and wrapped for training on many GPUs; images with
        fewer regions than others are padded with any boxes.

        Args:
            pixel_values: Normalised images, [B, 3, H, W]; the patch divides H and W.
            boxes: x0, y0, x1, y1 in pixels of ``pixel_values``, [B, M, 4].
            masks: Bool [B, M, H, W]; regions are then judged by them and not by boxes.
            visible: Which patches each region sees, bool [B, M, P], in place of boxes and masks.
            projected: As of :meth:`get_region_features`.
            **kwargs: Those of the plain class.

        Raises:
            ValueError: There is no projection to apply, or the patch does not divide the images.
        """
        if pixel_values is None or (boxes is None and masks is None and visible is None):
            return super().forward(pixel_values, **kwargs)
        if projected and self.projection is None:
            raise ValueError("this folder has no projection; use projected=False")
        height, width = pixel_values.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"the patch of {patch} px does not divide images of {height} x {width} px")
        if visible is None:
            visible = self._visible(boxes, masks, height, width)
        asked = kwargs.pop("output_hidden_states", None)
        asked = self.config.output_hidden_states if asked is None else asked
        as_object = kwargs.pop("return_dict", None)
        as_object = getattr(self.config, "return_dict", True) if as_object is None else as_object
        plain = super().forward(pixel_values, output_hidden_states=True, return_dict=True, **kwargs)
        tokens = self._region_tokens(plain.hidden_states, visible, height // patch, width // patch)
        features = self._body.post_layernorm(tokens.to(plain.pooler_output.device))
        if self.projection is not None and projected is not False:
            features = self.projection(features)
        output = RegionOutput(
            last_hidden_state=plain.last_hidden_state,
            pooler_output=plain.pooler_output,
            hidden_states=_chosen(plain.hidden_states, asked),
            attentions=plain.attentions,
            region_features=features,
        )
        return output if as_object else output.to_tuple()

    def get_region_features(
        self,
        pixel_values: Tensor,
        boxes: Sequence[Any] | None = None,
        masks: Sequence[Any] | None = None,
        projected: bool | None = None,
    ) -> list[Tensor]:
        """One feature for each region of each image; images may have different numbers, also none.

        A patch belongs to a region that covers at least ``config.patch_coverage`` of it; a region that
        covers no patch so far sees the one nearest to its center. Gradients reach all weights; use
        ``torch.no_grad()`` where nobody trains.

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
        height, width = pixel_values.shape[-2:]
        regions = _regions(boxes, masks, len(pixel_values), height, width)
        seen = [self._visible(*region, height, width) for region in regions]
        counts = [len(each) for each in seen]
        # A padding region sees the whole image: any would do, but one that sees nothing has no softmax.
        patches = (height // self.config.patch_size) * (width // self.config.patch_size)
        visible = torch.ones(len(seen), max(counts), patches, dtype=torch.bool)
        for row, each in zip(visible, seen, strict=True):
            row[: len(each)] = each
        visible = visible.to(pixel_values.device)
        output = self(pixel_values, visible=visible, projected=projected, return_dict=True)
        found = zip(output.region_features, counts, strict=True)
        return [each[:count] for each, count in found]

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """Never reentrant, as transformers 4 would: the states that regions read would have no graph."""
        asked = getattr(gradient_checkpointing_func, "keywords", {})
        once = partial(checkpoint, **{**asked, "use_reentrant": False})
        super()._set_gradient_checkpointing(enable, once, **kwargs)

    @property
    def _body(self) -> Any:
        """What holds the layers: transformers 4 wraps it, 5 does not."""
        return getattr(self, "vision_model", self)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or convert all tensors, but keep the rotary frequencies right.

        They are no weights: half() would round them, and to_empty() after the meta device fill them with
        whatever lies in memory.
        """
        super()._apply(*args, **kwargs)
        rotary = self._body.vision_rotary_embedding
        for name, buffer in rotary.named_buffers():
            if name.endswith("inv_freq") and buffer.device.type != "meta":
                setattr(rotary, name, self._frequencies(buffer.device))
        return self

    def _visible(self, boxes: Tensor | None, masks: Tensor | None, height: Any, width: Any) -> Tensor:
        """Which patches each region sees, bool [..., N, P], of boxes [..., N, 4] or masks [..., N, H, W]."""
        patch = self.config.patch_size
        if boxes is not None and masks is None:
            share, middle = _covered_by_boxes(boxes, patch, height, width)
        else:
            assert masks is not None
            share, middle = _covered_by_masks(masks, patch)
            if boxes is not None and boxes.shape[-2] == masks.shape[-3]:
                # An empty mask has no center; its box has one, if it was given.
                empty = share.sum((-2, -1)) == 0
                middle = torch.where(empty[..., None], _middle(boxes, height, width), middle)
        least = getattr(self.config, "patch_coverage", 0.5)
        visible = ((share >= least - TOLERANCE) & (share > 0)).flatten(-2)
        rows, columns = height // patch, width // patch
        x, y = (middle / patch).floor().long().unbind(-1)
        nearest = y.clamp(min=0).clamp(max=rows - 1) * columns + x.clamp(min=0).clamp(max=columns - 1)
        places = torch.arange(rows * columns, device=visible.device)
        return visible | ((places == nearest[..., None]) & ~visible.any(-1, keepdim=True))

    def _region_tokens(self, states: Sequence[Tensor], visible: Tensor, rows: Any, columns: Any) -> Tensor:
        """Region tokens before the last norm, [B, M, D].

        Args:
            states: What enters each block and leaves the last, [B, 1 + P, D] each.
            visible: Bool [B, M, P].
            rows: Rows of patches.
            columns: Columns of patches.
        """
        count = self.config.region_layers
        states = states[-count - 1 :]
        seen = F.pad(visible, (1 + self._registers, 0))[:, None]
        angles = self._angles(rows, columns, states[0].device)
        first, query = states[0][:, :1], self.region_query
        tokens = (first if query is None else query.expand_as(first)).expand(-1, visible.shape[1], -1)
        # Own weights read what the block has written.
        own = bool(len(self.region_layers))
        layers = self.region_layers if own else self._body.encoder.layers[-count:]
        for layer, image in zip(layers, states[own : count + own], strict=True):
            read = partial(_read, layer)
            if self.training and layer.gradient_checkpointing:
                read = partial(layer._gradient_checkpointing_func, read)
            tokens = read(*(given.to(_device(layer)) for given in (tokens, image, *angles, seen)))
        return tokens

    def _angles(self, rows: Any, columns: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of all tokens' angles, class token and registers first, [1 + K + P, d]."""
        frequencies = self._frequencies(device)
        y = torch.arange(rows, dtype=torch.float32, device=device)[:, None, None] * frequencies
        x = torch.arange(columns, dtype=torch.float32, device=device)[None, :, None] * frequencies
        grid = torch.cat((y.expand(-1, columns, -1), x.expand(rows, -1, -1)), dim=-1).flatten(0, 1)
        leading = F.pad(self._body.class_pos_emb.to(device).float(), (0, 0, 0, self._registers))
        angles = torch.cat((leading, grid)).repeat(1, 2)
        return angles.cos(), angles.sin()

    def _frequencies(self, device: torch.device) -> Tensor:
        """Of rows or columns, float32 [d / 4]."""
        pairs = self.config.hidden_size // self.config.num_attention_heads // 2
        theta = (getattr(self.config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        steps = torch.arange(0, pairs, 2, dtype=torch.float32, device=device) / pairs
        return 1.0 / theta**steps


def _chosen(states: Sequence[Tensor], asked: bool | int | Sequence[int] | None) -> Any:
    """All hidden states, none, or those of some indices and None for the others, as transformers 5 gives."""
    if not asked or asked is True:
        return states if asked else None
    indices = [asked] if isinstance(asked, int) else asked
    kept = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if index in kept else None for index, state in enumerate(states))


class RegisterVisionConfig(MLCDVisionConfig):
    """MLCD's settings and ``num_register_tokens``."""

    model_type = "megaregion_vit"


class RegisterVisionModel(RegionVisionModel):
    """RegionVisionModel with registers: learned tokens between class token and patches of any output."""

    config_class = RegisterVisionConfig


class RegisterEmbeddings(MLCDVisionEmbeddings):
    """MLCD's, with registers behind the class token."""

    def __init__(self, config: MLCDVisionConfig) -> None:
        super().__init__(config)
        self.register_tokens = nn.Parameter(torch.randn(config.num_register_tokens, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Class token, registers, patches of images [B, 3, H, W], [B, 1 + K + P, D]."""
        tokens = super().forward(pixel_values)
        registers = self.register_tokens.expand(len(tokens), -1, -1)
        return torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)


def _leave_unturned(registers: int, _: nn.Module, __: Any, found: Any) -> Any:
    """Patches' angles behind registers' (0): transformers 4 gives angles, 5 their cosines and sines."""
    if isinstance(found, Tensor):
        return F.pad(found, (0, 0, registers, 0))
    cos, sin = found
    return F.pad(cos, (0, 0, registers, 0), value=1.0), F.pad(sin, (0, 0, registers, 0))


def _device(layer: Any) -> torch.device:
    """Where a block computes; of one that accelerate keeps elsewhere, its hook says it."""
    where = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    found: torch.device = layer.layer_norm1.weight.device if where is None else torch.device(where)
    return found


def _read(layer: Any, tokens: Tensor, image: Tensor, cos: Tensor, sin: Tensor, seen: Tensor) -> Tensor:
    """Pass region tokens through one block: they read the image's tokens, nobody reads them.

    By torch's attention whatever the image's is: kernels of flash attention take no mask.
    """
    attention = layer.self_attn
    heads, width = attention.num_heads, attention.head_dim
    normed, source = layer.layer_norm1(tokens), layer.layer_norm1(image)
    query = _turn(attention.q_proj(normed).unflatten(-1, (heads, width)), cos[:1], sin[:1])
    key = _turn(attention.k_proj(source).unflatten(-1, (heads, width)), cos, sin)
    value = attention.v_proj(source).unflatten(-1, (heads, width))
    read = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen
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


def _covered_by_boxes(boxes: Tensor, patch: int, height: Any, width: Any) -> tuple[Tensor, Tensor]:
    """Share of each patch that each box covers, [..., N, rows, columns], and the boxes' centers."""
    boxes = boxes.to(_exact(boxes))
    shares = []
    for low, high, side in ((1, 3, height), (0, 2, width)):
        edges = torch.arange(0, side + 1, patch, device=boxes.device).to(boxes.dtype)
        start = torch.maximum(edges[:-1], boxes[..., low, None])
        end = torch.minimum(edges[1:], boxes[..., high, None])
        shares.append((end - start).clamp(min=0) / patch)
    return shares[0][..., :, None] * shares[1][..., None, :], _middle(boxes, height, width)


def _middle(boxes: Tensor, height: Any, width: Any) -> Tensor:
    """Centers (x, y) of what lies in the image of boxes, [..., N, 2]."""
    x0, y0, x1, y1 = boxes.to(_exact(boxes)).clamp(min=0).unbind(-1)
    x, y = (x0.clamp(max=width) + x1.clamp(max=width)) / 2, (y0.clamp(max=height) + y1.clamp(max=height)) / 2
    return torch.stack((x, y), dim=-1)


def _covered_by_masks(masks: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """The same of masks [..., N, H, W]; their centers are those of their area."""
    pixels = masks.to(_exact(masks)).flatten(0, -3)[:, None]
    share = F.avg_pool2d(pixels, patch)[:, 0].unflatten(0, masks.shape[:-2])
    total = share.sum((-2, -1)).clamp(min=TOLERANCE)
    rows, columns = (torch.arange(side, device=share.device).to(share.dtype) for side in share.shape[-2:])
    y = (share.sum(-1) * (rows + 0.5)).sum(-1) * patch / total
    x = (share.sum(-2) * (columns + 0.5)).sum(-1) * patch / total
    return share, torch.stack((x, y), dim=-1)


def _exact(given: Tensor) -> torch.dtype:
    """The finest floats of a device: Apple's GPUs have no float64."""
    return torch.float32 if given.device.type == "mps" else torch.float64
