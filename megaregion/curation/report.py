"""The quality report of a run: a table to read, and report.json to compare with.

:mod:`megaregion.curation.quality` measures the clusters; here are the text and, where it is known, the truth:
are the objects among the regions, are clusters classes, are words read? No stage ever sees the truth.

Shapes: R regions and S true boxes of an image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.picture import Boxes, as_array, iou
from megaregion.curation.quality import NEAR, ClusterQuality, cluster_quality, nmi
from megaregion.curation.runner.pipeline import Pipeline
from megaregion.curation.runner.status import summarise
from megaregion.curation.stages.cluster import read_labels
from megaregion.curation.stages.embed import REGIONS
from megaregion.curation.stages.propose import CANDIDATES
from megaregion.curation.stages.stage import Job
from megaregion.curation.stages.store import Piece, read_regions, read_words
from megaregion.curation.stages.text import MODEL, WORDS
from megaregion.data.info import load_tokenizer, token_set
from megaregion.data.sample import Box
from megaregion.errors import UserError
from megaregion.files import write_bytes
from megaregion.schemas.curation import Summary
from megaregion.tables import aligned

REPORT = "report.json"

KNOWN_TEXTS = 200_000
"""Distinct texts that are counted at once; beyond twice as many, the rarest are forgotten."""
SHOWN = 20
"""Most frequent texts and tokens that are reported."""
BINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Borders of the confidences that are counted together."""

Rows = list[tuple[str, str]]

MATCH = 0.5
"""IoU from which a region shows an object."""
TIGHT = 0.7
"""IoU of a region that fits well."""
WORD_MATCH = 0.3
"""IoU from which a word that was read is the one that is written there: engines frame it more widely."""
READABLE = 16.0
"""Height of a word, in pixels, from which it has to be read."""


@dataclass(frozen=True)
class TextQuality:
    """How good the text labels are."""

    words: int
    """Everything that was read, whatever the confidence."""
    kept: int
    """Words above the least confidence."""
    confidence: dict[str, int]
    """Words by confidence: the lower border of the bin, and their number."""
    tokens_per_word: float
    """Mean number of classes of a word that is kept."""
    used_tokens: int
    """Classes that occur."""
    vocabulary: int
    byte_tokens: float
    """Share of the tokens that stand for single bytes: spelling that the vocabulary does not know."""
    texts: list[tuple[str, int]]
    """The most frequent texts."""
    tokens: list[tuple[str, int]]
    """The most frequent tokens."""


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


@dataclass(frozen=True)
class QualityReport:
    """All numbers of a run."""

    summary: Summary
    clusters: ClusterQuality
    text: TextQuality
    truth: TruthQuality | None = None

    def table(self) -> str:
        """The numbers as aligned lines, what was found and dropped first."""
        blocks = [self.summary.table(), _lines("object labels", _cluster_rows(self.clusters))]
        if self.text.words:
            blocks.append(_lines("text labels", _text_rows(self.text)))
        if self.truth is not None:
            blocks.append(_lines("against the truth", _truth_rows(self.truth)))
        return "\n\n".join(blocks)


def report(job: Job, pipeline: Pipeline, truth: Mapping[str, TrueImage] | None = None) -> QualityReport:
    """Measure a run, and leave the numbers as report.json in its folder.

    Raises:
        UserError: Stages assign and tokenizer are not done.
    """
    summary = summarise(job, pipeline.finished())
    missing = [stage for stage in ("assign", "tokenizer") if stage not in summary.seconds]
    if missing:
        raise UserError(
            f"{job.store.root} is not finished: stage {missing[0]} is not done; run tools/curate.py on"
        )
    against = None if truth is None else truth_quality(job, truth)
    found = QualityReport(summary, cluster_quality(job), text_quality(job), against)
    write_bytes(job.store.root / REPORT, json.dumps(asdict(found), indent=1).encode())
    return found


def text_quality(job: Job) -> TextQuality:
    """Measure the text of a run whose stages ocr and tokenizer are done."""
    tokenizer = load_tokenizer(job.store.folder(Piece("tokenizer", 0)) / MODEL)
    least = job.settings.tokenizer.min_confidence
    bins = np.zeros(len(BINS) - 1, dtype=np.int64)
    texts: Counter[str] = Counter()
    tokens: Counter[int] = Counter()
    kept = 0
    for number in range(job.source.slices):
        path = job.store.folder(Piece("ocr", number)) / WORDS
        for image in read_words([path]):
            bins += np.histogram([word.score for word in image.words], BINS)[0]
            for word in image.above(least):
                kept += 1
                texts[word.text] += 1
                tokens.update(token_set(tokenizer, word.text))
        if len(texts) > 2 * KNOWN_TEXTS:
            texts = Counter(dict(texts.most_common(KNOWN_TEXTS)))
    total = tokens.total()
    single = sum(count for token, count in tokens.items() if tokenizer.is_byte(token))
    return TextQuality(
        words=int(bins.sum()),
        kept=kept,
        confidence={f"{low:.1f}": int(count) for low, count in zip(BINS, bins, strict=False)},
        tokens_per_word=total / max(1, kept),
        used_tokens=len(tokens),
        vocabulary=tokenizer.get_piece_size(),
        byte_tokens=single / max(1, total),
        texts=texts.most_common(SHOWN),
        tokens=[(tokenizer.id_to_piece(token), count) for token, count in tokens.most_common(SHOWN)],
    )


@dataclass
class _Tally:
    counts: Counter[str] = field(default_factory=Counter)
    kept: list[int] = field(default_factory=list)
    """Kept regions of each image."""
    matched: list[tuple[int, str, float]] = field(default_factory=list)
    """Cluster, class and IoU of each kept region that shows an object."""


