"""Scenes with known truth: what is in each image, and where; only the evaluation may read it.

Shapes: R regions of a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaregion.data.sample import RLE
from megaregion.errors import UserError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class TrueObject:
    """An object that stands in a scene; its box is in pixels, x1 and y1 exclusive."""

    name: str
    instance: str
    box: Box
    mask: RLE | None = None
    """What is seen of it, where the truth says so."""


@dataclass(frozen=True)
class TrueWord:
    """A word that is written in a scene; its box is in pixels, x1 and y1 exclusive."""

    text: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """One image and everything that is known to be in it."""

    key: str
    path: Path
    width: int
    height: int
    objects: tuple[TrueObject, ...]
    words: tuple[TrueWord, ...]

    @cached_property
    def boxes(self) -> NDArray[np.float32]:
        """Boxes of the objects, then of the words, [objects + words, 4]."""
        boxes = [item.box for item in self.objects] + [item.box for item in self.words]
        return np.asarray(boxes, np.float32).reshape(-1, 4)


@dataclass(frozen=True)
class RegionTable:
    """Regions of many scenes as columns; row r is a box of scene ``scene[r]``."""

    names: tuple[str, ...]
    """Class of each object or text of each word, R of them."""
    boxes: NDArray[np.float32]
    """[R, 4] in pixels."""
    scene: NDArray[np.int64]
    """[R], the scene's place in the list that the table was made from."""
    instances: tuple[str, ...]
    """The cut-out that each object shows, or the text again for words, R of them."""

    def __len__(self) -> int:
        return len(self.names)


def read_scenes(folder: Path) -> list[Scene]:
    """Read one split of a scene set, as tools/make_scenes.py writes it.

    Args:
        folder: Folder with truth.jsonl and images/.

    Raises:
        UserError: The file is missing or empty, or a line of it is not a scene.
    """
    path = folder / "truth.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; tools/make_scenes.py writes it")
    scenes = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            scenes.append(_parse_scene(json.loads(line), folder))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path} line {number} is not a scene ({reason}); make the scenes again"
            ) from None
    if not scenes:
        raise UserError(f"{path} is empty; make the scenes again with tools/make_scenes.py")
    return scenes


def pick_scenes(scenes: Sequence[Scene], regions: int, seed: int) -> list[Scene]:
    """Draw whole scenes until they hold this many objects, so that no image is read for one box.

    Args:
        scenes: Scenes to draw from.
        regions: Objects wanted; 0 takes every scene.
        seed: The draw is a function of it; a larger wish only adds scenes.

    Returns:
        The drawn scenes, in the order of ``scenes``.
    """
    if regions <= 0:
        return list(scenes)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(scenes))
    held = np.cumsum([len(scenes[i].objects) for i in order])
    drawn = int(np.searchsorted(held, regions)) + 1
    return [scenes[i] for i in sorted(order[:drawn])]


def object_table(scenes: Sequence[Scene]) -> RegionTable:
    """All objects of the scenes, scene by scene."""
    return _table([[(item.name, item.instance, item.box) for item in scene.objects] for scene in scenes])


def word_table(scenes: Sequence[Scene]) -> RegionTable:
    """All words of the scenes, scene by scene."""
    return _table([[(item.text, item.text, item.box) for item in scene.words] for scene in scenes])


def _table(rows: Sequence[Sequence[tuple[str, str, Box]]]) -> RegionTable:
    flat = [region for regions in rows for region in regions]
    return RegionTable(
        names=tuple(name for name, _, _ in flat),
        instances=tuple(instance for _, instance, _ in flat),
        boxes=np.asarray([box for _, _, box in flat], np.float32).reshape(-1, 4),
        scene=np.repeat(np.arange(len(rows), dtype=np.int64), [len(regions) for regions in rows]),
    )


def _parse_scene(line: Mapping[str, Any], folder: Path) -> Scene:
    width, height = int(line["width"]), int(line["height"])
    return Scene(
        key=str(line["key"]),
        path=folder / "images" / f"{line['key']}.jpg",
        width=width,
        height=height,
        objects=tuple(
            TrueObject(
                name=str(item["class"]),
                instance=str(item.get("instance", "")),
                box=_parse_box(item["box"], width, height),
                mask=_parse_mask(item.get("mask"), width, height),
            )
            for item in line["objects"]
        ),
        words=tuple(
            TrueWord(text=str(item["text"]), box=_parse_box(item["box"], width, height))
            for item in line["words"]
        ),
    )


def _parse_mask(values: Mapping[str, Any] | None, width: int, height: int) -> RLE | None:
    if values is None:
        return None
    rle = RLE((int(values["size"][0]), int(values["size"][1])), tuple(int(run) for run in values["counts"]))
    if rle.size != (height, width):
        raise ValueError(f"mask of {rle.size[1]} x {rle.size[0]} pixels in a scene of {width} x {height}")
    return rle


def _parse_box(values: Sequence[float], width: int, height: int) -> Box:
    x0, y0, x1, y1 = (float(value) for value in values)
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x0 >= x1 or y0 >= y1:
        raise ValueError(f"box {values} has no area")
    # Half a pixel of slack: truth that was measured on a rotated word may touch the border from outside.
    if x0 < -0.5 or y0 < -0.5 or x1 > width + 0.5 or y1 > height + 0.5:
        raise ValueError(f"box {values} leaves its image of {width} x {height}")
    return x0, y0, x1, y1
