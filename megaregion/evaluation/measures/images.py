"""Image classification on any folder of images: k-NN and a linear probe on whole-image features.

    FOLDER/CLASS/*.jpg                                seeds draw which fifth of each class is asked about
    FOLDER/train/CLASS/*.jpg  FOLDER/test/CLASS/*     fixed split (val or test); seeds draw the gallery

Shapes: B images of a batch, C feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaregion.errors import UserError
from megaregion.evaluation.classifiers import NEIGHBOURS
from megaregion.evaluation.encoders import Encoder
from megaregion.evaluation.encoding import Batches
from megaregion.evaluation.measures.recognition import Labelled, draw_scenes, majority_share, recognise
from megaregion.evaluation.scenes import IMAGE_ENDINGS, read_image
from megaregion.schemas.evaluation import Column, Table

ASKED_SPLITS = ("test", "val")
ASKED_SHARE = 0.2
"""Share of each class that is asked about where the folder has no split of its own."""


@dataclass(frozen=True)
class ImageFolder:
    """Images in folders named after their classes."""

    folder: Path
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    """Class of each image."""
    asked: NDArray[np.bool_] | None
    """Which images are asked about; None where seeds draw them."""


def read_image_folder(folder: Path) -> ImageFolder:
    """List a folder of images.

    Raises:
        UserError: It is missing, or holds fewer than two classes of at least two images.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} does not exist; name a folder with one subfolder a class")
    split = next((name for name in ASKED_SPLITS if (folder / name).is_dir()), None)
    if split is not None and (folder / "train").is_dir():
        known, asked = _list(folder / "train"), _list(folder / split)
        unknown = sorted({name for _, name in asked} - {name for _, name in known})
        if unknown:
            raise UserError(f"{folder / split} has the class {unknown[0]}, which {folder / 'train'} lacks")
        flags = np.repeat([False, True], [len(known), len(asked)])
        found = ImageFolder(folder, *_columns(known + asked), flags)
    else:
        found = ImageFolder(folder, *_columns(_list(folder)), None)
    counts = {name: found.names.count(name) for name in set(found.names)}
    if len(counts) < 2 or min(counts.values()) < 2:
        raise UserError(
            f"--images {folder} holds {len(counts)} classes, the smallest of "
            f"{min(counts.values(), default=0)} images; "
            "at least 2 classes of 2 images each are needed, one subfolder a class"
        )
    return found


def image_table(
    folder: ImageFolder,
    encoders: Sequence[Encoder],
    seeds: int,
    batches: Batches,
) -> Table:
    """Measure every encoder; seeds draw the split, or the gallery where the split is fixed.

    Raises:
        UserError: An image cannot be read.
    """
    read, asks = partial(read_image, advice="remove it from the folder"), {e.name: e.images for e in encoders}
    features = batches.ask(folder.folder.name, folder.paths, read, asks)
    draws = [_draw(folder, seed, seeds) for seed in range(seeds)]
    names, fixed = np.asarray(folder.names), folder.asked is not None
    chance = float(
        np.mean([majority_share(names[~asked].tolist(), names[asked].tolist()) for _, asked in draws])
    )
    how = (
        f"fixed split, mean over {seeds} galleries"
        if fixed
        else f"a fifth of each class, mean over {seeds} splits"
    )
    told = (
        f"{int(draws[0][1].sum()):,} of {len(names):,} images of {folder.folder.name} in "
        f"{len(set(folder.names))} classes are asked about ({how})."
    )
    columns = (Column("knn", f"{NEIGHBOURS}-NN", chance), Column("linear", "linear probe", chance))
    rows = {}
    paths = [str(path) for path in folder.paths]
    for name, own in features.items():
        images = Labelled(np.concatenate(own), folder.names, paths, np.arange(len(names)))
        rows[name] = recognise(images, images, draws, tuning=~draws[0][1])
    return Table("image", "Naming images", told, columns, rows, "most frequent class")


def _draw(folder: ImageFolder, seed: int, seeds: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Images of a seed's gallery, and those that it asks about: a fifth of each class, never all."""
    if folder.asked is not None:
        gallery = np.flatnonzero(~folder.asked)
        known = np.zeros_like(folder.asked)
        known[gallery[draw_scenes(gallery, seed, seeds)]] = True
        return known, folder.asked
    names = np.asarray(folder.names)
    rng = np.random.Generator(np.random.Philox(key=seed))
    asked = np.zeros(len(names), np.bool_)
    for name in sorted(set(folder.names)):
        own = rng.permutation(np.flatnonzero(names == name))
        asked[own[: max(1, round(ASKED_SHARE * len(own)))]] = True
    return ~asked, asked


def _list(folder: Path) -> list[tuple[Path, str]]:
    return [
        (path, part.name)
        for part in sorted(folder.iterdir())
        if part.is_dir()
        for path in sorted(part.rglob("*"))
        if path.suffix.lower() in IMAGE_ENDINGS
    ]


def _columns(rows: Sequence[tuple[Path, str]]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    return tuple(path for path, _ in rows), tuple(name for _, name in rows)
