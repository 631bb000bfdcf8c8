"""Selective search as proposer."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from megaregion.curation.picture import resize
from megaregion.curation.types import Pixels, Proposal


class SelectiveSearch:
    """Groups of similar segments (Uijlings 2013, OpenCV's implementation), at several image sizes.

    One strategy in HSV: colour, size and fill. Its fourth measure, texture, cost a quarter of the time and
    found no more. A second, smaller size costs a quarter as much and finds a third of what the first misses.

    Args:
        sides: Longest side, in pixels, of the image at each size; smaller images stay as they are.
        scales: Sizes of the segments that the grouping starts from; another one costs as much as the first.
        blur: Deviation, in pixels, of the blur before segmenting.
    """

    def __init__(self, sides: Sequence[int], scales: Sequence[int] = (150,), blur: float = 0.8) -> None:
        self._sides, self._scales = tuple(sides), tuple(scales)
        self._blur = blur

    def propose(self, image: Pixels) -> list[Proposal]:
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
        search.addGraphSegmentation(kit.createGraphSegmentation(self._blur, float(scale), 100))
        search.addStrategy(strategy)
        return np.asarray(search.process(), dtype=np.float64).reshape(-1, 4)
