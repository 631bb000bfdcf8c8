"""Pictures of the report: crops of regions, boxed scenes, attention over scenes, confused clusters.

What is shown is drawn at random by the study's seed, one object of each class where there is room;
nothing is picked by whether it looks good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.data.sample import Box
from megaregion.evaluation.clusters import sample_image
from megaregion.evaluation.encoders import crop
from megaregion.evaluation.scenes import RegionTable, Scene, open_image
from megaregion.evaluation.visualise import SceneAttention, Visuals

REGIONS = 3
"""Regions of a scene whose attention is shown."""
CROP_SIDE = 144
"""Longest side of a crop in the page, in pixels: twice what is shown, for dense screens."""
FRAME_SIDE = 384
"""Longest side of a map and of a picture of attention."""
SCENE_SIDE = MATRIX_SIDE = 640
WARM = np.array([[255, 214, 102], [255, 122, 54], [214, 32, 84]], np.float32)
"""Colours of attention from little to much."""
RIGHT, WRONG = np.array([31, 95, 214], np.uint8), np.array([214, 62, 62], np.uint8)


def draw(total: int, wanted: int, seed: int) -> list[int]:
    """Draw at most so many of some things, in their order."""
    chosen = np.random.Generator(np.random.Philox(key=seed)).permutation(total)[:wanted]
    return sorted(int(row) for row in chosen)


def draw_objects(objects: RegionTable, wanted: int, seed: int) -> list[int]:
    """Draw one object of each class, then further ones, at most so many; in the order of their names."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(objects)).tolist()
    first = {objects.names[row]: row for row in reversed(order)}
    chosen = sorted(order, key=lambda row: first[objects.names[row]] != row)
    return sorted(chosen[:wanted], key=lambda row: objects.names[row])


class Crops:
    """Crops of scenes; a scene that gives many crops is decoded once."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self._scenes = scenes
        self._images: dict[int, Image.Image] = {}

    def of(self, regions: RegionTable, row: int) -> Image.Image:
        """The region in this row of a table of the scenes."""
        scene = int(regions.scene[row])
        if scene not in self._images:
            self._images[scene] = open_image(self._scenes[scene])
        return crop(self._images[scene], regions.boxes[row])


class Tag(NamedTuple):
    """The name of a region, written on its box; all lengths in pixels of the scene."""

    kind: str
    """object or word."""
    name: str
    box: Box
    x: float
    y: float
    width: float
    letter: float
    """Height of a letter."""


def scene_tags(scene: Scene) -> list[Tag]:
    """The tags of a scene's objects and words."""
    letter = max(scene.width, scene.height) / 38
    tags = []
    for kind, name, box in (
        *(("object", item.name, item.box) for item in scene.objects),
        *(("word", item.text, item.box) for item in scene.words),
    ):
        # About how wide the name is in a bold sans-serif; the page has no font to measure.
        ems = sum(0.74 if sign.isupper() or sign in "mw" else 0.61 for sign in name)
        width = (ems + 0.7) * letter
        # The tag sits on top of its box, or inside it where the image ends.
        x = max(0.0, min(box[0], scene.width - width))
        y = box[1] - 1.35 * letter if box[1] > 1.4 * letter else box[1]
        tags.append(Tag(kind, name, box, x, y, width, letter))
    return tags


def attention_pictures(own: SceneAttention) -> Iterator[tuple[str, str, Image.Image]]:
    """A few regions of a scene: name, whether it reads or would read, and the attention."""
    names = [item.name for item in own.scene.objects] + [item.text for item in own.scene.words]
    for region, name in enumerate(names[:REGIONS]):
        box, attention = own.scene.boxes[region], own.regions
        yield name, "reads", overlay(own.image, attention.inside[region], box)
        yield name, "would read", overlay(own.image, attention.anywhere[region], box)


def overlay(image: Image.Image, weights: NDArray[np.float32], box: NDArray[np.float32]) -> Image.Image:
    """Lay attention [h, w] over a greyed picture, and draw the region's box [4]."""
    side = FRAME_SIDE / max(image.size)
    size = (round(image.width * side), round(image.height * side))
    grey = np.asarray(image.resize(size, Image.Resampling.BICUBIC).convert("L"), np.float32)[..., None]
    top = np.float32(max(float(np.quantile(weights, 0.995)), 1e-9))
    small = Image.fromarray(np.clip(weights / top, 0, 1).astype(np.float32), mode="F")
    heat = np.clip(np.asarray(small.resize(size, Image.Resampling.BILINEAR)), 0, 1)
    place = heat * (len(WARM) - 1)
    low = np.minimum(place.astype(np.int64), len(WARM) - 2)
    colour = WARM[low] + (WARM[low + 1] - WARM[low]) * (place - low)[..., None]
    alpha = np.sqrt(heat)[..., None] * np.float32(0.85)
    mixed = (0.25 * 255 + 0.6 * grey) * (1 - alpha) + colour * alpha
    pixels = np.clip(mixed, 0, 255).astype(np.uint8)
    x0, y0, x1, y1 = (round(float(edge) * side) for edge in box)
    x1, y1 = min(x1, size[0] - 1), min(y1, size[1] - 1)
    for rows, columns in (
        (slice(y0, y0 + 2), slice(x0, x1)), (slice(y1 - 1, y1 + 1), slice(x0, x1)),
        (slice(y0, y1), slice(x0, x0 + 2)), (slice(y0, y1), slice(x1 - 1, x1 + 1)),
    ):  # fmt: skip
        pixels[rows, columns] = (255, 255, 255)
    return Image.fromarray(pixels)


def matrix_picture(matrix: NDArray[np.float64]) -> Image.Image:
    """A confusion matrix as a picture that suits light and dark pages: its ink is alpha."""
    alpha = (255 * np.sqrt(np.clip(matrix, 0, 1))).round().astype(np.uint8)
    ink = np.where(np.eye(len(matrix), dtype=bool)[..., None], RIGHT, WRONG)
    pixels = np.dstack([ink, np.maximum(alpha, np.uint8(14))])
    scale = max(1, 640 // len(matrix))
    large = np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)
    if scale > 4:
        large[::scale, :, 3] = 0
        large[:, ::scale, 3] = 0
    return Image.fromarray(large, mode="RGBA")


def cluster_picture(visuals: Visuals, cluster: int) -> Image.Image:
    """A region of one of the confused clusters."""
    assert visuals.confusion is not None
    region = visuals.confusion.example(cluster)
    assert region is not None, "clusters are confused only where a region of each was drawn"
    return crop(sample_image(visuals.shards, region.sample), region.box)