def truth_quality(job: Job, truth: Mapping[str, TrueImage]) -> TruthQuality:
    """Compare a run whose stage assign is done with the truth of its images.

    Args:
        job: The run.
        truth: What is in each image, by sample key; other images are left out.

    Raises:
        UserError: None of the run's images is among them.
    """
    tally = _Tally()
    for number, labels in enumerate(read_labels(job)):
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
            boxes = as_array([region.box for region in regions.regions])
            _count_objects(tally, true, boxes, own, as_array([region.box for region in proposed.regions]))
            above = words.above(job.settings.tokenizer.min_confidence)
            _count_words(tally, true, [word.text for word in above], as_array([w.box for w in above]))
    if not tally.kept:
        raise UserError("--truth holds none of the run's images; give the split that was curated")
    counts = tally.counts
    return TruthQuality(
        images=len(tally.kept),
        objects=counts["objects"],
        recall=counts["found"] / max(1, counts["objects"]),
        tight_recall=counts["tight"] / max(1, counts["objects"]),
        proposed_recall=counts["proposed"] / max(1, counts["objects"]),
        regions_per_image=float(np.mean(tally.kept)),
        most_regions=max(tally.kept),
        matched_nmi=_nmi(tally.matched),
        matched=len(tally.matched),
        tight_nmi=_nmi([match for match in tally.matched if match[2] >= TIGHT]),
        words=counts["words"],
        exact_words=counts["exact"] / max(1, counts["words"]),
    )


def _nmi(matched: list[tuple[int, str, float]]) -> float:
    _, classes = np.unique(np.array([name for _, name, _ in matched], dtype=str), return_inverse=True)
    return nmi(np.array([label for label, _, _ in matched], dtype=np.int64), classes.astype(np.int64))


def _count_objects(
    tally: _Tally, true: TrueImage, boxes: Boxes, labels: NDArray[np.int64], candidates: Boxes
) -> None:
    tally.kept.append(len(boxes))
    tally.counts["objects"] += len(true.boxes)
    if not len(true.boxes):
        return
    wanted = as_array(true.boxes)
    if len(candidates):
        tally.counts["proposed"] += int((iou(wanted, candidates).max(axis=1) >= MATCH).sum())
    if not len(boxes):
        return
    overlaps = iou(wanted, boxes)
    tally.counts["found"] += int((overlaps.max(axis=1) >= MATCH).sum())
    tally.counts["tight"] += int((overlaps.max(axis=1) >= TIGHT).sum())
    best = overlaps.argmax(axis=0).tolist()
    for region in np.flatnonzero((overlaps.max(axis=0) >= MATCH) & (labels >= 0)).tolist():
        overlap = float(overlaps[best[region], region])
        tally.matched.append((int(labels[region]), true.classes[best[region]], overlap))


def _count_words(tally: _Tally, true: TrueImage, texts: Sequence[str], boxes: Boxes) -> None:
    for text, box in zip(true.texts, true.text_boxes, strict=True):
        if box[3] - box[1] < READABLE:
            continue
        tally.counts["words"] += 1
        if texts:
            overlaps = iou(as_array([box]), boxes)[0]
            near = np.flatnonzero(overlaps >= WORD_MATCH).tolist()
            tally.counts["exact"] += any(texts[place] == text for place in near)


def _cluster_rows(found: ClusterQuality) -> Rows:
    sizes = ", ".join(f"{name} {value:g}" for name, value in found.sizes.items())
    return [
        ("regions with a label", f"{found.regions} in {found.clusters} clusters, {found.empty} empty"),
        ("regions of a cluster", sizes),
        ("imbalance", f"Gini {found.gini:.3f}, like {found.effective:.0f} clusters of equal size"),
        ("largest 1% of clusters", f"{found.largest_percent:.1%} of the regions"),
        ("mean squared distance", f"{found.distance:.4f} to the own center"),
        ("near-duplicates", f"{found.near_duplicates:.1%} have another one at cosine {NEAR} or more"),
        ("labels as by exact search", f"{found.exact:.2%}"),
        ("stability over two seeds", f"NMI {found.stability:.3f} ({found.stability_clusters} clusters)"),
    ]


def _text_rows(found: TextQuality) -> Rows:
    confidence = ", ".join(f"{low}+ {count}" for low, count in found.confidence.items() if count)
    return [
        ("words by confidence", confidence),
        ("tokens of a word", f"{found.tokens_per_word:.2f}"),
        ("tokens in use", f"{found.used_tokens} of {found.vocabulary}, {found.byte_tokens:.1%} single bytes"),
        ("most frequent texts", _counted(found.texts)),
        ("most frequent tokens", _counted(found.tokens)),
    ]


def _truth_rows(found: TruthQuality) -> Rows:
    regions = f"{found.regions_per_image:.1f} regions an image, at most {found.most_regions}"
    return [
        ("images, objects", f"{found.images}, {found.objects}"),
        (f"recall at IoU {MATCH}", f"{found.recall:.3f} with {regions}"),
        (f"recall at IoU {TIGHT}", f"{found.tight_recall:.3f}"),
        ("recall of all candidates", f"{found.proposed_recall:.3f} at IoU {MATCH}"),
        ("NMI of clusters, classes", f"{found.matched_nmi:.3f} on {found.matched} matched regions"),
        (f"NMI at IoU {TIGHT}", f"{found.tight_nmi:.3f}"),
        (f"words of {READABLE:g} px read", f"{found.exact_words:.1%} of {found.words} exactly"),
    ]


def _counted(items: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in items[:10]) or "none"


def _lines(title: str, rows: Rows) -> str:
    # What was read may hold characters that a terminal cannot show.
    return f"{title}\n{aligned(rows, left=(0, 1), indent='  ')}".encode(errors="replace").decode()
