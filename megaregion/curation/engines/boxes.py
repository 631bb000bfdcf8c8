"""Boxes that may frame an object: selective search finds them, objectness tells how much they stand out.

A box around an object differs from its surroundings, and from the image as a whole, in what a pretrained
network sees there; a box on background does not. The contrasts are read from one pass over the whole image,
so that a box costs next to nothing, and a logistic model joins them. Its weights were fitted once, on scenes
composed for the purpose; no label or truth of a curated dataset ever enters.

Shapes: R boxes, g x k cells of a feature map, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from megaregion.curation.engines.lite0 import FeatureMaps, Lite0
from megaregion.curation.picture import Boxes, Pixels, Proposal, area, resize
from megaregion.errors import UserError

Item = TypeVar("Item")

SIDE = 448
"""Side, in pixels, of the square to which the image is scaled: 14 x 14 coarse cells."""
BLUR = 0.8
"""Deviation, in pixels, of the blur before segmenting."""
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


class SelectiveSearch:
    """Groups of similar segments (Uijlings 2013, OpenCV's implementation), at several image sizes.

    One strategy in HSV: colour, size and fill. Its fourth measure, texture, cost a quarter of the time and
    found no more. A second, smaller size costs a quarter as much and finds a third of what the first misses.

    Args:
        sides: Longest side, in pixels, of the image at each size; smaller images stay as they are.
        scales: Sizes of the segments that the grouping starts from; another one costs as much as the first.
    """

    def __init__(self, sides: Sequence[int], scales: Sequence[int] = (150,)) -> None:
        if not hasattr(cv2, "ximgproc"):
            raise UserError(
                "OpenCV lacks selective search: two of its wheels share a folder, and the one without it was "
                "installed last; pip install --force-reinstall --no-deps opencv-contrib-python-headless"
            )
        self._sides, self._scales = tuple(sides), tuple(scales)

    def stream(
        self, images: Iterable[tuple[Item, list[Proposal] | None]]
    ) -> Iterator[tuple[Item, list[Proposal]]]:
        """What was found already, see :class:`megaregion.curation.engines.Proposer`."""
        return ((item, found or []) for item, found in images)

    def view(self, image: Pixels) -> list[Proposal]:
        """Propose boxes; each occurs once."""
        longest = max(image.shape[:2])
        sides = dict.fromkeys(min(side, longest) for side in self._sides)
        starts = [(side, scale) for side in sides for scale in self._scales]
        boxes = np.concatenate([self._boxes(image, side / longest, scale) for side, scale in starts])
        return [Proposal((x0, y0, x1, y1), 1.0) for x0, y0, x1, y1 in np.unique(boxes, axis=0).tolist()]

    def _boxes(self, image: Pixels, shrink: float, scale: int) -> NDArray[np.float64]:
        """Boxes found at one size and scale, in pixels of the image, [R, 4]."""
        height, width = image.shape[:2]
        columns, rows = max(1, round(width * shrink)), max(1, round(height * shrink))
        found = self._search(cv2.cvtColor(resize(image, columns, rows), cv2.COLOR_RGB2BGR), scale)
        corners = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], axis=1)
        limits = np.array([width, height, width, height], dtype=np.float64)
        return np.minimum(np.rint(corners * (limits / np.array([columns, rows, columns, rows]))), limits)

    def _search(self, image: Pixels, scale: int) -> NDArray[np.float64]:
        """Left, top, width and height of every group of segments of a BGR image, [R, 4]."""
        # Workers are the unit of parallelism.
        cv2.setNumThreads(1)
        kit = cv2.ximgproc.segmentation
        strategy = kit.createSelectiveSearchSegmentationStrategyMultiple()
        for name in ("Color", "Size", "Fill"):
            part = getattr(kit, f"createSelectiveSearchSegmentationStrategy{name}")
            strategy.addStrategy(part(), 1 / 3)
        search = kit.createSelectiveSearchSegmentation()
        search.setBaseImage(image)
        search.addImage(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
        search.addGraphSegmentation(kit.createGraphSegmentation(BLUR, float(scale), 100))
        search.addStrategy(strategy)
        return np.asarray(search.process(), dtype=np.float64).reshape(-1, 4)


class Objectness:
    """Sees in an image what tells boxes on background, 0, from those that are surely an object, 1."""

    def __init__(self) -> None:
        self._network = Lite0()

    def maps(self, pixels: Pixels) -> FeatureMaps:
        """What the boxes of an image, RGB uint8 [h, w, 3], are judged by."""
        return self._network.maps(resize(pixels, SIDE, SIDE))


def objectness(maps: FeatureMaps, size: tuple[int, int], boxes: Boxes) -> NDArray[np.float64]:
    """Probability that each box frames an object, [R], 0..1.

    Args:
        maps: Of the whole image.
        size: Height and width of it.
        boxes: In its pixels, [R, 4], each of positive area.
    """
    if not len(boxes):
        return np.zeros(0)
    height, width = size
    edges = np.array([0.0, 0.0, width, height])
    odds = BIAS + TOUCH * (np.abs(boxes - edges) <= 1).sum(axis=1)
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
