"""Image classification on any folder of images: k-NN and a linear probe on whole-image features.

FOLDER/CLASS/*.jpg                                seeds draw which fifth of each class is asked about
FOLDER/train/CLASS/*.jpg  FOLDER/test/CLASS/*     fixed split (val or test); seeds draw the gallery
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megaregion.errors import UserError
from megaregion.evaluation.encoders import Encoder
from megaregion.evaluation.encoding import Batches
from megaregion.evaluation.measures.recognition import (
    Draw,
    class_columns,
    draw_scenes,
    majority_share,
    recognise,
)
from megaregion.evaluation.scenes import IMAGE_ENDINGS, read_image, unboxed
from megaregion.schemas.evaluation import Table

ASKED_SPLITS = ("test", "val")
ASKED_SHARE = 0.2
"""Share of each class that is asked about where the folder has no split of its own."""


@dataclass(frozen=True)
class ImageFolder:
    """Images in folders named after their classes."""

    folder: Path
    paths: Sequence[Path]
    names: Sequence[str]
    """Class of each image."""
    asked: NDArray[np.bool_] | None
    """Which images are asked about; None where seeds draw them."""
    others: int
    """Files that no ending of an image marks, and that are left out."""


def read_image_folder(folder: Path) -> ImageFolder:
    """List a folder of images; a UserError where it lacks two classes of at least two images each."""
    if not folder.is_dir():
        raise UserError(f"--images {folder} does not exist; name a folder with one subfolder a class")
    train, split = folder / "train", next((s for s in ASKED_SPLITS if (folder / s).is_dir()), None)
    parts = [train, folder / split] if split and train.is_dir() else [folder]
    classes = [(part, own) for part in parts for own in sorted(part.iterdir()) if own.is_dir()]
    files = [
        (part, own.name, path) for part, own in classes for path in sorted(own.rglob("*")) if path.is_file()
    ]
    images = [file for file in files if file[2].suffix.lower() in IMAGE_ENDINGS]
    asked = np.asarray([part == parts[1] for part, _, _ in images]) if len(parts) > 1 else None
    if asked is not None:
        known = {name for part, name, _ in images if part == train}
        for part, name, _ in images:
            if name not in known:
                raise UserError(f"{part} has the class {name}, which {train} lacks")
    counts = Counter(name for _, name, _ in images)
    others = len(files) - len(images)
    if len(counts) < 2 or min(counts.values()) < 2:
        raise UserError(
            f"--images {folder} holds {len(counts)} classes, the smallest of "
            f"{min(counts.values(), default=0)} images{f' ({_left_out(others)})' if others else ''}; "
            "at least 2 classes of 2 images each are needed, one subfolder a class"
        )
    return ImageFolder(folder, [path for *_, path in images], [name for _, name, _ in images], asked, others)


def _left_out(others: int) -> str:
    return f"{others:,} files that are no {', '.join(IMAGE_ENDINGS)} are left out"


def image_table(folder: ImageFolder, encoders: Sequence[Encoder], seeds: int, batches: Batches) -> Table:
    """Measure every encoder that names images; seeds draw the split, or galleries where that is fixed."""
    read = partial(read_image, advice="remove it from the folder")
    asks = {encoder.name: encoder.images for encoder in encoders if encoder.names_images}
    features = batches.ask(folder.folder.name, folder.paths, read, asks)
    draws = [_draw(folder, seed, seeds) for seed in range(seeds)]
    names, asked = np.asarray(folder.names), draws[0][1]
    how = f"a fifth of each class, mean over {seeds} splits"
    if folder.asked is not None:
        how = f"fixed split, mean over {seeds} galleries"
    told = (
        f"{int(asked.sum()):,} of {len(names):,} images of {folder.folder.name} in "
        f"{len(set(folder.names))} classes are asked about ({how})."
    )
    if folder.others:
        told += f" {_left_out(folder.others)}."
    rows, paths = {}, [str(path) for path in folder.paths]
    for name, own in features.items():
        images = np.concatenate(own), unboxed(folder.names, paths, np.arange(len(names)))
        rows[name] = recognise(images, images, draws, tuning=~asked)
    chances = [majority_share(names[~asked].tolist(), names[asked].tolist()) for _, asked in draws]
    columns = class_columns(float(np.mean(chances)))
    return Table("image", "Naming images", told, columns, rows, "most frequent class")


def _draw(folder: ImageFolder, seed: int, seeds: int) -> Draw:
    """Images of a seed's gallery, and those that it asks about: a fifth of each class, never all."""
    names = np.asarray(folder.names)
    if folder.asked is not None:
        gallery = np.flatnonzero(~folder.asked)
        return np.isin(np.arange(len(names)), gallery[draw_scenes(gallery, seed, seeds)]), folder.asked
    rng = np.random.Generator(np.random.Philox(key=seed))
    asked = np.zeros(len(names), np.bool_)
    for name in sorted(set(folder.names)):
        own = rng.permutation(np.flatnonzero(names == name))
        asked[own[: max(1, round(ASKED_SHARE * len(own)))]] = True
    return ~asked, asked
