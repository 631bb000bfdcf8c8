"""PCA maps: patch features of pictures at high resolution, coloured by their principal components.

Rotary positions let the network read any size, so a picture may have many more patches than in training.
All pictures of an encoder share one basis: the same feature has the same colour in every one of them, and
a thing that moves through the frames of a video keeps its colour.

Shapes: h x w patches of a picture, C channels of a feature, D width of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megaregion.data.image import to_rgb
from megaregion.errors import UserError
from megaregion.evaluation.encoding import SceneMap
from megaregion.evaluation.network import NetworkEncoder, patch_map

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
MOST_FRAMES = 48
"""Frames that a page has room for; of a longer folder, evenly spaced ones are taken."""
SHOWN_SIDE = 384
"""Longest side of a map in the page, in pixels."""
COLOURS = 3
MOST_CELLS = 100_000
"""Cells that a basis is fitted on, evenly strided over all maps."""


@dataclass(frozen=True)
class Frame:
    """One picture."""

    name: str
    image: Image.Image
    """RGB."""


@dataclass(frozen=True)
class Basis:
    """Three directions, fitted once and used for every picture."""

    mean: NDArray[np.float32]
    """[C]."""
    directions: NDArray[np.float32]
    """[C, 3], most variance first."""
    low: NDArray[np.float32]
    """Value of each component that is drawn as 0, [3]."""
    high: NDArray[np.float32]
    """Value of each component that is drawn as 255, [3]."""
    explained: float
    """Share of the cells' variance that the three hold."""

    def project(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Components of features [..., C], as [..., 3]."""
        components = (features - self.mean) @ self.directions
        return components.astype(np.float32, copy=False)

    def colours(self, components: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Components [h, w, 3] as red, green and blue."""
        scaled = (components - self.low) / np.maximum(self.high - self.low, 1e-9)
        colours: NDArray[np.uint8] = (255 * np.clip(scaled, 0, 1)).round().astype(np.uint8)
        return colours


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
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
        if len(files) > MOST_FRAMES:
            files = [files[round(i)] for i in np.linspace(0, len(files) - 1, MOST_FRAMES)]
    if not files:
        raise UserError(
            f"--frames {path} holds no image; name an image or a folder of {', '.join(ENDINGS)} files"
        )
    frames = []
    for file in files:
        try:
            with Image.open(file) as image:
                frames.append(Frame(file.stem, to_rgb(image)))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{file} cannot be read ({error}); remove it from the frames") from None
    return frames


def paint(
    encoder: NetworkEncoder,
    frames: Sequence[Frame],
    side: int,
    progress: Callable[[int], None] = lambda done: None,
) -> FrameMaps:
    """Colour every frame's patches by the principal components of all frames' patches.

    Args:
        encoder: The network.
        frames: Pictures of any sizes.
        side: Longest side at which the network reads them, in pixels; rounded to whole patches.
        progress: Called with 1 after each frame.
    """
    maps = []
    for frame in frames:
        maps.append(high_map(encoder, frame.image, side))
        progress(1)
    basis = fit_basis(maps)
    colours = [Image.fromarray(basis.colours(basis.project(own))) for own in maps]
    return FrameMaps(encoder.name, [_enlarged(each) for each in colours], basis, maps[0].shape[:2])


def high_map(encoder: NetworkEncoder, image: Image.Image, side: int) -> NDArray[np.float32]:
    """Patch features of one picture at a given longest side, in its own shape, [h, w, D]."""
    pixels, _ = encoder.prepare(
        image, [], fitting_size(image.size, side, encoder.model.vit.config.patch_size)
    )
    with torch.inference_mode():
        array: NDArray[np.float32] = patch_map(encoder.model, pixels)[0].float().cpu().numpy()
    return array


def fitting_size(size: tuple[int, int], side: int, patch: int) -> tuple[int, int]:
    """Height and width in whole patches, for a picture of this width and height and a longest side."""
    scale = side / max(size)
    width, height = (max(1, round(edge * scale / patch)) * patch for edge in size)
    return height, width


def fit_basis(maps: Sequence[SceneMap]) -> Basis:
    """Fit one basis on the cells of all maps of an encoder, [h, w, C] each."""
    cells = np.concatenate([own.reshape(-1, own.shape[-1]) for own in maps])
    cells = cells[:: max(1, len(cells) // MOST_CELLS)]
    mean = cells.mean(axis=0)
    centred = (cells - mean).astype(np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    directions = vectors[:, ::-1][:, :COLOURS]
    if directions.shape[1] < COLOURS:
        directions = np.pad(directions, ((0, 0), (0, COLOURS - directions.shape[1])))
    # The sign of an eigenvector is chance; fixed so, the same features give the same picture.
    directions = directions * np.where(
        directions[np.abs(directions).argmax(axis=0), range(COLOURS)] < 0, -1, 1
    )
    components = centred @ directions
    low, high = np.quantile(components, (0.01, 0.99), axis=0)
    return Basis(
        mean.astype(np.float32),
        directions.astype(np.float32),
        low.astype(np.float32),
        high.astype(np.float32),
        float(values[::-1][:COLOURS].sum() / max(values.sum(), 1e-12)),
    )


def _enlarged(colours: Image.Image) -> Image.Image:
    scale = SHOWN_SIDE / max(colours.size)
    size = (round(colours.width * scale), round(colours.height * scale))
    return colours.resize(size, Image.Resampling.BICUBIC)
