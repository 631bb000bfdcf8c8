"""The quality report of a run: a table to read, and report.json to compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megaregion.curation.quality.clusters import NEAR, ClusterQuality, cluster_quality
from megaregion.curation.quality.texts import TextQuality, text_quality
from megaregion.curation.quality.truth import MATCH, READABLE, TIGHT, TrueImage, TruthQuality, truth_quality
from megaregion.curation.runner.pipeline import Pipeline
from megaregion.curation.runner.summary import Summary, summarise
from megaregion.curation.stages.stage import Job
from megaregion.errors import UserError
from megaregion.files import write_bytes

REPORT = "report.json"

Rows = list[tuple[str, str]]


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
