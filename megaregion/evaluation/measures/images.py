"""Image classification on any folder of images: k-NN and a linear probe on whole-image features.

    FOLDER/CLASS/*.jpg                                seeds draw which fifth of each class is asked about
    FOLDER/train/CLASS/*.jpg  FOLDER/test/CLASS/*     fixed split (val or test); seeds draw the gallery

Shapes: B images of a batch, C feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.data.image import to_rgb
from megaregion.errors import UserError
from megaregion.evaluation.classifiers import NEIGHBOURS
from megaregion.evaluation.encoders import Encoder
from megaregion.evaluation.encoding import Progress
from megaregion.evaluation.measures.recognition import Labelled, draw_scenes, majority_share, recognise
from megaregion.schemas.evaluation import Column, Table

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
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
    batch: int,
    workers: int,
    progress: Progress = lambda split, done, images: None,
) -> Table:
    """Measure every encoder.

    Args:
        folder: The images.
        encoders: Encoders of whole images.
        seeds: Draws of the split, or of the gallery where the split is fixed.
        batch: Images that go through an encoder at once.
        workers: Threads that read images.
        progress: Told of images as they are encoded.

    Raises:
        UserError: An image cannot be read.
    """
    features = _encode(folder, encoders, batch, workers, progress)
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
    for name, own in features.items():
        images = Labelled(own, folder.names, [str(path) for path in folder.paths], np.arange(len(names)))
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


def _encode(
    folder: ImageFolder,
    encoders: Sequence[Encoder],
    batch: int,
    workers: int,
    progress: Progress,
) -> Mapping[str, NDArray[np.float32]]:
    parts: dict[str, list[NDArray[np.float32]]] = {encoder.name: [] for encoder in encoders}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in range(0, len(folder.paths), batch):
            images = list(pool.map(_open, folder.paths[start : start + batch]))
            for encoder in encoders:
                parts[encoder.name].append(encoder.images(images))
            progress(folder.folder.name, min(start + batch, len(folder.paths)), len(folder.paths))
    return {name: np.concatenate(own) for name, own in parts.items()}


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return to_rgb(file)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it from the folder") from None


def _list(folder: Path) -> list[tuple[Path, str]]:
    return [
        (path, part.name)
        for part in sorted(folder.iterdir())
        if part.is_dir()
        for path in sorted(part.rglob("*"))
        if path.suffix.lower() in ENDINGS
    ]


def _columns(rows: Sequence[tuple[Path, str]]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    return tuple(path for path, _ in rows), tuple(name for _, name in rows)
