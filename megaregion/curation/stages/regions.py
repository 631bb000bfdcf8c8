"""Stages propose and embed: candidates for object regions, the most object-like first; those worth a label.

Every proposal that goes is counted under its reason.

Shapes: R proposals of one image; r kept regions of a piece, in the order of the images and of their regions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.engines import (
    Embedder,
    Proposer,
    lite0,
    load_embedder,
    load_proposer,
    load_view,
    weights_of,
)
from megaregion.curation.engines.boxes import Objectness, objectness
from megaregion.curation.engines.lite0 import FeatureMaps
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
    checksum,
    crop,
    intersection,
    iou,
    read_regions,
    read_words,
    resize,
    write_regions,
)
from megaregion.curation.settings import EmbedSettings, ProposeSettings
from megaregion.curation.stages.stage import ImageStage, Output, describe, plain
from megaregion.curation.stages.text import WORDS
from megaregion.data.sample import Box
from megaregion.schemas.curation import (
    ALL_UNUSABLE,
    ANNOTATED,
    ANNOTATED_REGIONS,
    BOXED,
    DROPPED,
    NO_JSON,
    POSES,
    SEVERAL,
)

CANDIDATES, REGIONS, FEATURES = "candidates.jsonl", "regions.jsonl", "features.npy"

Squares = list[Pixels]
"""Crops at the size that the embedder reads."""
MAX_CANDIDATES = 500
"""Best proposals that are compared with each other; the cost grows with their square."""
CROWDING = 1.0
"""Penalty, in log-odds, of a proposal that lies inside a better one: raises the recall of 12 boxes by two
points. More of it trades boxes that fit for boxes elsewhere."""
INSIDE_WORD = 0.7
"""A proposal with at least this share of its area inside a word is a piece of text."""


class Seen(NamedTuple):
    """What a proposer and its judge need of an image, or the regions that came with it."""

    size: tuple[int, int]
    """Height and width of the image."""
    annotated: list[Proposal]
    """Regions that came with it."""
    dropped: Counter[str]
    """Rows of its annotation that give no region, by reason."""
    counts: Counter[str]
    """What else is counted of it."""
    view: Any = None
    """What the proposer needs of it."""
    maps: FeatureMaps | None = None
    """By which proposals are judged."""
    checksum: int | None = None
    """As in :class:`~megaregion.curation.picture.ImageRegions`."""


class Propose(ImageStage):
    """Writes candidates.jsonl; also finds out which images can be used at all.

    Regions that came with an image are kept: nothing is proposed there, if one of them is usable.
    """

    name = "propose"
    version = 4

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.propose
        values = plain(settings, self.job.settings.image) | {"objectness": lite0.fingerprint()}
        if settings.proposer == "sam":
            values["sam"] = describe(Path(settings.sam))
        annotation = self.job.settings.annotation
        values |= {"annotations": annotation.annotations, "annotated_pixels": annotation.annotated_pixels}
        return values

    @override
    def prepare(self) -> None:
        # Once here, or every worker would convert the network for itself.
        lite0.convert()

    @override
    def on_gpu(self) -> bool:
        return self.job.settings.propose.proposer == "sam"

    @override
    def look(self, image: ImageFile, picture: Picture, wanted: Any) -> Seen:
        size = picture.height, picture.width
        found, dropped, counts = self._annotated(image, picture)
        counts[SEVERAL] = int(picture.several)
        # The content of a file of its own has a hash.
        told = None if image.sha256 or picture.jpeg is None else checksum(picture.jpeg)
        if found or self.job.settings.annotation.annotations == "only":
            return Seen(size, found, dropped, counts, checksum=told)
        view = self._view(picture.pixels)
        # Where nothing was found, there is nothing to judge.
        maps = None if view == [] else self._objectness.maps(picture.pixels)
        return Seen(size, found, dropped, counts, view, maps, told)

    @override
    def work(self, number: int, output: Output) -> None:
        images = self.looks(((image, None) for image in self.images(number)), output)
        with output.file(CANDIDATES) as file:
            for (image, seen), found in self._proposed(images):
                record = ImageRegions(image.key)
                if seen is not None:
                    regions = self._candidates(seen, found, output.counts)
                    record = ImageRegions(image.key, *seen.size[::-1], regions, seen.checksum)
                write_regions(file, record)

    def _proposed(
        self, images: Iterator[tuple[ImageFile, Seen | None]]
    ) -> Iterator[tuple[tuple[ImageFile, Seen | None], list[Proposal]]]:
        """Each image with its proposals; the first one that needs a proposer has it loaded."""
        for image, seen in images:
            if seen is None or seen.view is None:
                yield (image, seen), []
                continue
            rest = ((each, None if each[1] is None else each[1].view) for each in images)
            yield from self._proposer.stream(chain([((image, seen), seen.view)], rest))

    def _candidates(self, seen: Seen, proposed: list[Proposal], counts: Counter[str]) -> list[Proposal]:
        found = seen.annotated or proposed
        counts.update(seen.counts)
        counts["images used"] += 1
        counts["proposed"] += len(found) + seen.dropped.total()
        ranked, misfits = rank(found, seen.size, seen.maps, self.job.settings.propose)
        counts.update({DROPPED + why: number for why, number in (seen.dropped + misfits).items()})
        return ranked

    def _annotated(
        self, image: ImageFile, picture: Picture
    ) -> tuple[list[Proposal], Counter[str], Counter[str]]:
        """Regions that came with an image, rows that give none, by reason, and what else is counted."""
        settings, counts = self.job.settings.annotation, Counter[str]()
        content = self.job.source.annotation(image) if settings.annotations != "ignore" else None
        try:
            read = None if content is None else read_annotations(content, picture, settings.annotated_pixels)
        except BadImage:
            counts[NO_JSON] = 1
            read = None
        found, dropped = read or ([], Counter[str]())
        if read is not None:
            counts.update({told: dropped.pop(told, 0) for told in (BOXED, POSES)})
            counts[ANNOTATED_REGIONS] = len(found)
        if found:
            counts[ANNOTATED] = 1
        elif dropped:
            counts[ALL_UNUSABLE] = 1
        return found, dropped, counts

    @cached_property
    def _proposer(self) -> Proposer:
        return load_proposer(self.job.settings.propose)

    @cached_property
    def _view(self) -> Callable[[Pixels], Any]:
        return load_view(self.job.settings.propose)

    @cached_property
    def _objectness(self) -> Objectness:
        return Objectness()


def rank(
    proposals: Sequence[Proposal],
    size: tuple[int, int],
    maps: FeatureMaps | None,
    settings: ProposeSettings,
) -> tuple[list[Proposal], Counter[str]]:
    """Drop proposals of the wrong shape and near-equal ones; order the rest, the most object-like first.

    The proposer's own score only breaks ties, for selective search has none; without feature maps it judges.

    Args:
        proposals: Of one image.
        size: Its height and width.
        maps: By which objectness is judged.
        settings: Which shapes may be objects.

    Returns:
        Candidates, whose score is the objectness, 0..1, and how many proposals were dropped, by reason.
    """
    boxes = as_array([proposal.box for proposal in proposals])
    reasons = _misshapen(boxes, *size, settings)
    dropped = Counter(reason for reason in reasons if reason)
    kept = [proposal for proposal, reason in zip(proposals, reasons, strict=True) if not reason]
    if maps is not None:
        scores = objectness(maps, size, as_array([proposal.box for proposal in kept]))
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


class Embed(ImageStage):
    """Writes regions.jsonl and features.npy, float16 [r, C]; a row of zeros is a region without label."""

    name = "embed"
    reads = ("propose", "ocr")
    version = 3

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.embed
        values = plain(settings, self.job.settings.image)
        values["min_confidence"] = self.job.settings.tokenizer.min_confidence
        del values["encoder"]
        if folder := weights_of(settings):
            values[settings.embedder] = describe(Path(folder))
        else:
            values["lite0"] = lite0.fingerprint()
        return values

    @override
    def prepare(self) -> None:
        if self.job.settings.embed.embedder == "lite0":
            lite0.convert()

    @override
    def on_gpu(self) -> bool:
        return self.job.settings.embed.embedder != "lite0"

    @override
    def look(self, image: ImageFile, picture: Picture, wanted: tuple[Sequence[Box], int]) -> Squares:
        boxes, side = wanted
        return [resize(crop(picture.pixels, box), side, side) for box in boxes]

    @override
    def work(self, number: int, output: Output) -> None:
        features = [np.zeros((0, self._embedder.dim), dtype=np.float16)]
        boxes = self._chosen(number, output)
        seen = self.looks(((image, (own, self._embedder.side)) for image, own in boxes), output)
        for _, vectors in self._embedder.stream((image, crops or ()) for image, crops in seen):
            lost = ~np.isfinite(vectors).all(axis=1)
            vectors[lost] = 0
            output.counts[DROPPED + "not embedded"] += int(lost.sum())
            output.counts["kept"] -= int(lost.sum())
            features.append(vectors.astype(np.float16))
        output.save(FEATURES, np.concatenate(features))

    def _chosen(self, number: int, output: Output) -> list[tuple[ImageFile, list[Box]]]:
        """Writes the regions that are kept of a piece's images; gives their boxes."""
        candidates, words = self.needs(number)
        found = read_regions([self.path(candidates, CANDIDATES)])
        texts = read_words([self.path(words, WORDS)])
        confidence = self.job.settings.tokenizer.min_confidence
        boxes = []
        with output.file(REGIONS) as file:
            for image, own, read in zip(self.images(number), found, texts, strict=True):
                signs = [word.box for word in read.above(confidence)]
                chosen, dropped = choose(own.regions, signs, self.job.settings.embed)
                write_regions(file, replace(own, regions=chosen))
                output.counts["kept"] += len(chosen)
                output.counts.update({DROPPED + why: n for why, n in dropped.items()})
                boxes.append((image, [region.box for region in chosen]))
        return boxes

    @cached_property
    def _embedder(self) -> Embedder:
        settings = self.job.settings.embed
        return load_embedder(settings.embedder, weights_of(settings) or None, settings.crop_side)


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
