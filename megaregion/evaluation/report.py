"""report.html of a run: one self-contained page, no script, nothing fetched, for light and dark screens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megaregion.errors import UserError, say
from megaregion.evaluation import pictures
from megaregion.evaluation.page import Line, line_chart, render, smoothed, write_page
from megaregion.evaluation.pictures import Visuals
from megaregion.evaluation.study import Study
from megaregion.files import read_json
from megaregion.schemas.curation import DROPPED, SUMMARY
from megaregion.schemas.run import EVALUATIONS, Metrics, read_metrics

CURVES = {
    "loss_object": ("Loss on objects", "object", True),
    "loss_text": ("Loss on text", "text", True),
    "lr": ("Learning rate", "neutral", False),
    "images_per_second": ("Images per second", "neutral", True),
}
"""Title, style and whether to smooth it, by metric."""
WHILE_TRAINING = {"region/knn": "Region 5-NN while training", "ocr/head_recall": "OCR tokens while training"}
"""Titles of the measures of evaluations.jsonl."""
QUERIES, WORDS, SCENES = 12, 12, 4
"""How many objects, words and scenes are drawn."""
MOST_CLASSES = 40
"""Classes that the chart has room for; the most frequent ones are pictures."""


def write_report(study: Study, visuals: Visuals, metrics: Path, path: Path) -> None:
    """Write the page of a study and its pictures.

    Without the run's metrics.jsonl, the page says so where the curves would be.
    """
    queries, seed = study.queries, study.config.seed
    try:
        logged, reason = read_metrics(metrics), ""
    except UserError as error:
        logged, reason = None, str(error)
    write_page(
        path,
        "report.html",
        title=study.run.config.name,
        study=study,
        duration=_duration(logged),
        visuals=visuals,
        pictures=pictures,
        charts=_charts(logged, metrics_or_none(metrics.with_name(EVALUATIONS))) if logged else {},
        no_curves=reason,
        objects=pictures.draw_objects(queries.objects, QUERIES, seed),
        words=pictures.draw(len(queries.words), WORDS, seed),
        scenes=[queries.scenes[place] for place in pictures.draw(len(queries.scenes), SCENES, seed)],
        asked=pictures.Crops(queries.scenes),
        known=pictures.Crops(study.gallery.scenes),
        classes=_class_chart(study),
        curation=curation_card(study.config.dataset),
        settings=dotted(asdict(study.run.config)),
    )


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= dotted(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def curation_card(dataset: Path) -> Markup:
    """A card on what curation found, kept and dropped for these shards; empty if they have no summary."""
    summary = _read_summary(dataset)
    counts = summary.get("counts") or {}
    dropped = {name.removeprefix(DROPPED): n for name, n in counts.items() if name.startswith(DROPPED)}
    lost = {
        "below confidence": counts.get("words below confidence", 0),
        "without a token": counts.get("words without token", 0),
    }
    bars = {
        "Object proposals": _parts(counts.get("kept", 0), dropped),
        "Words found": _parts(counts.get("text regions", 0), lost),
    }
    bars = {title: parts for title, parts in bars.items() if any(parts.values())}
    return render("curation.html", bars=bars, clusters=summary.get("clusters")) if bars else Markup()


def _read_summary(dataset: Path) -> dict[str, Any]:
    for folder in (dataset, dataset.resolve().parent):
        try:
            summary = read_json(folder / SUMMARY)
        except (OSError, ValueError):
            continue
        if isinstance(summary, dict):
            return summary
    return {}


def _parts(kept: int, dropped: Mapping[str, int]) -> dict[str, int]:
    """Parts of a bar: the kept one, then what was dropped, the largest first."""
    return {"kept": kept} | {name: n for name, n in sorted(dropped.items(), key=lambda item: -item[1]) if n}


def metrics_or_none(file: Path) -> Metrics | None:
    """Metrics of a run; None where it has none, and where its file is damaged, which is said."""
    try:
        return read_metrics(file)
    except UserError as error:
        if file.exists():
            say(f"{error}; the page goes without these curves")
        return None


def _charts(metrics: Metrics, evaluations: Metrics | None) -> dict[str, Markup | None]:
    """Charts by title; None for a metric that was never logged."""
    charts: dict[str, Markup | None] = {}
    for name, (title, style, smooth) in CURVES.items():
        curve = metrics.curve(name)
        line = Line(smoothed(curve), style, raw=curve) if smooth else Line(curve, style)
        charts[title] = line_chart([line], f"{title} over the steps") if curve else None
    for name, title in WHILE_TRAINING.items():
        if evaluations and (curve := evaluations.curve(name)):
            charts[title] = line_chart([Line(curve, "object")], f"{title} over the steps", "{:.1%}".format)
    return charts


def _class_chart(study: Study) -> Markup:
    """Accuracy of each class by every encoder, best class of the trained encoder first."""
    true = study.queries.objects.names
    counts = Counter(true)
    shares: dict[str, dict[str, float]] = {name: {} for name, _ in counts.most_common(MOST_CLASSES)}
    for encoder, answers in study.answers.items():
        right = Counter(t for t, named in zip(true, answers.named, strict=True) if t == named)
        for name, by_encoder in shares.items():
            by_encoder[encoder] = right[name] / counts[name]
    order = sorted(shares, key=lambda name: (-shares[name]["trained"], name))
    rows = [(f"{name} ({counts[name]})", shares[name]) for name in order]
    return render("dots.svg", rows=rows, label="Region 5-NN accuracy of each class")


def _duration(metrics: Metrics | None) -> str:
    seconds = (metrics.duration if metrics else None) or 0
    if seconds < 90:
        return f"{seconds:.0f} seconds" if seconds else ""
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"
