"""Objectness: how likely a box frames an object, judged by how its features stand out.

A box around an object differs from its surroundings, and from the image as a whole, in what a pretrained
network sees there; a box on background does not. The contrasts are read from one pass over the whole image,
so that a box costs next to nothing, and a logistic model joins them. Its weights were fitted once, on scenes
composed for the purpose; no label or truth of a curated dataset ever enters.

Shapes: R boxes, g x k cells of a feature map, C channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.boxes import Boxes, area
from megaregion.curation.engines.lite0 import FeatureMaps, Lite0
from megaregion.curation.picture import resize
from megaregion.curation.types import Pixels

SIDE = 448
"""Side, in pixels, of the square to which the image is scaled: 14 x 14 coarse cells."""

RING = 0.25
"""Width of a box's surroundings, as a share of its edges."""

WEIGHTS = {"area": 1.9, "aspect": -1.0, "fine": 1.4, "coarse": 1.15, "image": 1.9, "energy": 3.7}
"""Weight of each value's logarithm in the log-odds."""

TOUCH = -0.7
"""Log-odds for every edge of the image that the box touches."""

BIAS = 7.2
"""Log-odds of a box whose values are all 1."""

EMPTY = 1e-9
FLOOR = 1e-3
"""Least value whose logarithm is taken."""


class Objectness:
    """Scores boxes between 0 (background) and 1 (surely an object)."""

    def __init__(self) -> None:
        self._network = Lite0()

    def score(self, pixels: Pixels, boxes: Boxes) -> NDArray[np.float64]:
        """Probability that each box frames an object, [R], 0..1.

        Args:
            pixels: The whole image, RGB uint8 [h, w, 3].
            boxes: In its pixels, [R, 4], each of positive area.
        """
        if not len(boxes):
            return np.zeros(0)
        height, width = pixels.shape[:2]
        edges = np.array([0.0, 0.0, width, height])
        odds = BIAS + TOUCH * (np.abs(boxes - edges) <= 1).sum(axis=1)
        maps = self._network.maps(resize(pixels, SIDE, SIDE))
        for name, values in _contrasts(maps, boxes / np.tile(edges[2:], 2)).items():
            odds = odds + WEIGHTS[name] * np.log(np.maximum(values, FLOOR))
        sides = boxes[:, 2:] - boxes[:, :2]
        odds = odds + WEIGHTS["aspect"] * np.log(sides.max(axis=1) / sides.min(axis=1))
        return 1 / (1 + np.exp(-odds))


def _contrasts(maps: FeatureMaps, unit: Boxes) -> dict[str, NDArray[np.float64]]:
    """How boxes, on the 0..1 scale, stand out; each value [R]."""
    inside, around = _inside_and_around(maps.coarse, unit)
    whole = maps.coarse.mean((0, 1), dtype=np.float64)
    return {
        "area": area(unit),
        # Other textures than around it.
        "fine": _turn(*_inside_and_around(maps.fine, unit)),
        # Other things than around it, and more of them: objects excite the network, background does not.
        "coarse": _norm(inside - around) / np.maximum(_norm(whole), EMPTY),
        "energy": _norm(inside) / np.maximum(_norm(around), EMPTY),
        # Other things than in the image as a whole.
        "image": _turn(inside, whole),
    }


def _inside_and_around(features: NDArray[np.float32], unit: Boxes) -> tuple[Boxes, Boxes]:
    """Mean features of each box and of the ring around it, two of [R, C]."""
    size = np.tile(unit[:, 2:] - unit[:, :2], 2) * np.array([-RING, -RING, RING, RING])
    wide = np.clip(unit + size, 0, 1)
    inside, inside_area = _sum(features, unit)
    whole, whole_area = _sum(features, wide)
    around = np.maximum(whole_area - inside_area, EMPTY)
    return inside / inside_area[:, None], (whole - inside) / around[:, None]


def _sum(features: NDArray[np.float32], unit: Boxes) -> tuple[Boxes, NDArray[np.float64]]:
    """Features summed over each box, cells weighted by the share that the box covers, and that area."""
    rows, columns, channels = features.shape
    down = _covered(unit[:, 1] * rows, unit[:, 3] * rows, rows)
    across = _covered(unit[:, 0] * columns, unit[:, 2] * columns, columns)
    cells = (down[:, :, None] * across[:, None, :]).reshape(len(unit), -1)
    return cells @ features.reshape(-1, channels), np.maximum(cells.sum(axis=1), EMPTY)


def _covered(low: NDArray[np.float64], high: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """Length of each cell that lies between low and high, [R, cells]."""
    start = np.arange(cells)
    return np.clip(np.minimum(high[:, None], start + 1) - np.maximum(low[:, None], start), 0, None)


def _turn(some: Boxes, others: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 - cosine between features, [R]."""
    cosine = (some * others).sum(axis=-1) / np.maximum(_norm(some) * _norm(others), EMPTY)
    return 1 - cosine


def _norm(features: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.linalg.norm(features.astype(np.float64), axis=-1)
