"""Composed scenes to measure curation and evaluation on: pixels with their truth, and embeddings of crops."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmark.measure import Stopwatch, passing_folder
from benchmark.memory import PeakMemory
from benchmark.part import FOLDER, Case, part
from megaregion.bounds import PositiveInt
from megaregion.config import DataConfig, ModelConfig
from megaregion.curation.embeddings import unit
from megaregion.curation.engines import load_embedder
from megaregion.curation.picture import Pixels, crop, read_picture
from megaregion.data.transforms import EvalTransform
from megaregion.demo.assets import load_library
from megaregion.demo.scenes import SceneMaker, SceneSettings
from megaregion.errors import UserError
from megaregion.evaluation.annotated import read_annotated
from megaregion.evaluation.encoders import PooledEncoder
from megaregion.evaluation.harness import score_regions
from megaregion.files import new_file

CROPS_PER_SCENE = 12
"""Every object and every word, the rest random boxes: proposals hit background too."""
CROP_SIDE = 128
"""Side, in pixels, at which curation embeds by default."""


OUTLINE, NAMES, CELLS = 24, 80, 16
"""Corners of a polygon and classes, as of COCO; rows and columns of patches, as of a ViT-L/14 at 224."""


class ComposedScene(NamedTuple):
    """One image and the truth about it, as in truth.jsonl."""

    pixels: Pixels
    truth: dict[str, Any]


def compose(count: int, side: int, seed: int = 0) -> Iterator[ComposedScene]:
    """So many scenes of ``side`` x ``side`` pixels."""
    maker = SceneMaker(load_library(), SceneSettings(seed, ((side, side),)), "train")
    for index in range(count):
        scene = maker.make(index)
        yield ComposedScene(read_picture(scene.jpeg, max_pixels=10**8).pixels, scene.truth)


def scene_features(path: Path, crops: int) -> NDArray[np.float32]:
    """Unit embeddings of so many crops of scenes, float32 [crops, 1280].

    The file, float16 [n, 1280], is made where it is missing, about 7 ms a crop on one core.

    Raises:
        UserError: The file holds fewer, or something else.
    """
    if not path.exists():
        _write_features(path, crops)
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        raise UserError(f"--features {path} is no .npy file; name another, it is made if missing") from None
    if found.ndim != 2 or len(found) < crops:
        raise UserError(
            f"--features {path} has shape {found.shape}, {crops} rows are needed; remove it to have it made"
        )
    return unit(np.asarray(found[:crops], dtype=np.float32))


def _write_features(path: Path, crops: int) -> None:
    embedder = load_embedder("lite0", side=CROP_SIDE)
    features = []
    with tqdm(total=crops, desc="embed crops of scenes", unit="crop", disable=None) as bar:
        for index, scene in enumerate(compose(-(-crops // CROPS_PER_SCENE), 256, seed=1)):
            found = embedder.embed(_crops(scene, index))
            features.append(found.astype(np.float16))
            bar.update(len(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        np.save(file, np.concatenate(features)[:crops], allow_pickle=False)


def _crops(scene: ComposedScene, index: int) -> list[Pixels]:
    """Crops as a proposer would give them: boxes are off by a few percent."""
    rng = np.random.Generator(np.random.Philox(key=index))
    width, height = scene.truth["width"], scene.truth["height"]
    true = [item["box"] for item in (*scene.truth["objects"], *scene.truth["words"])]
    boxes = np.array(true, dtype=float)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes = boxes + sides * rng.uniform(-0.06, 0.06, boxes.shape)
    others = max(CROPS_PER_SCENE - len(boxes), 0)
    size = rng.uniform(0.2, 0.6, (others, 2)) * (width, height)
    corner = rng.uniform(0, 1, (others, 2)) * ((width, height) - size)
    boxes = np.concatenate([boxes, np.concatenate([corner, corner + size], axis=1)])
    return [crop(scene.pixels, (x0, y0, x1, y1)) for x0, y0, x1, y1 in boxes[:CROPS_PER_SCENE].tolist()]


@part(
    ("--images", PositiveInt, 5_000, "images, as many as val2017 has"),
    ("--regions", PositiveInt, 36_000, "regions with a polygon each"),
    ("--channels", PositiveInt, 1_024, "feature width"),
    FOLDER,
)
def annotated(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Peak memory and time of `evaluate.py --annotations` on a composed COCO file, beside a tenth of it.

    All measures but proposals, by boxes and masks. The encoder's features are random projections of colours:
    the harness is measured, and no network.
    """
    with passing_folder(options.folder, 10**9) as folder:
        sizes = [(max(1, options.images // part), max(1, options.regions // part)) for part in (1, 10)]
        found = []
        for images, regions in sizes:
            _compose_annotated(folder / str(images), images, regions)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                job = pool.submit(_score_annotated, folder / str(images), options.channels)
                found.append(watch.timed(job.result))
        told = f"{sizes[0][0]:,} images, {sizes[0][1]:,} regions / a tenth"
        (peak, seconds), (least, fewest) = found
        yield Case(f"{told}, peak", peak / 2**20, least / 2**20, "MiB")
        yield Case(f"{told}, time", seconds, fewest, "s")


def _compose_annotated(folder: Path, images: int, regions: int) -> None:
    """COCO's JSON, and images of 640 x 480 of which every hundredth is a file of its own."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.Generator(np.random.Philox(key=2))
    for number in range(images):
        path = folder / "images" / f"{number}.jpg"
        if number % 100:
            path.hardlink_to(folder / "images" / f"{number - number % 100}.jpg")
        else:
            pixels = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((640, 480)).save(path)
    turns = np.linspace(0, 2 * np.pi, OUTLINE, endpoint=False)
    rows = []
    for number in range(regions):
        middle, radius = rng.uniform((60, 60), (580, 420)), rng.uniform(10, 60, (OUTLINE, 1))
        corners = (middle + radius * np.stack([np.cos(turns), np.sin(turns)], 1)).round(2)
        rows.append({"image_id": number % images, "category_id": int(rng.integers(NAMES)),
                     "bbox": [1, 1, 9, 9], "segmentation": [corners.ravel().tolist()]})  # fmt: skip
    files = [{"id": n, "file_name": f"{n}.jpg", "width": 640, "height": 480} for n in range(images)]
    content = {"images": files, "annotations": rows}
    content["categories"] = [{"id": number, "name": f"class {number}"} for number in range(NAMES)]
    (folder / "coco.json").write_text(json.dumps(content))


def _score_annotated(folder: Path, channels: int) -> int:
    """Peak bytes of this process after all measures of one encoder."""
    import torch

    projection = np.random.Generator(np.random.Philox(key=3)).standard_normal((3, channels))

    def see(images: Sequence[Image.Image]) -> list[NDArray[np.float32]]:
        small = (np.asarray(image.resize((CELLS, CELLS)), np.float32) / 255 for image in images)
        return [(own @ projection).astype(np.float32) for own in small]

    transform = EvalTransform(DataConfig(), ModelConfig(image_size=14 * CELLS, patch_size=14))
    data = read_annotated(folder / "coco.json", folder / "images")
    score_regions([PooledEncoder("colours", see, transform)], data)
    return PeakMemory(torch.device("cpu")).peak()
