"""The quality report of a run: a table to read, and report.json to compare with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megaregion.curation.quality.clusters import NEAR, ClusterQuality, cluster_quality
from megaregion.curation.quality.truth import MATCH, READABLE, TIGHT, TrueImage, TruthQuality, truth_quality
from megaregion.curation.runner.pipeline import Pipeline
from megaregion.curation.runner.status import summarise
from megaregion.curation.stages.stage import Job
from megaregion.curation.stages.store import Piece, read_words
from megaregion.curation.stages.text import MODEL, WORDS
from megaregion.data.info import load_tokenizer, token_set
from megaregion.errors import UserError
from megaregion.files import write_bytes
from megaregion.schemas.curation import Summary

REPORT = "report.json"

KNOWN_TEXTS = 200_000
"""Distinct texts that are counted at once; beyond twice as many, the rarest are forgotten."""

SHOWN = 20
"""Most frequent texts and tokens that are reported."""

BINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Borders of the confidences that are counted together."""

Rows = list[tuple[str, str]]


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
    found = QualityReport(
        summary,
        cluster_quality(job),
        text_quality(job),
        None if truth is None else truth_quality(job, truth),
    )
    write_bytes(Path(job.store.root) / REPORT, json.dumps(asdict(found), indent=1).encode())
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
    rows = [
        ("words by confidence", confidence),
        ("tokens of a word", f"{found.tokens_per_word:.2f}"),
        ("tokens in use", f"{found.used_tokens} of {found.vocabulary}, {found.byte_tokens:.1%} single bytes"),
        ("most frequent texts", _counted(found.texts)),
        ("most frequent tokens", _counted(found.tokens)),
    ]
    return rows


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
    texts = [f"  {name:<26}{value}".encode(errors="replace").decode() for name, value in rows]
    return "\n".join([title, *texts])
