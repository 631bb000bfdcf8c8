"""Images that keep their shape, with boxes; AutoImageProcessor loads it from the folder ``aspect``.

    AutoImageProcessor.from_pretrained(folder, subfolder="aspect", trust_remote_code=True)

The whole image is resized to as many patches as a budget allows, each side a multiple of the patch, and boxes
go along. This file needs numpy, Pillow and transformers (4.57 or 5) and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor


class AspectImageProcessor(BaseImageProcessor):
    """Resizes to a multiple of the patch within a budget of patches, and normalises.

    Its settings are those of preprocessor_config.json: ``patch_size``, ``max_patches``, ``image_mean`` and
    ``image_std``; a call may give another ``max_patches``.
    """

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        patch_size: int = 16,
        max_patches: int = 196,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.max_patches = max_patches
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def fitted(self, height: int, width: int, max_patches: int | None = None) -> tuple[int, int]:
        """Height and width of an image after resizing; each is off the image's shape by less than a patch.

        Raises:
            ValueError: The budget holds no patch.
        """
        most = self.max_patches if max_patches is None else max_patches
        if most < 1:
            raise ValueError(f"max_patches must be at least 1, got {most}")
        scale = math.sqrt(most / (height * width))
        rows = min(max(1, math.floor(height * scale)), most)
        columns = min(max(1, math.floor(width * scale)), most // rows)
        return rows * self.patch_size, columns * self.patch_size

    def preprocess(
        self,
        images: Any,
        boxes: Sequence[Any] | None = None,
        max_patches: int | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Pixels, and boxes in them, for ``get_region_features``.

        Args:
            images: One image (Pillow, or an array or tensor uint8 [H, W, 3] or [3, H, W]) or a list of them.
            boxes: For each image its boxes [N, 4]: x0, y0, x1, y1 in pixels of the given image.
            max_patches: The budget, if not the folder's.
            return_tensors: ``pt`` or ``np`` to stack the images, which then must come out equally large.
            **_: Arguments of other processors, which pipelines may give.

        Returns:
            ``pixel_values`` [B, 3, H, W] or a list of [3, H, W]; ``boxes``, a list of [N, 4], if given.

        Raises:
            ValueError: Images to be stacked differ in size, or boxes are not as many lists as images.
        """
        pictures = [_opened(each) for each in (images if isinstance(images, list | tuple) else [images])]
        if boxes is not None and len(boxes) != len(pictures):
            raise ValueError(f"boxes must have an entry for each of {len(pictures)} images, got {len(boxes)}")
        sizes = [self.fitted(each.height, each.width, max_patches) for each in pictures]
        if return_tensors is not None and len(set(sizes)) > 1:
            raise ValueError(
                f"images of {len(set(sizes))} sizes cannot be stacked; give images of one shape together, or "
                "leave return_tensors out"
            )
        mean, std = (np.array(each, dtype=np.float32) for each in (self.image_mean, self.image_std))
        pixels = []
        for picture, (height, width) in zip(pictures, sizes, strict=True):
            resized = picture.resize((width, height), Image.Resampling.BICUBIC)
            pixels.append(((np.asarray(resized, dtype=np.float32) / 255 - mean) / std).transpose(2, 0, 1))
        found = BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
        if boxes is not None:
            found["boxes"] = [
                np.asarray(each, dtype=np.float64).reshape(-1, 4)
                * ([width / picture.width, height / picture.height] * 2)
                for each, picture, (height, width) in zip(boxes, pictures, sizes, strict=True)
            ]
        return found


def _opened(image: Any) -> Image.Image:
    """An image in RGB."""
    if not isinstance(image, Image.Image):
        values = np.asarray(image)
        image = Image.fromarray(values.transpose(1, 2, 0) if values.shape[0] == 3 else values)
    return image.convert("RGB")
