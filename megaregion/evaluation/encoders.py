"""What every compared encoder is to the evaluation: features of regions, of places and of whole images.

Shapes: n boxes of one image, R regions of several images one after another, B images, C feature width, E
embedding width, V text classes, h x w pixels of a crop or cells of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megaregion.config import DataConfig, ModelConfig
from megaregion.data.sample import RLE, decode_mask
from megaregion.data.transforms import EvalTransform
from megaregion.models import foreign

PIXELS = "pixels"
"""Name of the raw-pixel baseline's row."""
SIDE = 32
"""Side to which it resizes a crop."""
CELL = 8
"""Pixels along each side of a place of its map."""
BATCH = 32
"""Crops that go through a model of HuggingFace at once."""
SEES = "megaregion_sees"
"""Name of :func:`_attend` among transformers' ways to attend."""

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class BoxedImage:
    """One image with the regions to encode."""

    image: Image.Image
    """RGB."""
    boxes: Floats
    """[n, 4] in pixels of the image, x1 and y1 exclusive."""
    masks: Sequence[RLE | None] = ()
    """Exact shapes of the regions, where they are known; a region with one is judged by it."""


@dataclass(frozen=True)
class Features:
    """Features of R regions."""

    region: Floats
    """[R, C], compared by cosine."""
    embedding: Floats | None = None
    """[R, E], what the heads classify; None for an encoder without heads."""
    maps: Sequence[Floats] | None = None
    """Feature map of each image, stretched to a square, [h, w, C], where the regions were read from it."""


class EncodesRegions(Protocol):
    """An encoder of regions; all that is asked for a score on annotated images."""

    @property
    def name(self) -> str:
        """Name of its rows."""

    @property
    def sees_masks(self) -> bool:
        """Whether a mask changes what it sees of a region."""

    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Encode all regions of a batch of images, image by image."""


class Encoder(EncodesRegions, Protocol):
    """An encoder of regions, of whole images, and perhaps of every place of an image."""

    @property
    def text_centers(self) -> Floats | None:
        """Weight of the text head, [V, E]; None without one."""

    @property
    def names_images(self) -> bool:
        """Whether it is asked about whole images; not where another encoder would answer the same."""

    def images(self, images: Sequence[Image.Image]) -> Floats:
        """Encode whole images, [B, C]."""

    def maps(self, images: Sequence[Image.Image]) -> list[Floats] | None:
        """Feature map of each image, stretched to a square, [h, w, C] each; None if it has none."""


# ---- crops -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropEncoder:
    """Encodes each region from its crop alone: pixels, or any image encoder."""

    name: str
    embed: Callable[[Sequence[Pixels]], Floats]
    """From crops, RGB [h, w, 3] of any sizes, to features [R, C]."""
    threads: int = 1
    """Threads that embed parts of the crops at once; for an embed that computes on one core."""
    see: Callable[[Pixels], Floats] | None = None
    """From a whole image, RGB [h, w, 3], to its feature map."""
    names_images: bool = True
    sees_masks: ClassVar[bool] = False
    text_centers: ClassVar[Floats | None] = None

    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Features of every region's crop."""
        return Features(self.images([crop(item.image, box) for item in images for box in item.boxes]))

    def images(self, images: Sequence[Image.Image]) -> Floats:
        """Features of whole images, each as if it were one crop, [B, C]."""
        crops = [np.asarray(image) for image in images]
        size = max(1, -(-len(crops) // self.threads))
        parts = [crops[start : start + size] for start in range(0, len(crops), size)]
        with ThreadPoolExecutor(self.threads) as pool:
            return np.concatenate(list(pool.map(self.embed, parts))).astype(np.float32, copy=False)

    def maps(self, images: Sequence[Image.Image]) -> list[Floats] | None:
        """Feature map of each image, if the encoder has one."""
        if self.see is None:
            return None
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self.see, map(np.asarray, images)))


def crop(image: Image.Image, box: Sequence[float] | Floats) -> Image.Image:
    """Cut a box out of an image, rounded to whole pixels, clipped to the image, at least one pixel."""
    x0, y0, x1, y1 = (round(float(value)) for value in box)
    left, top = min(max(x0, 0), image.width - 1), min(max(y0, 0), image.height - 1)
    return image.crop((left, top, min(max(x1, left + 1), image.width), min(max(y1, top + 1), image.height)))


def raw_pixels(crops: Sequence[Pixels]) -> Floats:
    """Pixels of each crop at 32 x 32, on the 0..1 scale, as one vector, [R, 3072]."""
    return np.stack([_small(crop, SIDE).ravel() for crop in crops])


def centred(pixels: Floats) -> Floats:
    """Pixels of crops, [R, 3072], without each one's mean: brightness alone makes no two crops alike."""
    return np.subtract(pixels, pixels.mean(axis=1, keepdims=True))


