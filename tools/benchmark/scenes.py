"""Composed scenes for benchmarks of curation: made once a call, in a temporary folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.picture import read_picture
from megaregion.demo.assets import load_library
from megaregion.demo.folder import write_scenes
from megaregion.demo.scenes import SceneSettings

MAX_PIXELS = 10**8


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


def copy_some(images: Path, target: Path, count: int) -> None:
    """Copy the first images of a folder."""
    target.mkdir(parents=True)
    for path in sorted(images.iterdir())[:count]:
        shutil.copy2(path, target)
