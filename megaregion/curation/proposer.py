"""Proposals: boxes that may hold an object, from selective search or from SAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from megaregion.curation.picture import Pixels, resize
from megaregion.curation.settings import ProposeSettings
from megaregion.data.sample import RLE

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Proposal:
    """A region that may hold an object."""

    box: Box
    """x0, y0, x1, y1 in pixels of the image; x1 and y1 exclusive."""
    score: float
    """How sure the proposer is, 0..1; 1 where it does not say."""
    mask: RLE | None = None
    """The region's exact shape at the image's size, where the proposer knows it."""


class Proposer(Protocol):
    """Finds regions in one image."""

    def propose(self, image: Pixels) -> list[Proposal]:
        """Propose regions of an image, RGB uint8 [h, w, 3]."""
        ...


def load_proposer(settings: ProposeSettings) -> Proposer:
    """The proposer that the settings name.

    Raises:
        UserError: SAM's weights cannot be loaded.
    """
    if settings.proposer == "sam":
        from megaregion.curation.sam import SamProposer

        return SamProposer(Path(settings.sam), settings.sam_grid)
    return SelectiveSearch(settings.proposal_sides, settings.proposal_scales)


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
