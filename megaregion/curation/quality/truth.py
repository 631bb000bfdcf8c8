"""Against known truth: are the objects among the regions, are clusters classes, are words read?

Truth is for measuring only; no stage ever sees it.

Shapes: R regions and S true boxes of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.quality.clusters import LabelledRegions, nmi
from megaregion.curation.stages.embed import REGIONS
from megaregion.curation.stages.propose import CANDIDATES
from megaregion.curation.stages.stage import Job
from megaregion.curation.stages.store import Piece, read_regions, read_words
from megaregion.curation.stages.text import WORDS
from megaregion.curation.types import Boxes, as_array, iou
from megaregion.data.sample import Box
from megaregion.errors import UserError

MATCH = 0.5
"""IoU from which a region shows an object."""

TIGHT = 0.7
"""IoU of a region that fits well."""

WORD_MATCH = 0.3
"""IoU from which a word that was read is the one that is written there: engines frame it more widely."""

READABLE = 16.0
"""Height of a word, in pixels, from which it has to be read."""


class TrueImage(NamedTuple):
    """What is in one image."""

    classes: Sequence[str]
    """Of each object, S of them."""
    boxes: Sequence[Box]
    texts: Sequence[str]
    """The words that are written, and their boxes."""
    text_boxes: Sequence[Box]


@dataclass(frozen=True)
class TruthQuality:
    """How a run compares with the truth."""

    images: int
    objects: int
    recall: float
    """Share of the objects that a kept region shows, at an IoU of MATCH."""
    tight_recall: float
    """Likewise at TIGHT."""
    proposed_recall: float
    """Likewise at MATCH, among all candidates: what better choosing could reach."""
    regions_per_image: float
    most_regions: int
    """Kept regions of the image that has most."""
    matched_nmi: float
    """NMI of clusters and classes over the kept regions that show an object."""
    matched: int
    tight_nmi: float
    """Likewise over those that fit at TIGHT: what the boxes cost."""
    words: int
    """Words of at least READABLE pixels height."""
    exact_words: float
    """Share of them that was read exactly, above the least confidence."""


@dataclass
class _Tally:
    objects: int = 0
    found: int = 0
    tight: int = 0
    proposed: int = 0
    kept: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    words: int = 0
    exact: int = 0


def truth_quality(job: Job, truth: Mapping[str, TrueImage]) -> TruthQuality:
    """Compare a run whose stage assign is done with the truth of its images.

    Args:
        job: The run.
        truth: What is in each image, by sample key; other images are left out.

    Raises:
        UserError: None of the run's images is among them.
    """
    tally, images = _Tally(), 0
    for number, labels, _ in LabelledRegions(job).labels():
        parts = (("embed", REGIONS), ("propose", CANDIDATES))
        kept, candidates = (
            read_regions([job.store.folder(Piece(stage, number)) / name]) for stage, name in parts
        )
        read = read_words([job.store.folder(Piece("ocr", number)) / WORDS])
        start = 0
        for regions, proposed, words in zip(kept, candidates, read, strict=True):
            own = labels[start : start + len(regions.regions)]
            start += len(regions.regions)
            true = truth.get(regions.key)
            if true is None:
                continue
            images += 1
            boxes = as_array([region.box for region in regions.regions])
            _count_objects(tally, true, boxes, own, as_array([region.box for region in proposed.regions]))
            above = words.above(job.settings.tokenizer.min_confidence)
            _count_words(tally, true, [word.text for word in above], as_array([w.box for w in above]))
    if not images:
        raise UserError("--truth holds none of the run's images; give the split that was curated")
    _, classes = np.unique(np.array(tally.classes, dtype=str), return_inverse=True)
    clusters = np.array(tally.labels, dtype=np.int64)
    fits = np.array(tally.overlaps, dtype=np.float64) >= TIGHT
    return TruthQuality(
        images=images,
        objects=tally.objects,
        recall=tally.found / max(1, tally.objects),
        tight_recall=tally.tight / max(1, tally.objects),
        proposed_recall=tally.proposed / max(1, tally.objects),
        regions_per_image=float(np.mean(tally.kept)),
        most_regions=max(tally.kept),
        matched_nmi=nmi(clusters, classes.astype(np.int64)),
        matched=len(clusters),
        tight_nmi=nmi(clusters[fits], classes[fits].astype(np.int64)),
        words=tally.words,
        exact_words=tally.exact / max(1, tally.words),
    )


def _count_objects(
    tally: _Tally, true: TrueImage, boxes: Boxes, labels: NDArray[np.int64], candidates: Boxes
) -> None:
    tally.kept.append(len(boxes))
    tally.objects += len(true.boxes)
    if not len(true.boxes):
        return
    wanted = as_array(true.boxes)
    if len(candidates):
        tally.proposed += int((iou(wanted, candidates).max(axis=1) >= MATCH).sum())
    if not len(boxes):
        return
    overlaps = iou(wanted, boxes)
    tally.found += int((overlaps.max(axis=1) >= MATCH).sum())
    tally.tight += int((overlaps.max(axis=1) >= TIGHT).sum())
    best = overlaps.argmax(axis=0).tolist()
    for region in np.flatnonzero((overlaps.max(axis=0) >= MATCH) & (labels >= 0)).tolist():
        tally.labels.append(int(labels[region]))
        tally.classes.append(true.classes[best[region]])
        tally.overlaps.append(float(overlaps[best[region], region]))


def _count_words(tally: _Tally, true: TrueImage, texts: Sequence[str], boxes: Boxes) -> None:
    for text, box in zip(true.texts, true.text_boxes, strict=True):
        if box[3] - box[1] < READABLE:
            continue
        tally.words += 1
        if texts:
            overlaps = iou(as_array([box]), boxes)[0]
            near = np.flatnonzero(overlaps >= WORD_MATCH).tolist()
            tally.exact += any(texts[place] == text for place in near)
