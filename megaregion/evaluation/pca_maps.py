"""PCA maps: patch features of pictures at high resolution, coloured by their principal components.

Rotary positions let the network read any size, so a picture may have many more patches than in training.
All pictures of an encoder share one basis: the same feature has the same colour in every one of them, and
a thing that moves through the frames of a video keeps its colour.

Shapes: h x w patches of a picture, C channels of a feature, D width of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megaregion.errors import UserError
from megaregion.evaluation.encoders import Floats, as_array
from megaregion.evaluation.encoding import Progress, quiet
from megaregion.evaluation.network import NetworkEncoder, patch_map
from megaregion.evaluation.scenes import IMAGE_ENDINGS, read_image

MOST_FRAMES = 48
"""Frames that a page has room for; of a longer folder, evenly spaced ones are taken."""
SHOWN_SIDE = 384
"""Longest side of a map in the page, in pixels."""
COLOURS = 3
MOST_CELLS = 100_000
"""Cells that a basis is fitted on, evenly strided over all maps."""


class Frame(NamedTuple):
    """One picture, RGB."""

    name: str
    image: Image.Image


@dataclass(frozen=True)
class Basis:
    """Three directions, fitted once and used for every picture."""

    mean: Floats
    """[C]."""
    directions: Floats
    """[C, 3], most variance first."""
    low: Floats
    """Value of each component that is drawn as 0, [3]."""
    high: Floats
    """Value of each component that is drawn as 255, [3]."""
    explained: float
    """Share of the cells' variance that the three hold."""

    def project(self, features: Floats) -> Floats:
        """Components of features [..., C], as [..., 3]."""
        return ((features - self.mean) @ self.directions).astype(np.float32, copy=False)

    def colours(self, components: Floats) -> NDArray[np.uint8]:
        """Components [h, w, 3] as red, green and blue."""
        scaled = (components - self.low) / np.maximum(self.high - self.low, 1e-9)
        return np.asarray((255 * np.clip(scaled, 0, 1)).round(), np.uint8)


@dataclass(frozen=True)
class FrameMaps:
    """The maps of all frames by one encoder."""

    encoder: str
    maps: list[Image.Image]
    basis: Basis
    cells: tuple[int, int]
    """Rows and columns of patches of the first frame."""


def read_frames(path: Path) -> list[Frame]:
    """Read an image, or a folder of frames in the order of their names.

    Raises:
        UserError: There is no image, or one cannot be read.
    """
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
    encoder: NetworkEncoder,
    frames: Sequence[Frame],
    side: int,
    progress: Progress = quiet,
) -> FrameMaps:
    """Colour every frame's patches by the principal components of all frames' patches.

    Args:
        encoder: The network.
        frames: Pictures of any sizes.
        side: Longest side at which the network reads them, in pixels, rounded to whole patches.
        progress: Told of frames.
    """
    maps = []
    for done, frame in enumerate(frames, start=1):
        maps.append(high_map(encoder, frame.image, side))
        progress(f"PCA maps, {encoder.name}", done, len(frames))
    basis = fit_basis(maps)
    painted = [Image.fromarray(basis.colours(basis.project(own))) for own in maps]
    scales = [SHOWN_SIDE / max(each.size) for each in painted]
    enlarged = [
        each.resize((round(each.width * scale), round(each.height * scale)), Image.Resampling.BICUBIC)
        for each, scale in zip(painted, scales, strict=True)
    ]
    return FrameMaps(encoder.name, enlarged, basis, maps[0].shape[:2])


@torch.inference_mode()
def high_map(encoder: NetworkEncoder, image: Image.Image, side: int) -> Floats:
    """Patch features of one picture at a given longest side, in its own shape, [h, w, D]."""
    return as_array(patch_map(encoder.model, encoder.prepare(image, [], side)[0])[0])


def fit_basis(maps: Sequence[Floats]) -> Basis:
    """Fit one basis on the cells of all maps of an encoder, [h, w, C] each."""
    cells = np.concatenate([own.reshape(-1, own.shape[-1]) for own in maps])
    cells = cells[:: max(1, len(cells) // MOST_CELLS)]
    mean = cells.mean(axis=0)
    centred = (cells - mean).astype(np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    directions = vectors[:, ::-1][:, :COLOURS]
    directions = np.pad(directions, ((0, 0), (0, COLOURS - directions.shape[1])))
    # The sign of an eigenvector is chance; fixed so, the same features give the same picture.
    largest = directions[np.abs(directions).argmax(axis=0), range(COLOURS)]
    directions = directions * np.where(largest < 0, -1, 1)
    low, high = np.quantile(centred @ directions, (0.01, 0.99), axis=0)
    explained = float(values[::-1][:COLOURS].sum() / max(values.sum(), 1e-12))
    mean, directions, low, high = (each.astype(np.float32) for each in (mean, directions, low, high))
    return Basis(mean, directions, low, high, explained)
