"""The part of an image that becomes a training image: a rectangle and perhaps a mirror.

Shapes: R regions. Boxes are x0, y0, x1, y1 in pixels of the stored image, [R, 4].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

CROP_TRIES = 10
"""Draws of a crop's size and shape before the largest allowed crop in the middle is taken."""
BLOCK = 8
"""Side of a JPEG's blocks, in pixels."""


@dataclass(frozen=True)
class View:
    """A rectangle of the stored image, in pixels, that is stretched to the model's input."""

    x0: float
    y0: float
    x1: float
    y1: float
    flipped: bool = False
    """Whether left and right change places."""

    def edges(self, rows: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Borders of a grid over the view, in pixels of the stored image and before the mirror.

        Returns:
            Borders of the columns, [columns + 1], and of the rows, [rows + 1].
        """
        # As linspace does, which takes ten times as long for the few numbers of a patch grid.
        x_edges = self.x0 + np.arange(columns + 1, dtype=np.float64) * ((self.x1 - self.x0) / columns)
        y_edges = self.y0 + np.arange(rows + 1, dtype=np.float64) * ((self.y1 - self.y0) / rows)
        x_edges[-1], y_edges[-1] = self.x1, self.y1
        return x_edges, y_edges

    def on_blocks(self, width: int, height: int) -> View:
        """Move each border to the nearest one of a JPEG's blocks, by at most 4 pixels, 7 at an image's end.

        Decoded at any number of eighths of its size, the image then still has the view on whole pixels.

        Args:
            width: Width of the image, in pixels.
            height: Height of the image, in pixels.
        """

        def near(edge: float, length: int) -> float:
            return min(round(edge / BLOCK), length // BLOCK) * BLOCK

        return replace(
            self,
            x0=near(self.x0, width),
            y0=near(self.y0, height),
            x1=near(self.x1, width),
            y1=near(self.y1, height),
        )

    def share_inside(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of each box's area that lies inside the view, [R]; 0 for a box without area."""
        x0, y0, x1, y1 = boxes.T
        wide = np.minimum(x1, self.x1) - np.maximum(x0, self.x0)
        high = np.minimum(y1, self.y1) - np.maximum(y0, self.y0)
        inside = np.maximum(wide, 0.0) * np.maximum(high, 0.0)
        area = np.maximum(x1 - x0, 0.0) * np.maximum(y1 - y0, 0.0)
        return np.divide(inside, area, out=np.zeros_like(area), where=area > 0)


def random_view(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flipped: bool = False,
) -> View:
    """A random resized crop on whole pixels.

    Args:
        rng: Generator of this sample.
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.
        scale: Least and greatest share of the image's area.
        ratio: Least and greatest width / height; drawn evenly on a logarithmic scale.
        flipped: Whether the view is mirrored.
    """
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            x0, y0 = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return View(x0, y0, x0 + w, y0 + h, flipped)
    # No draw fits a very long image: take as much of its middle as the ratio allows.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    x0, y0 = (width - w) // 2, (height - h) // 2
    return View(x0, y0, x0 + w, y0 + h, flipped)


def fitting_grid(view: View, most: int) -> tuple[int, int]:
    """Rows and columns of patches for a view: about its aspect ratio, and nearly as many as allowed.

    Args:
        view: The part of the image.
        most: Most patches.
    """
    shape = (view.y1 - view.y0) / (view.x1 - view.x0)
    tall = min(float(most), max(1.0, math.sqrt(most * shape)))
    grids = [
        (rows, columns)
        for rows in (math.floor(tall), math.ceil(tall))
        for columns in (math.floor(most / tall), math.ceil(most / tall), most // rows)
        if 0 < rows * columns <= most
    ]

    def cost(grid: tuple[int, int]) -> float:
        # Rounding stretches the image by some percent; leaving patches unused costs resolution.
        rows, columns = grid
        return abs(math.log(rows / columns / shape)) + math.log(most / (rows * columns))

    return min(grids, key=cost)
