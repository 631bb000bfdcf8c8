"""Stages propose and embed: candidates for object regions, the most object-like first; those worth a label.

Every proposal that goes is counted under its reason.

Shapes: R proposals of one image; r kept regions of a piece, in the order of the images and of their regions.
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

from megaregion.curation.engines import Embedder, Proposer, lite0, load_embedder, load_proposer
from megaregion.curation.engines.boxes import Objectness
from megaregion.curation.inputs.annotations import read_annotations
from megaregion.curation.inputs.source import ImageFile
from megaregion.curation.picture import (
    BadImage,
    Boxes,
    ImageRegions,
    Picture,
    Pixels,
    Proposal,
    area,
    as_array,
    crop,
    intersection,
    iou,
    read_regions,
    read_words,
    write_regions,
)
from megaregion.curation.settings import EmbedSettings, ProposeSettings
from megaregion.curation.stages.stage import Output, Stage, describe, plain
from megaregion.curation.stages.text import WORDS
from megaregion.data.sample import Box
from megaregion.schemas.curation import DROPPED

CANDIDATES, REGIONS, FEATURES = "candidates.jsonl", "regions.jsonl", "features.npy"

MAX_CANDIDATES = 500
"""Best proposals that are compared with each other; the cost grows with their square."""
CROWDING = 1.0
"""Penalty, in log-odds, of a proposal that lies inside a better one: raises the recall of 12 boxes by two
points. More of it trades boxes that fit for boxes elsewhere."""
INSIDE_WORD = 0.7
"""A proposal with at least this share of its area inside a word is a piece of text."""


class Propose(Stage):
    """Writes candidates.jsonl; also finds out which images can be used at all.

    Regions that came with an image, as SA-1B's do, are kept: nothing is proposed there.
    """

    name = "propose"
    version = 4

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
        counts.update({DROPPED + why: number for why, number in (dropped + misfits).items()})
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
    sure = np.clip([proposal.score for proposal in best], 1e-6, 1 - 1e-6)
    order = nms(as_array([p.box for p in best]), np.log(sure / (1 - sure)), settings.nms_iou, CROWDING)
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


class Embed(Stage):
    """Writes regions.jsonl and features.npy, float16 [r, C]; a row of zeros is a region without label."""

    name = "embed"
    reads = ("propose", "ocr")
    version = 3

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.embed
        values = plain(settings, self.job.settings.image)
        values["min_confidence"] = self.job.settings.tokenizer.min_confidence
        if settings.embedder == "clip":
            values["clip"] = describe(Path(settings.clip))
        else:
            values["lite0"] = lite0.fingerprint()
        return values

    @override
    def prepare(self) -> None:
        if self.job.settings.embed.embedder == "lite0":
            lite0.convert()

    @override
    def work(self, number: int, output: Output) -> None:
        candidates, words = self.needs(number)
        images = read_regions([self.path(candidates, CANDIDATES)])
        texts = read_words([self.path(words, WORDS)])
        confidence = self.job.settings.tokenizer.min_confidence
        features = [np.zeros((0, self._embedder.dim), dtype=np.float16)]
        with output.file(REGIONS) as file:
            for _, picture in self.pictures(number, output):
                found, read = next(images), next(texts)
                boxes = [word.box for word in read.above(confidence)]
                chosen, dropped = choose(found.regions, boxes, self.job.settings.embed)
                write_regions(file, replace(found, regions=chosen))
                output.counts["kept"] += len(chosen)
                output.counts.update({DROPPED + why: n for why, n in dropped.items()})
                if picture is None or not chosen:
                    continue
                vectors = self._embedder.embed([crop(picture.pixels, region.box) for region in chosen])
                lost = ~np.isfinite(vectors).all(axis=1)
                vectors[lost] = 0
                output.counts[DROPPED + "not embedded"] += int(lost.sum())
                output.counts["kept"] -= int(lost.sum())
                features.append(vectors.astype(np.float16))
        output.save(FEATURES, np.concatenate(features))

    @cached_property
    def _embedder(self) -> Embedder:
        settings = self.job.settings.embed
        return load_embedder(settings.embedder, settings.clip or None, settings.crop_side)


def choose(
    candidates: Sequence[Proposal], words: Sequence[Box], settings: EmbedSettings
) -> tuple[list[Proposal], Counter[str]]:
    """Keep the regions of one image, the most object-like first, that are worth a label; count the others."""
    texts = _text(as_array([c.box for c in candidates]), as_array(words), settings.text_overlap)
    kept: list[Proposal] = []
    dropped: Counter[str] = Counter()
    for candidate, text in zip(candidates, texts, strict=True):
        if text:
            dropped["text"] += 1
        elif candidate.score < settings.min_objectness:
            dropped["background"] += 1
        elif len(kept) >= settings.max_regions:
            dropped["beyond the limit"] += 1
        else:
            kept.append(candidate)
    return kept, dropped


def _text(boxes: Boxes, words: Boxes, limit: float) -> list[bool]:
    if not len(words):
        return [False] * len(boxes)
    same = iou(boxes, words).max(axis=1) > limit
    inside = intersection(boxes, words).max(axis=1) >= INSIDE_WORD * area(boxes)
    return list(same | inside)