def centred_pixels(crops: Sequence[Pixels]) -> Floats:
    """Centred pixels of each crop at 32 x 32, [R, 3072]."""
    return centred(raw_pixels(crops))


def pixel_map(image: Pixels, cells: int) -> Floats:
    """Pixels of each of cells x cells places at 8 x 8, on the 0..1 scale, [cells, cells, 192]."""
    places = _small(image, CELL * cells).reshape(cells, CELL, cells, CELL, 3).swapaxes(1, 2)
    return places.reshape(cells, cells, -1)


def _small(image: Pixels, side: int) -> Floats:
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32) / np.float32(255)


# ---- networks --------------------------------------------------------------------------------------


def pixels_of(images: Sequence[Image.Image], transform: EvalTransform, device: str) -> Tensor:
    """Whole images as a network of this transform reads them, [B, 3, H, W]."""
    return torch.stack([transform(image, [])[0] for image in images]).to(device)


def as_array(values: Tensor) -> Floats:
    """A tensor of a device as fp32 on the host."""
    return values.float().cpu().numpy()


def pooled_patches(
    maps: Sequence[Floats], images: Sequence[BoxedImage], transform: EvalTransform
) -> Features:
    """Mean feature of the patches that each region covers, by the map of each image, [h, w, C]."""
    regions = []
    for item, own in zip(images, maps, strict=True):
        seen = transform.visible(item.image.size, item.boxes.tolist(), item.masks).astype(np.float32)
        regions.append(seen @ own.reshape(-1, own.shape[-1]) / seen.sum(axis=1, keepdims=True))
    return Features(np.concatenate(regions), maps=maps)


@dataclass(frozen=True)
class PooledEncoder:
    """Regions as the mean of the patches that they cover, of a network that has another way of its own."""

    name: str
    see: Callable[[Sequence[Image.Image]], list[Floats]]
    """From images to their feature maps, [h, w, C] each."""
    transform: EvalTransform
    """Cuts an image into the map's patches."""
    sees_masks: ClassVar[bool] = True

    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Mean feature of the patches that each region covers."""
        return pooled_patches(self.see([item.image for item in images]), images, self.transform)


def crops_of(name: str, images: Callable[[Sequence[Image.Image]], Floats]) -> CropEncoder:
    """An encoder of whole images, asked about each region's crop, as the curation encoder is."""

    def embed(crops: Sequence[Pixels]) -> Floats:
        whole = [Image.fromarray(crop) for crop in crops]
        return np.concatenate([images(whole[i : i + BATCH]) for i in range(0, len(whole), BATCH)])

    return CropEncoder(f"{name}/crops", embed, names_images=False)


@dataclass(frozen=True)
class HuggingFaceEncoder:
    """Regions as the mean of the patches that they cover; whole images are encoded once."""

    name: str
    model: Any
    """A vision transformer of transformers."""
    transform: EvalTransform
    """Resizes whole images, as the model expects them."""
    device: str = "cpu"
    names_images: ClassVar[bool] = True
    sees_masks: ClassVar[bool] = True
    text_centers: ClassVar[None] = None

    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Mean feature of the patches that each region covers."""
        return pooled_patches(self.maps([item.image for item in images]), images, self.transform)

    def images(self, images: Sequence[Image.Image]) -> Floats:
        """Pooled feature of each whole image, [B, C]."""
        return self._encode(images)[0]

    def maps(self, images: Sequence[Image.Image]) -> list[Floats]:
        """Patch features of each image, [h, w, C] each."""
        return list(self._encode(images)[1])

    def crops(self) -> CropEncoder:
        """The same model asked about each region's crop."""
        return crops_of(self.name, self.images)

    def tokens(self) -> TokenEncoder | MaskedEncoder | None:
        """The same model by region tokens of its own, else by what it pools from a region's patches alone.

        None where a model neither has a pooling head of SigLIP's kind nor attends as transformers' own do.
        """
        if hasattr(self.model, "get_region_features"):
            return TokenEncoder(self)
        if isinstance(head := getattr(self.model, "head", None), torch.nn.Module):
            return MaskedEncoder(self, head) if hasattr(head, "probe") else None
        own = type(self.model).__module__.startswith("transformers.")
        return MaskedEncoder(self) if own and self.model._supports_attention_backend else None

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the model takes for whole images."""
        return foreign.inputs(self.model, pixels_of(images, self.transform, self.device))

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image]) -> tuple[Floats, Floats]:
        """Pooled features [B, C], and maps."""
        output, cells = foreign.see(self.model, pixels_of(images, self.transform, self.device))
        return as_array(foreign.pooled(output)), as_array(cells)


@dataclass(frozen=True)
class TokenEncoder:
    """The region tokens of an export of ours (`--regions`), by its own code."""

    whole: HuggingFaceEncoder
    names_images: ClassVar[bool] = False
    sees_masks: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Name of its rows."""
        return f"{self.whole.name}/token"

    @torch.inference_mode()
    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Normed region tokens, [R, C]; those with a mask are asked for apart from those without."""
        transform = self.whole.transform
        pixels = pixels_of([item.image for item in images], transform, self.whole.device)
        masked = [
            [bool(item.masks) and item.masks[n] is not None for n in range(len(item.boxes))]
            for item in images
        ]
        boxes = [
            item.boxes[~np.asarray(own, np.bool_)]
            * np.tile([transform.width / item.image.width, transform.height / item.image.height], 2)
            for item, own in zip(images, masked, strict=True)
        ]
        by_box = self.whole.model.get_region_features(pixels, boxes=boxes, projected=False)
        found = [by_box]
        if any(map(any, masked)):
            masks = [self._resized(item) for item in images]
            found.append(self.whole.model.get_region_features(pixels, masks=masks, projected=False))
        rows = []
        for place, own in enumerate(masked):
            parts = [iter(part[place]) for part in found]
            rows += [next(parts[has_mask]) for has_mask in own]
        return Features(as_array(torch.stack(rows)))

    def _resized(self, item: BoxedImage) -> Tensor:
        """Masks of those regions that have one, at the network's size, bool [n, H, W]."""
        transform = self.whole.transform
        rows, columns = (
            ((np.arange(side) + 0.5) / side * edge).astype(np.int64)
            for side, edge in ((transform.height, item.image.height), (transform.width, item.image.width))
        )
        own = [decode_mask(mask)[np.ix_(rows, columns)] for mask in item.masks if mask is not None]
        return torch.from_numpy(np.stack(own)) if own else torch.zeros(0, len(rows), len(columns)).bool()


