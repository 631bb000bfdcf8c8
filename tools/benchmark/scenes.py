"""Composed scenes to measure curation on: pixels with their truth, and embeddings of their crops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megaregion.curation.embeddings import unit
from megaregion.curation.engines import load_embedder
from megaregion.curation.picture import Pixels, crop, read_picture
from megaregion.demo.assets import load_library
from megaregion.demo.scenes import SceneMaker, SceneSettings
from megaregion.errors import UserError
from megaregion.files import new_file

CROPS_PER_SCENE = 12
"""Every object and every word, the rest random boxes: proposals hit background too."""
CROP_SIDE = 128
"""Side, in pixels, at which curation embeds by default."""


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
