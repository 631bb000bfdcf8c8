"""Pictures of the report: PCA maps, attention of regions, confused clusters, crops and boxed scenes.

What is shown is drawn at random by the study's seed, one object of each class where there is room; nothing
is picked by whether it looks good. A region token reads only patches of its region: what it reads of them
shows what the region is known by, and the same query over the whole image what else looks like it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megaregion.data.sample import Box
from megaregion.data.shards import ShardedDataset
from megaregion.evaluation.clusters import Confusion, confuse, sample_image
from megaregion.evaluation.encoders import Floats, crop
from megaregion.evaluation.encoding import Progress, quiet
from megaregion.evaluation.network import Attention, NetworkEncoder, region_attention
from megaregion.evaluation.pca_maps import Frame, FrameMaps, paint, read_frames
from megaregion.evaluation.scenes import RegionTable, Scene, open_image
from megaregion.evaluation.study import Study
from megaregion.files import new_folder

FRAMES = 6
"""Held-out scenes that are painted where no frames are named."""
ATTENDED = 4
"""Held-out scenes whose regions' attention is shown."""
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


# ---- what is made of a run -------------------------------------------------------------------------


class SceneAttention(NamedTuple):
    """A scene and where its regions look: its objects, then its words."""

    scene: Scene
    image: Image.Image
    regions: Attention


@dataclass(frozen=True)
class Visuals:
    """All that was made of one run."""

    frames: Sequence[Frame]
    maps: Sequence[FrameMaps]
    """By the trained network, then by the untrained one."""
    side: int
    """Longest side at which the frames were read, in pixels."""
    attention: Sequence[SceneAttention]
    confusion: Confusion | None
    shards: ShardedDataset


def visualise(
    study: Study,
    frames: Path | None = None,
    side: int = 0,
    progress: Progress = quiet,
) -> Visuals:
    """Make all pictures of a study.

    Args:
        study: What was measured.
        frames: An image or a folder of frames to paint; random held-out scenes if None.
        side: Longest side of the painted frames, in pixels; 0 takes three times the training size.
        progress: Told of images.
    """
    run, config = study.run, study.config
    trained, untrained = run.trained(config.device), run.untrained(config.device)
    side = side or 3 * run.config.model.image_size
    drawn = _shuffled(len(study.queries.scenes), config.seed)[: max(FRAMES, 2 * ATTENDED)]
    scenes = [study.queries.scenes[place] for place in drawn]
    chosen = read_frames(frames) if frames else [Frame(s.key, open_image(s)) for s in scenes[:FRAMES]]
    maps = [paint(encoder, chosen, side, progress) for encoder in (trained, untrained)]
    attention = [_attend(trained, scene, side) for scene in [s for s in scenes if s.objects][:ATTENDED]]
    shards, centers = ShardedDataset(config.dataset), run.centers("object")
    confusion = None
    if centers is not None:
        confusion = confuse(shards, trained, centers, config.seed, config.batch, progress)
    return Visuals(chosen, maps, side, attention, confusion, shards)


def _attend(encoder: NetworkEncoder, scene: Scene, side: int) -> SceneAttention:
    image = open_image(scene)
    pixels, visible = encoder.prepare(image, scene.boxes.tolist(), side)
    return SceneAttention(scene, image, region_attention(encoder.model, pixels, visible))


def save_pictures(visuals: Visuals, folder: Path) -> None:
    """Write the frames and the trained network's maps as files into a folder, replacing older ones."""
    with new_folder(folder) as partial:
        for frame, own in zip(visuals.frames, visuals.maps[0].maps, strict=True):
            small = frame.image.copy()
            small.thumbnail(own.size, Image.Resampling.LANCZOS)
            small.save(partial / f"{frame.name}.frame.jpg", quality=88)
            own.save(partial / f"{frame.name}.map.jpg", quality=90)


# ---- what is drawn of it ---------------------------------------------------------------------------


def draw(total: int, wanted: int, seed: int) -> list[int]:
    """Draw at most so many of some things, in their order."""
    return sorted(_shuffled(total, seed)[:wanted])


def draw_objects(objects: RegionTable, wanted: int, seed: int) -> list[int]:
    """Draw one object of each class, then further ones, at most so many; in the order of their names."""
    order = _shuffled(len(objects), seed)
    first = {objects.names[row]: row for row in reversed(order)}
    chosen = sorted(order, key=lambda row: first[objects.names[row]] != row)
    return sorted(chosen[:wanted], key=lambda row: objects.names[row])


def _shuffled(total: int, seed: int) -> list[int]:
    order: list[int] = np.random.Generator(np.random.Philox(key=seed)).permutation(total).tolist()
    return order


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
    """The name of an object or a word, written on its box; all lengths in pixels of the scene."""

    kind: str
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


def overlay(image: Image.Image, weights: Floats, box: Floats) -> Image.Image:
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
    picture = Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
    edges = [min(round(float(edge) * side), most - 1) for edge, most in zip(box, size * 2, strict=True)]
    ImageDraw.Draw(picture).rectangle(edges, outline="white", width=2)
    return picture


def matrix_picture(matrix: NDArray[np.float64]) -> Image.Image:
    """A confusion matrix as a picture that suits light and dark pages: its ink is alpha."""
    alpha = (255 * np.sqrt(np.clip(matrix, 0, 1))).round().astype(np.uint8)
    ink = np.where(np.eye(len(matrix), dtype=bool)[..., None], RIGHT, WRONG)
    pixels = np.dstack([ink, np.maximum(alpha, np.uint8(14))])
    scale = max(1, MATRIX_SIDE // len(matrix))
    large = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    if scale > 4:
        large[::scale, :, 3] = 0
        large[:, ::scale, 3] = 0
    return Image.fromarray(large, mode="RGBA")


def cluster_picture(visuals: Visuals, cluster: int) -> Image.Image:
    """A region of one of the confused clusters."""
    assert visuals.confusion is not None
    # Clusters are confused only where a region of each was drawn.
    region = next(region for region in visuals.confusion.regions if region.label == cluster)
    return crop(sample_image(visuals.shards, region.sample), region.box)
