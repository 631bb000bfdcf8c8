"""Pictures of the report: PCA maps, attention of regions, confused clusters and crops.

What is shown is drawn at random by the study's seed, one object of each class where there is room; nothing is
picked by its looks. What a region token reads of its own patches shows what the region is known by, and the
same query over the whole image what else looks like it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megaregion.data.image import decode_image
from megaregion.data.shards import Datasets
from megaregion.errors import UserError
from megaregion.evaluation.clusters import Confusion, confuse
from megaregion.evaluation.encoders import Floats, as_array, crop
from megaregion.evaluation.encoding import Basis, Progress, fit_basis, quiet
from megaregion.evaluation.network import Attention, NetworkEncoder, patch_map, region_attention
from megaregion.evaluation.scenes import IMAGE_ENDINGS, RegionTable, Scene, open_image, read_image
from megaregion.evaluation.study import Study
from megaregion.files import new_folder

FRAMES = 6
"""Held-out scenes that are painted where no frames are named."""
MOST_FRAMES = 48
"""Frames that a page has room for; of a longer folder, evenly spaced ones are taken."""
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


class Frame(NamedTuple):
    """One picture, RGB."""

    name: str
    image: Image.Image


@dataclass(frozen=True)
class FrameMaps:
    """The maps of all frames by one encoder."""

    encoder: str
    maps: list[Image.Image]
    basis: Basis
    cells: tuple[int, int]
    """Rows and columns of patches of the first frame."""


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
    datasets: Datasets


def visualise(study: Study, frames: Path | None = None, side: int = 0, progress: Progress = quiet) -> Visuals:
    """Make all pictures of a study.

    Frames are painted from an image or a folder, random held-out scenes if None, at this longest side in
    pixels; 0 takes three times the training size.
    """
    run, config = study.run, study.config
    trained, untrained = run.trained(config.device), run.untrained(config.device)
    side = side or 3 * run.config.model.image_size
    drawn = _shuffled(len(study.queries.scenes), config.seed)[: max(FRAMES, 2 * ATTENDED)]
    scenes = [study.queries.scenes[place] for place in drawn]
    chosen = read_frames(frames) if frames else [Frame(s.key, open_image(s)) for s in scenes[:FRAMES]]
    maps = [paint(encoder, chosen, side, progress) for encoder in (trained, untrained)]
    attention = [_attend(trained, scene, side) for scene in [s for s in scenes if s.objects][:ATTENDED]]
    centers = run.centers("object")
    confusion = None
    if centers is not None:
        confusion = confuse(study.datasets, trained, centers, config.seed, config.batch, progress)
    return Visuals(chosen, maps, side, attention, confusion, study.datasets)


def read_frames(path: Path) -> list[Frame]:
    """Read an image, or a folder of frames by name; a UserError where there is none or one cannot be read."""
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS)
        if len(files) > MOST_FRAMES:
            files = [files[round(i)] for i in np.linspace(0, len(files) - 1, MOST_FRAMES)]
    if not files:
        wanted = f"an image or a folder of {', '.join(IMAGE_ENDINGS)} files"
        raise UserError(f"--frames {path} holds no image; name {wanted}")
    return [Frame(file.stem, read_image(file, "remove it from the frames")) for file in files]


def paint(
    encoder: NetworkEncoder, frames: Sequence[Frame], side: int, progress: Progress = quiet
) -> FrameMaps:
    """Colour every frame's patches by the principal components of all frames' patches.

    Rotary positions let the network read any size, so a picture may have many more patches than in training:
    side is the longest at which it is read, in pixels. All frames share one basis: the same feature has the
    same colour in every one of them, and a thing that moves through the frames of a video keeps its colour.
    """
    maps = []
    for done, frame in enumerate(frames, start=1):
        maps.append(high_map(encoder, frame.image, side))
        progress(f"PCA maps, {encoder.name}", done, len(frames))
    basis = fit_basis(maps)
    painted = [Image.fromarray(basis.colours(basis.project(own))) for own in maps]
    scales = [FRAME_SIDE / max(each.size) for each in painted]
    enlarged = [
        each.resize((round(each.width * scale), round(each.height * scale)), Image.Resampling.BICUBIC)
        for each, scale in zip(painted, scales, strict=True)
    ]
    return FrameMaps(encoder.name, enlarged, basis, maps[0].shape[:2])


@torch.inference_mode()
def high_map(encoder: NetworkEncoder, image: Image.Image, side: int) -> Floats:
    """Patch features of one picture at a given longest side, in its own shape, [h, w, D]."""
    return as_array(patch_map(encoder.model, encoder.prepare(image, [], side)[0])[0])


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


def attention_pictures(own: SceneAttention) -> Iterator[tuple[str, str, Image.Image]]:
    """A few regions of a scene: name, whether it reads or would read, and the attention."""
    for region, inside, anywhere in list(zip(own.scene.regions, *own.regions, strict=True))[:REGIONS]:
        yield region.name, "reads", overlay(own.image, inside, region.box)
        yield region.name, "would read", overlay(own.image, anywhere, region.box)


def overlay(image: Image.Image, weights: Floats, box: Sequence[float]) -> Image.Image:
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
    edges = [min(round(edge * side), most - 1) for edge, most in zip(box, size * 2, strict=True)]
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
    sample, region = next(own for own in visuals.confusion.regions if own[1].label == cluster)
    return crop(decode_image(visuals.datasets.read(sample).image), region.box)
