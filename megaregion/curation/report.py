"""The quality report of a run: a table to read, and report.json to compare with.

Do the clusters make good classes: how large, tight and sure are they? How good is the text? Where the truth
is known: are objects among the regions, are clusters classes, are words read? No stage ever sees the truth.
All is read from the stages' files, piece by piece, or from a sample of fixed size, so that a report of a
billion regions fits the memory of one of a thousand.

Shapes: m regions of a sample, K clusters, C channels; R regions and S true boxes of an image.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megaregion.curation.embeddings import evenly, unit
from megaregion.curation.kmeans import find_centers, label_rows
from megaregion.curation.picture import Word, as_array, iou, read_regions, read_words
from megaregion.curation.pipeline import Pipeline
from megaregion.curation.stages.balance import Balancing, effective_clusters, read_balancing
from megaregion.curation.stages.cluster import CENTERS, COSINES, cluster_sizes, read_labels
from megaregion.curation.stages.pack import read_images
from megaregion.curation.stages.regions import CANDIDATES, FEATURES
from megaregion.curation.stages.stage import Job, Piece
from megaregion.curation.stages.text import MODEL, WORDS
from megaregion.curation.status import summarise
from megaregion.data.info import load_tokenizer, token_set
from megaregion.errors import UserError
from megaregion.files import write_bytes
from megaregion.schemas.curation import Summary
from megaregion.schemas.evaluation import aligned

REPORT = "report.json"

NEAR = 0.97
"""Cosine from which two regions count as near-duplicates."""
SAMPLE = 20_000
"""Regions that are compared exactly."""
PROBED, MEMBERS = 200, 1000
"""Regions whose neighbours are looked for, and regions of each one's cluster that are looked at."""
PER_CENTER = 8
"""Least regions a center in the two clusterings that are compared; fewer would measure chance."""
QUANTILES = (0, 1, 10, 25, 50, 75, 90, 99, 100)
"""Percentiles of the sizes that are reported."""
KNOWN_TEXTS = 200_000
"""Distinct texts that are counted at once; beyond twice as many, the rarest are forgotten."""
SHOWN = 20
"""Most frequent texts and tokens that are reported."""
BINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Borders of the confidences that are counted together."""

MATCH = 0.5
"""IoU from which a region shows an object."""
TIGHT = 0.7
"""IoU of a region that fits well."""
WORD_MATCH = 0.3
"""IoU from which a word that was read is the one that is written there: engines frame it more widely."""
READABLE = 16.0
"""Height of a word, in pixels, from which it has to be read."""

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class ClusterQuality:
    """How good the object labels are."""

    clusters: int
    regions: int
    empty: int
    sizes: dict[str, float]
    """Regions of a cluster, by percentile of the clusters."""
    gini: float
    """Imbalance: 0 if all clusters are equal, towards 1 if one holds everything."""
    effective: float
    """Clusters that would be as hard to guess from if all were equal: the exponential of the entropy."""
    largest_percent: float
    """Share of the regions that lies in the largest percent of the clusters."""
    distance: float
    """Mean squared distance of a region to its center, on the unit sphere: 2 - 2 cosine."""
    near_duplicates: float
    """Share of the regions with another one of the same cluster at a cosine of NEAR or more."""
    exact: float
    """Share of a sample whose label is the center that an exact search finds."""
    stability: float
    """NMI of two k-means over a sample that differ in the seed alone."""
    stability_clusters: int
    """Centers of these two."""


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
    scripts: dict[str, int] = field(default_factory=dict)
    """Words that are kept by the script of most of their letters, as Unicode names it."""
    directions: dict[str, int] = field(default_factory=dict)
    """Words that are kept and do not run from left to right, by how they run."""


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
    balancing: Balancing | None = None
    """None where all labelled regions are packed."""

    def table(self) -> str:
        """The numbers as aligned lines, what was found and dropped first."""
        blocks = [self.summary.table(), _lines("object labels", _cluster_rows(self.clusters))]
        if self.balancing is not None:
            blocks.append(_lines("regions that are packed", _balancing_rows(self.balancing, self.clusters)))
        if self.text.words:
            blocks.append(_lines("text labels", _text_rows(self.text)))
        if self.truth is not None:
            blocks.append(_lines("against the truth", _truth_rows(self.truth)))
        return "\n\n".join(blocks)


def report(job: Job, pipeline: Pipeline, truth: Mapping[str, Any] | None = None) -> QualityReport:
    """Measure a run, and leave the numbers as report.json in its folder.

    The truth, by sample key, is what megaregion.evaluation.scenes reads: objects and words, named and boxed.
    Raises UserError where stages assign and tokenizer are not done, or no image has a truth.
    """
    summary = summarise(job, pipeline.finished())
    missing = [stage for stage in ("assign", "tokenizer") if stage not in summary.seconds]
    if missing:
        raise UserError(
            f"{job.store.root} is not finished: stage {missing[0]} is not done; run tools/curate.py on"
        )
    against = None if truth is None else truth_quality(job, truth)
    balanced = read_balancing(job) if "balance" in summary.seconds else None
    found = QualityReport(summary, cluster_quality(job), text_quality(job), against, balanced)
    write_bytes(job.store.root / REPORT, json.dumps(asdict(found), indent=1).encode())
    return found


def cluster_quality(job: Job) -> ClusterQuality:
    """Measure the labels of a run whose stage assign is done."""
    settings = job.settings.cluster
    sizes, distance = cluster_sizes(job), 0.0
    for number, labels in enumerate(read_labels(job)):
        cosines = job.store.load(Piece("assign", number), COSINES)[labels >= 0]
        distance += float((2 - 2 * cosines.astype(np.float64)).sum())
    total = int(sizes.sum())
    sample = _take_sample(job, total)
    centers = job.store.load(Piece("cluster", 0), CENTERS)
    count = max(1, min(settings.clusters, len(sample.labels) // PER_CENTER))
    one, other = (
        _nearest(sample.vectors, find_centers(sample.vectors, count, settings.cluster_iterations, seed)[0])
        for seed in (settings.cluster_seed, settings.cluster_seed + 1)
    )
    ordered = np.sort(sizes)
    return ClusterQuality(
        clusters=len(sizes),
        regions=total,
        empty=int((sizes == 0).sum()),
        sizes={f"p{q}": float(np.percentile(sizes, q)) for q in QUANTILES},
        gini=_gini(ordered),
        effective=effective_clusters(sizes),
        largest_percent=float(ordered[-max(1, round(len(sizes) / 100)) :].sum() / max(1, total)),
        distance=distance / max(1, total),
        near_duplicates=_near_duplicates(job, sample),
        exact=float((_nearest(sample.vectors, centers) == sample.labels).mean()),
        stability=nmi(one, other),
        stability_clusters=count,
    )


class _Sample(NamedTuple):
    """Some regions: their unit vectors, [m, C], and their labels, [m]."""

    vectors: NDArray[np.float32]
    labels: NDArray[np.int64]


def _vectors(job: Job, number: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    stored = job.store.load(Piece("embed", number), FEATURES, mapped=True)
    return unit(np.asarray(stored[rows]))


def _take_sample(job: Job, total: int) -> _Sample:
    """At most SAMPLE of so many labelled regions, evenly over the run."""
    wanted = evenly(total, SAMPLE)
    vectors, kept, start = [], [], 0
    for number, labels in enumerate(read_labels(job)):
        rows = np.flatnonzero(labels >= 0)
        mine = rows[wanted[(wanted >= start) & (wanted < start + len(rows))] - start]
        start += len(rows)
        if len(mine):
            vectors.append(_vectors(job, number, mine))
            kept.append(labels[mine])
    return _Sample(np.concatenate(vectors), np.concatenate(kept))


def _near_duplicates(job: Job, sample: _Sample) -> float:
    """Looked for among the regions of the same cluster: two that are nearly equal have one center."""
    rows = evenly(len(sample.labels), PROBED)
    members = _members(job, np.unique(sample.labels[rows]))
    near = 0
    for row in rows:
        cosines = members[int(sample.labels[row])] @ sample.vectors[row]
        # One of them is the region itself, unless it came too late to be among the members.
        itself = bool((cosines > 1 - 1e-4).any())
        near += int((cosines >= NEAR).sum() > itself)
    return near / len(rows)


def _members(job: Job, clusters: NDArray[np.int64]) -> dict[int, NDArray[np.float32]]:
    """Unit vectors of the first MEMBERS regions of each of some clusters."""
    found: dict[int, list[NDArray[np.float32]]] = {int(cluster): [] for cluster in clusters}
    room = dict.fromkeys(found, MEMBERS)
    for number, labels in enumerate(read_labels(job)):
        rows = np.flatnonzero(np.isin(labels, [cluster for cluster in found if room[cluster]]))
        if len(rows):
            vectors = _vectors(job, number, rows)
            for cluster in np.unique(labels[rows]).tolist():
                found[cluster].append(vectors[labels[rows] == cluster][: room[cluster]])
                room[cluster] -= len(found[cluster][-1])
    return {cluster: np.concatenate(parts) for cluster, parts in found.items()}


def _nearest(vectors: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.int64]:
    return label_rows(vectors, torch.from_numpy(centers))[0][:, 0].numpy()


def text_quality(job: Job) -> TextQuality:
    """Measure the text of a run whose stages ocr and tokenizer are done."""
    tokenizer = load_tokenizer(job.store.folder(Piece("tokenizer", 0)) / MODEL)
    least = job.settings.tokenizer.min_confidence
    bins = np.zeros(len(BINS) - 1, dtype=np.int64)
    texts: Counter[str] = Counter()
    tokens: Counter[int] = Counter()
    scripts, directions = Counter[str](), Counter[str]()
    kept = 0
    for number in range(job.source.slices):
        path = job.store.folder(Piece("ocr", number)) / WORDS
        for image in read_words([path]):
            bins += np.histogram([word.score for word in image.words], BINS)[0]
            for word in image.above(least):
                kept += 1
                texts[word.text] += 1
                scripts[script_of(word.text)] += 1
                directions[word.direction] += bool(word.direction)
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
        scripts=dict(scripts.most_common()),
        directions=dict(sorted((+directions).items())),
    )


def script_of(text: str) -> str:
    """The script of most letters of a text, as Unicode names it; wide forms count as plain ones."""
    letters = filter(str.isalpha, unicodedata.normalize("NFKC", text))
    scripts = Counter(unicodedata.name(letter, "unknown").split()[0].lower() for letter in letters)
    # The sign that repeats a Chinese character has a name of its own.
    scripts["cjk"] += scripts.pop("ideographic", 0)
    best = max(scripts, key=lambda script: scripts[script])
    return best if scripts[best] else "digits and signs"


def truth_quality(job: Job, truth: Mapping[str, Any]) -> TruthQuality:
    """Compare a run whose stage assign is done with the truth of its images; others are left out."""
    counts: Counter[str] = Counter()
    most, matched = 0, list[tuple[int, str, float]]()
    slices = range(job.source.slices)
    labels = (label for each in read_labels(job) for label in each.tolist())
    candidates = read_regions(job.store.folder(Piece("propose", number)) / CANDIDATES for number in slices)
    for (found, own, read), proposed in zip(read_images(job, slices, labels), candidates, strict=True):
        true = truth.get(found.key)
        if true is None:
            continue
        boxes, proposals, objects = (
            as_array([region.box for region in each])
            for each in (found.regions, proposed.regions, true.objects)
        )
        counts.update(images=1, kept=len(boxes), objects=len(objects))
        most = max(most, len(boxes))
        overlaps = iou(objects, boxes)
        for name, shown, least in (
            ("found", overlaps, MATCH), ("tight", overlaps, TIGHT),
            ("proposed", iou(objects, proposals), MATCH),
        ):  # fmt: skip
            counts[name] += int((shown.max(axis=1, initial=0) >= least).sum())
        for region in np.flatnonzero((overlaps.max(axis=0, initial=0) >= MATCH) & (np.array(own) >= 0)):
            best = int(overlaps[:, region].argmax())
            matched.append((own[region], true.objects[best].name, float(overlaps[best, region])))
        _count_words(counts, true.words, read.above(job.settings.tokenizer.min_confidence))
    if not counts["images"]:
        raise UserError("--truth holds none of the run's images; give the split that was curated")
    return TruthQuality(
        images=counts["images"],
        objects=counts["objects"],
        recall=counts["found"] / max(1, counts["objects"]),
        tight_recall=counts["tight"] / max(1, counts["objects"]),
        proposed_recall=counts["proposed"] / max(1, counts["objects"]),
        regions_per_image=counts["kept"] / counts["images"],
        most_regions=most,
        matched_nmi=_nmi(matched),
        matched=len(matched),
        tight_nmi=_nmi([match for match in matched if match[2] >= TIGHT]),
        words=counts["words"],
        exact_words=counts["exact"] / max(1, counts["words"]),
    )


def _count_words(counts: Counter[str], true: Sequence[Any], read: Sequence[Word]) -> None:
    overlaps = iou(as_array([word.box for word in true]), as_array([word.box for word in read]))
    for word, near in zip(true, overlaps >= WORD_MATCH, strict=True):
        if word.box[3] - word.box[1] >= READABLE:
            counts["words"] += 1
            counts["exact"] += word.name in [read[place].text for place in np.flatnonzero(near).tolist()]


def _nmi(matched: list[tuple[int, str, float]]) -> float:
    _, classes = np.unique(np.array([name for _, name, _ in matched], dtype=str), return_inverse=True)
    return nmi(np.array([label for label, _, _ in matched], dtype=np.int64), classes.astype(np.int64))


def nmi(some: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Normalised mutual information of two labellings [n], with the mean of both entropies below.

    0 for independent labellings, 1 for equal ones whatever the names, or if neither tells anything apart.
    """
    if not len(some):
        return 1.0
    _, rows = np.unique(some, return_inverse=True)
    _, columns = np.unique(others, return_inverse=True)
    pairs, counts = np.unique(rows * (columns.max() + 1) + columns, return_counts=True)
    joint = counts / len(some)
    first, second = np.bincount(rows) / len(some), np.bincount(columns) / len(some)
    cells = first[pairs // len(second)] * second[pairs % len(second)]
    shared = float((joint * np.log(joint / cells)).sum())
    mean = (_entropy(first) + _entropy(second)) / 2
    return shared / mean if mean > 0 else 1.0


def _entropy(shares: NDArray[np.float64]) -> float:
    return float(-(shares * np.log(shares)).sum())


def _gini(ordered: NDArray[np.int64]) -> float:
    count, total = len(ordered), float(ordered.sum())
    ranks = 2.0 * np.arange(1, count + 1) - count - 1
    return float(ranks @ ordered / (count * total)) if total else 0.0


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


def _balancing_rows(found: Balancing, clusters: ClusterQuality) -> Rows:
    bins = ", ".join(
        f"{old} > {new} of {least}" + f" to {2 * int(least) - 1}" * (int(least) > 1)
        for least, (old, new) in found.histogram.items()
    )
    return [
        ("packed", f"{found.after} of {found.before} labelled regions"),
        *((f"  {why}", f"{count} left out") for why, count in found.left_out.items()),
        ("clusters, before > after", f"{bins} regions"),
        ("imbalance", f"like {clusters.effective:.0f} > {found.effective:.0f} clusters of equal size"),
        *(("near-duplicates", f"{kept}: {count}, {other} first") for kept, other, count in found.examples),
    ]


def _text_rows(found: TextQuality) -> Rows:
    confidence = ", ".join(f"{low}+ {count}" for low, count in found.confidence.items() if count)
    return [
        ("words by confidence", confidence),
        ("tokens of a word", f"{found.tokens_per_word:.2f}"),
        ("tokens in use", f"{found.used_tokens} of {found.vocabulary}, {found.byte_tokens:.1%} single bytes"),
        ("words by script", _counted(list(found.scripts.items()))),
        ("words in other directions", _counted(list(found.directions.items())) or "none"),
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