@dataclass(frozen=True)
class MaskedEncoder:
    """Regions by what a model makes of an image if it may pool a region's patches alone.

    The class token sees itself and these patches in every block, patches see all: a pass for every region. A
    head that pools patches reads these alone: no further pass.
    """

    whole: HuggingFaceEncoder
    head: Any = None
    """SigLIP's pooling head; None for a model with a class token."""
    names_images: ClassVar[bool] = False
    sees_masks: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Name of its rows."""
        return f"{self.whole.name}/{'masked' if self.head is None else 'head'}"

    @torch.inference_mode()
    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Pooled features of the regions, [R, C]."""
        see, model = self.whole.transform.visible, self.whole.model
        each = [see(item.image.size, item.boxes.tolist(), item.masks) for item in images]
        seen = torch.from_numpy(np.concatenate(each)).to(self.whole.device)
        place = torch.arange(len(images)).repeat_interleave(torch.tensor([len(own) for own in each]))
        inputs = self.whole.inputs([item.image for item in images])
        parts = zip(seen.split(BATCH), place.to(self.whole.device).split(BATCH), strict=True)
        if self.head is None:
            from transformers import AttentionInterface

            AttentionInterface.register(SEES, _attend)
            model.set_attn_implementation(SEES)
            pixels = inputs["pixel_values"]
            found = [foreign.pooled(model(pixel_values=pixels[rows], seen=own)) for own, rows in parts]
        else:
            patches, found = model(**inputs).last_hidden_state, []
            for own, rows in parts:
                mask = {"key_padding_mask": ~own}
                hook = self.head.attention.register_forward_pre_hook(
                    lambda _, given, named, mask=mask: (given, named | mask), with_kwargs=True
                )
                with hook:
                    found.append(self.head(patches[rows]))
        return Features(as_array(torch.cat(found)))


def _attend(_: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
    """Attention for transformers; of patches that are ``seen`` [B, N] the class token sees no others."""
    if (seen := given.get("seen")) is not None:
        mask = torch.ones(len(seen), 1, *2 * [key.shape[2]], dtype=torch.bool, device=key.device)
        mask[:, 0, 0, 1:] = False
        mask[:, 0, 0, -seen.shape[1] :] = seen
    scale = given.get("scaling")
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return found.transpose(1, 2).contiguous(), None


def load_huggingface(path: str, device: str = "cpu", trust: bool = False) -> HuggingFaceEncoder:
    """Load a folder that save_pretrained wrote, or a model by its hub id, from safetensors alone.

    Code that lies beside the weights runs only where it is trusted.

    Raises:
        UserError: It cannot be loaded, or is no vision transformer.
    """
    found = foreign.load(path, trust)
    data = DataConfig(mean=found.mean, std=found.std)  # type: ignore[arg-type]
    transform = EvalTransform(data, ModelConfig(image_size=found.side, patch_size=found.patch))
    return HuggingFaceEncoder(Path(path).name or path, found.model.to(device), transform, device)
