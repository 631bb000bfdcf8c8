"""Stage propose: candidates for object regions in every image, the most object-like first.

Every proposal that goes is counted under its reason.

Shapes: R proposals of one image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.engines import Proposer, lite0, load_proposer
from megaregion.curation.engines.boxes import Objectness
from megaregion.curation.inputs.annotations import read_annotations
from megaregion.curation.inputs.source import ImageFile
from megaregion.curation.picture import (
    BadImage,
    Boxes,
    Picture,
    Pixels,
    Proposal,
    area,
    as_array,
    intersection,
)
from megaregion.curation.settings import ProposeSettings
from megaregion.curation.stages.stage import Stage, describe, plain
from megaregion.curation.stages.store import ImageRegions, Output, write_regions
from megaregion.schemas.curation import DROPPED

CANDIDATES = "candidates.jsonl"

MAX_CANDIDATES = 500
"""Best proposals that are compared with each other; the cost grows with their square."""
CROWDING = 1.0
"""Penalty, in log-odds, of a proposal that lies inside a better one: raises the recall of 12 boxes by two
points. More of it trades boxes that fit for boxes elsewhere."""


class Propose(Stage):
    """Writes candidates.jsonl; also finds out which images can be used at all.

    Regions that came with an image, as SA-1B's do, are kept: nothing is proposed there.
    """

    name = "propose"
    version = 3

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.propose
        values = plain(settings, self.job.settings.image) | {"objectness": lite0.fingerprint()}
        if settings.proposer == "sam":
            values["sam"] = describe(Path(settings.sam))
        return values

    @override
    def prepare(self) -> None:
        # Once here, or every worker would convert the network for itself.
        lite0.convert()

    @override
    def work(self, number: int, output: Output) -> None:
        with output.file(CANDIDATES) as file:
            for image, picture in self.pictures(number, output):
                record = ImageRegions(image.key)
                if picture is not None:
                    try:
                        regions = self._candidates(image, picture, output.counts)
                        record = ImageRegions(image.key, picture.width, picture.height, regions)
                    except BadImage as bad:
                        output.bad[image.path] = str(bad)
                write_regions(file, record)

    def _candidates(self, image: ImageFile, picture: Picture, counts: Counter[str]) -> list[Proposal]:
        """Raises BadImage: its annotation cannot be read."""
        content = self.job.source.annotation(image)
        annotated = None if content is None else read_annotations(content, picture)
        if annotated is None:
            found, dropped = self._proposer.propose(picture.pixels), Counter[str]()
        else:
            found, dropped = annotated
            counts["images with annotations"] += 1
        objectness = self._objectness if annotated is None else None
        counts["images used"] += 1
        counts["proposed"] += len(found) + dropped.total()
        ranked, misfits = rank(found, picture.pixels, objectness, self.job.settings.propose)
        for why, number in (dropped + misfits).items():
            counts[DROPPED + why] += number
        return ranked

    @cached_property
    def _proposer(self) -> Proposer:
        return load_proposer(self.job.settings.propose)

    @cached_property
    def _objectness(self) -> Objectness:
        return Objectness()


def rank(
    proposals: Sequence[Proposal], pixels: Pixels, objectness: Objectness | None, settings: ProposeSettings
) -> tuple[list[Proposal], Counter[str]]:
    """Drop proposals of the wrong shape and near-equal ones; order the rest, the most object-like first.

    The proposer's own score only breaks ties, for selective search has none; without an objectness it judges.

    Returns:
        Candidates, whose score is the objectness, 0..1, and how many proposals were dropped, by reason.
    """
    boxes = as_array([proposal.box for proposal in proposals])
    reasons = _misshapen(boxes, pixels.shape[0], pixels.shape[1], settings)
    dropped = Counter(reason for reason in reasons if reason)
    kept = [proposal for proposal, reason in zip(proposals, reasons, strict=True) if not reason]
    if objectness is not None:
        scores = objectness.score(pixels, as_array([proposal.box for proposal in kept]))
        kept = [replace(proposal, score=float(score)) for proposal, score in zip(kept, scores, strict=True)]
    best = sorted(kept, key=lambda proposal: -proposal.score)[:MAX_CANDIDATES]
    odds = np.array([_odds(proposal.score) for proposal in best])
    order = nms(as_array([proposal.box for proposal in best]), odds, settings.nms_iou, CROWDING)
    dropped["duplicate"] += len(best) - len(order)
    dropped["beyond the limit"] += len(kept) - len(best)
    return [best[row] for row in order], +dropped


def _misshapen(boxes: Boxes, height: int, width: int, settings: ProposeSettings) -> list[str]:
    """Why each box cannot be an object by its shape alone; empty where it can."""
    least = settings.min_edge * min(height, width) if settings.min_edge < 1 else settings.min_edge
    edges = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    short, long = edges.min(axis=1), edges.max(axis=1)
    reasons = np.full(len(boxes), "", dtype=object)
    # The last reason that fits is named: too small before elongated, since a sliver is both.
    reasons[long > settings.max_aspect * short] = "too elongated"
    reasons[area(boxes) > settings.max_area * height * width] = "too large"
    reasons[short < max(least, 1)] = "too small"
    return list(reasons)


def nms(boxes: Boxes, scores: NDArray[np.float64], limit: float, crowding: float = 0.0) -> NDArray[np.int64]:
    """Order boxes so that every prefix holds good ones of different places; leave near-equal ones out.

    Greedy: the next box is the one with the best score, less a penalty for lying inside, or around, one
    that was taken before. So the whole object comes first, then the other objects, then their parts.

    Args:
        boxes: [R, 4].
        scores: Higher is better, [R]; of equal ones the earlier wins.
        limit: Greatest IoU of two boxes that are both taken.
        crowding: Penalty of a box that lies wholly inside a taken one, in units of the score. 0 gives
            plain non-maximum suppression.

    Returns:
        Rows in the order in which they were taken.
    """
    shared, sizes = intersection(boxes, boxes), np.maximum(area(boxes), 1e-9)
    overlap = shared / (sizes[:, None] + sizes[None] - shared)
    nested = shared / np.minimum(sizes[:, None], sizes[None])
    merit, crowd = scores.astype(np.float64), np.zeros(len(boxes))
    open_rows = np.ones(len(boxes), dtype=bool)
    taken: list[int] = []
    while open_rows.any():
        best = int(np.where(open_rows, merit - crowding * crowd, -np.inf).argmax())
        taken.append(best)
        open_rows &= overlap[best] <= limit
        open_rows[best] = False
        crowd = np.maximum(crowd, nested[best])
    return np.array(taken, dtype=np.int64)


def _odds(probability: float) -> float:
    bounded = min(max(probability, 1e-6), 1 - 1e-6)
    return float(np.log(bounded / (1 - bounded)))
