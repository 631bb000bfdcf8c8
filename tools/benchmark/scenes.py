"""Composed scenes to measure curation on: folders of images, pixels with their truth, embedded crops."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from megaregion.curation.embeddings import unit
from megaregion.curation.engines import load_embedder
from megaregion.curation.picture import Pixels, crop, read_picture
from megaregion.demo.assets import load_library
from megaregion.demo.folder import write_scenes
from megaregion.demo.scenes import Scene, SceneMaker, SceneSettings
from megaregion.errors import UserError
from megaregion.files import new_file

MAX_PIXELS = 10**8
CROPS_PER_SCENE = 12
"""Every object and every word, the rest random boxes: proposals hit background too."""
CROP_SIDE = 128
"""Side, in pixels, at which curation embeds by default."""


@dataclass(frozen=True)
class ComposedScene:
    """One image and the truth about it, as in truth.jsonl."""

    pixels: NDArray[np.uint8]
    truth: dict[str, Any]


@contextmanager
def scene_folder(count: int, side: int) -> Iterator[Path]:
    """A folder with images/ and truth.jsonl of so many scenes of side x side pixels; it goes away again."""
    with tempfile.TemporaryDirectory(prefix="benchmark-scenes-") as folder:
        out = Path(folder) / "scenes"
        write_scenes(out, load_library(), SceneSettings(0, ((side, side),)), {"train": count}, workers=1)
        yield out / "train"


def compose_scenes(count: int, side: int) -> list[ComposedScene]:
    """So many scenes, in memory."""
    with scene_folder(count, side) as folder:
        lines = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
        contents = [(folder / "images" / f"{line['key']}.jpg").read_bytes() for line in lines]
    return [
        ComposedScene(read_picture(content, MAX_PIXELS).pixels, line)
        for content, line in zip(contents, lines, strict=True)
    ]


def scene_features(path: Path, crops: int) -> NDArray[np.float32]:
    """Embeddings of crops of scenes; made where the file is missing, about 7 ms a crop on one core.

    Args:
        path: File to read or to make, float16 [n, 1280].
        crops: How many are asked for.

    Returns:
        Unit vectors, float32 [crops, 1280].

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
    maker = SceneMaker(load_library(), SceneSettings(seed=1), "train")
    embedder = load_embedder("lite0", side=CROP_SIDE)
    features = []
    with tqdm(total=crops, desc="embed crops of scenes", unit="crop", disable=None) as bar:
        for index in range(-(-crops // CROPS_PER_SCENE)):
            found = embedder.embed(_crops(maker.make(index), index))
            features.append(found.astype(np.float16))
            bar.update(len(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        np.save(file, np.concatenate(features)[:crops], allow_pickle=False)


def _crops(scene: Scene, index: int) -> list[Pixels]:
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
    pixels = np.asarray(Image.open(io.BytesIO(scene.jpeg)).convert("RGB"))
    return [crop(pixels, (x0, y0, x1, y1)) for x0, y0, x1, y1 in boxes[:CROPS_PER_SCENE].tolist()]
