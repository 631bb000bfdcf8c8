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
from megaregion.data.transforms import EvalTransform
from megaregion.errors import UserError

PIXELS = "pixels"
"""Name of the raw-pixel baseline's row."""
SIDE = 32
"""Side to which it resizes a crop."""
CELL = 8
"""Pixels along each side of a place of its map."""
BATCH = 32
"""Crops that go through a model of HuggingFace at once."""
LAST_NORMS = ("post_layernorm", "layernorm", "norm")
"""Names that its vision transformers give the norm behind their last block."""

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class BoxedImage:
    """One image with the regions to encode."""

    image: Image.Image
    """RGB."""
    boxes: Floats
    """[n, 4] in pixels of the image, x1 and y1 exclusive."""


@dataclass(frozen=True)
class Features:
    """Features of R regions."""

    region: Floats
    """[R, C], compared by cosine."""
    embedding: Floats | None = None
    """[R, E], what the heads classify; None for an encoder without heads."""


class Encoder(Protocol):
    """An encoder of regions, of whole images, and perhaps of every place of an image."""

    @property
    def name(self) -> str:
        """Name of its rows."""

    @property
    def text_centers(self) -> Floats | None:
        """Weight of the text head, [V, E]; None without one."""

    @property
    def names_images(self) -> bool:
        """Whether it is asked about whole images; not where another encoder would answer the same."""

    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Encode all regions of a batch of images, image by image."""

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


@dataclass(frozen=True)
class HuggingFaceEncoder:
    """Regions as the mean of the patches that their box covers; whole images are encoded once."""

    name: str
    model: Any
    """A vision transformer of transformers."""
    transform: EvalTransform
    """Resizes whole images, as the model expects them."""
    device: str = "cpu"
    names_images: ClassVar[bool] = True
    text_centers: ClassVar[None] = None

    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Mean feature of the patches that each region covers."""
        maps = self.maps([item.image for item in images])
        regions = []
        for item, own in zip(images, maps, strict=True):
            seen = self.transform(item.image, item.boxes.tolist())[1].numpy().astype(np.float32)
            regions.append(seen @ own.reshape(-1, own.shape[-1]) / seen.sum(axis=1, keepdims=True))
        return Features(np.concatenate(regions))

    def images(self, images: Sequence[Image.Image]) -> Floats:
        """Pooled feature of each whole image, [B, C]."""
        return self._encode(images)[0]

    def maps(self, images: Sequence[Image.Image]) -> list[Floats]:
        """Patch features of each image, [h, w, C] each."""
        return list(self._encode(images)[1])

    def crops(self) -> CropEncoder:
        """The same model asked about each region's crop, as the curation encoder is."""
        return CropEncoder(f"{self.name}/crops", self._embed, names_images=False)

    def _embed(self, crops: Sequence[Pixels]) -> Floats:
        images = [Image.fromarray(crop) for crop in crops]
        return np.concatenate([self.images(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image]) -> tuple[Floats, Floats]:
        """Pooled features [B, C], and maps of what enters the last block, as of the run's own network."""
        output = self.model(
            pixel_values=pixels_of(images, self.transform, self.device), output_hidden_states=True
        )
        pooled = getattr(output, "pooler_output", None)
        image = output.last_hidden_state[:, 0] if pooled is None else pooled
        side = self.transform.patch
        rows, columns = self.transform.height // side, self.transform.width // side
        norms = (getattr(self.model, name, None) for name in LAST_NORMS)
        norm = next((norm for norm in norms if norm is not None), torch.nn.Identity())
        patches = norm(output.hidden_states[-2])[:, -rows * columns :]
        return as_array(image), as_array(patches.unflatten(1, (rows, columns)))


def load_huggingface(path: str, device: str = "cpu") -> HuggingFaceEncoder:
    """Load a folder that save_pretrained wrote, or a model by its hub id, from safetensors alone.

    Raises:
        UserError: It cannot be loaded, or is no vision transformer.
    """
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        advice = "name a folder that save_pretrained wrote or a hub id"
        raise UserError(f"--compare {path} cannot be loaded ({reason}); {advice}") from None
    model = getattr(model, "vision_model", model)
    side, patch = (getattr(model.config, key, None) for key in ("image_size", "patch_size"))
    if not isinstance(side, int) or not isinstance(patch, int):
        missing = "its config has no image_size and patch_size in pixels"
        raise UserError(f"--compare {path} is no vision transformer: {missing}")
    data = DataConfig(mean=tuple(processor.image_mean), std=tuple(processor.image_std))
    transform = EvalTransform(data, ModelConfig(image_size=side, patch_size=patch))
    return HuggingFaceEncoder(Path(path).name or path, model.to(device).eval(), transform, device)
