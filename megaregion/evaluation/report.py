"""Pages that fetch nothing, for light and dark screens: report.html of a run, and runs side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from megaregion.errors import UserError, say
from megaregion.evaluation import pictures
from megaregion.evaluation.encoders import crop
from megaregion.evaluation.page import Line, line_chart, render, smoothed, write_page
from megaregion.evaluation.pictures import Visuals
from megaregion.evaluation.scenes import RegionTable, Scene, open_image, read_image
from megaregion.evaluation.study import Study
from megaregion.files import read_json
from megaregion.schemas.curation import DROPPED
from megaregion.schemas.curation import SUMMARY as CURATED
from megaregion.schemas.evaluation import EVALUATION, SUMMARY, TRAINED, Evaluation, Table, read_evaluation
from megaregion.schemas.run import EVALUATIONS, METRICS, Metrics, read_metrics
from megaregion.settings import read_yaml

TITLES = {
    "loss": "Loss",
    "loss_object": "Loss on objects",
    "loss_text": "Loss on text",
    "lr": "Learning rate",
    "images_per_second": "Images per second",
}
"""Titles of the metrics of training."""
WHILE_TRAINING = {"region/knn": "Region 5-NN while training", "ocr/head_recall": "OCR tokens while training"}
"""Titles of the measures of evaluations.jsonl."""


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= dotted(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def _metrics_or_none(file: Path) -> Metrics | None:
    """Metrics of a run; None where it has none, and where its file is damaged, which is said."""
    try:
        return read_metrics(file)
    except UserError as error:
        if file.exists():
            say(f"{error}; the page goes without these curves")
        return None


# ---- one run ---------------------------------------------------------------------------------------

CURVES = {"loss_object": "object", "loss_text": "text", "lr": "neutral", "images_per_second": "neutral"}
"""Metrics of a run and their styles."""
SMOOTH = ("lr",)
"""Metrics that are smooth as they are."""
QUERIES, WORDS, SCENES = 12, 12, 4
"""How many objects, words and scenes are drawn."""
MOST_CLASSES = 40
"""Classes that the chart has room for; the most frequent ones are pictures."""


def write_tables(evaluation: Evaluation, path: Path) -> None:
    """Write a page of an evaluation's tables alone, for what has neither scenes nor curves."""
    write_page(path, "tables.html", title=evaluation.run, evaluation=evaluation)


def write_report(
    study: Study, visuals: Visuals, metrics: Path, path: Path, tables: Sequence[Table] | None = None
) -> None:
    """Write the page of a study and its pictures; without metrics.jsonl, it says so in the curves' place.

    The tables shown are the study's measures, unless others are given.
    """
    queries, seed = study.queries, study.config.seed
    try:
        logged, reason = read_metrics(metrics), ""
    except UserError as error:
        logged, reason = None, str(error)
    # A scene that gives many crops is decoded once.
    opened = lru_cache(maxsize=None)(open_image)

    def region_picture(scenes: Sequence[Scene], regions: RegionTable, row: int) -> Image.Image:
        return crop(opened(scenes[regions.scene[row]]), regions.boxes[row])

    write_page(
        path,
        "report.html",
        title=study.run.config.name,
        study=study,
        tables=study.tables if tables is None else tables,
        duration=_duration(logged),
        visuals=visuals,
        pictures=pictures,
        charts=_charts(logged, _metrics_or_none(metrics.with_name(EVALUATIONS))) if logged else {},
        no_curves=reason,
        objects=pictures.draw_objects(queries.objects, QUERIES, seed),
        words=pictures.draw(len(queries.words), WORDS, seed),
        scenes=[queries.scenes[place] for place in pictures.draw(len(queries.scenes), SCENES, seed)],
        picture=region_picture,
        classes=_class_chart(study),
        curation=Markup().join(curation_card(part.folder) for part in study.datasets.parts),
        settings=dotted(asdict(study.run.config)),
    )


def _charts(metrics: Metrics, evaluations: Metrics | None) -> dict[str, Markup | None]:
    """Charts by title; None for a metric that was never logged."""
    charts: dict[str, Markup | None] = {}
    for name, style in CURVES.items():
        curve, label = metrics.curve(name), f"{TITLES[name]} over the steps"
        line = Line(curve, style) if name in SMOOTH else Line(smoothed(curve), style, raw=curve)
        charts[TITLES[name]] = line_chart([line], label) if curve else None
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
            summary = read_json(folder / CURATED)
        except (OSError, ValueError):
            continue
        if isinstance(summary, dict):
            return summary
    return {}


def _parts(kept: int, dropped: Mapping[str, int]) -> dict[str, int]:
    """Parts of a bar: the kept one, then what was dropped, the largest first."""
    return {"kept": kept} | {name: n for name, n in sorted(dropped.items(), key=lambda item: -item[1]) if n}


# ---- runs side by side -----------------------------------------------------------------------------

COMPARED = ("loss", "loss_object", "loss_text", "images_per_second")
"""Metrics whose curves share a frame."""
STYLES = 8
"""Colours of runs; more runs share them."""
MOST_FRAMES = 8
MAP_SIDE = 300
"""Longest side of a map in the page, in pixels."""
LOCATION = ("name", "output")
"""Settings that only say where a run lies."""


@dataclass(frozen=True)
class RunRecord:
    """What training and evaluation left in one run's folder."""

    name: str
    """Name in the comparison, different from all others'."""
    folder: Path
    settings: Mapping[str, str]
    """All settings, by dotted name."""
    metrics: Metrics | None
    """None where nothing was logged."""
    evaluation: Evaluation | None
    """None where the run was not evaluated."""
    while_training: Metrics | None
    """Evaluations beside training; None where there were none."""

    @property
    def tables(self) -> dict[str, Table]:
        """The measures by key, without the summary; none where the run was not evaluated."""
        tables = self.evaluation.tables if self.evaluation else ()
        return {table.key: table for table in tables if table.key != SUMMARY}


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs; a UserError where a folder is no run, cannot be read, or is named twice."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(folders):
        raise UserError("a run is named twice; name each run once")
    return [_read_run(folder, _name(own, resolved)) for folder, own in zip(folders, resolved, strict=True)]


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """The end of a folder's path that tells it from the others: its own name, if that does."""
    ends = (folder.parts[-depth:] for depth in range(1, len(folder.parts) + 1))
    own = next(end for end in ends if sum(other.parts[-len(end) :] == end for other in folders) == 1)
    return "/".join(own)


def _read_run(folder: Path, name: str) -> RunRecord:
    config, evaluation = folder / "config.yaml", folder / EVALUATION
    if not config.is_file():
        raise UserError(f"{folder} is no run: it holds no config.yaml; name a folder of tools/pretrain.py")
    return RunRecord(
        name,
        folder,
        {key: _shown(value) for key, value in dotted(read_yaml(config)).items()},
        _metrics_or_none(folder / METRICS),
        read_evaluation(evaluation) if evaluation.exists() else None,
        _metrics_or_none(folder / EVALUATIONS),
    )


def _shown(value: object) -> str:
    """A setting's value, a list as on a command line."""
    return " ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def joined_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """A table for each measure with a row for each run; a run that lacks a measure or a column has a gap."""
    return [_joined(key, runs) for key in dict.fromkeys(key for run in runs for key in run.tables)]


def _joined(key: str, runs: Sequence[RunRecord]) -> Table:
    found = {run.name: run.tables.get(key) for run in runs}
    first = next(table for table in found.values() if table is not None)
    rows, notes = {}, {}
    for name, table in found.items():
        cells = table.rows.get(TRAINED, {}) if table else {}
        rows[name] = {column.key: cells.get(column.key) for column in first.columns}
        if table is not None and table.told != first.told:
            notes[name] = f"asked otherwise: {table.told}"
    return replace(first, rows=rows, notes=notes)


def write_comparison(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page, with the runs in this order."""
    styles = {run.name: f"run{place % STYLES}" for place, run in enumerate(runs)}
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in LOCATION)
    write_page(
        path,
        "comparison.html",
        title=" · ".join(run.name for run in runs),
        runs=runs,
        styles=styles,
        tables=joined_tables(runs),
        charts=_joined_charts(runs, styles),
        frames=_frames(runs),
        settings=[key for key in keys if len({run.settings.get(key) for run in runs}) > 1],
        MAP_SIDE=MAP_SIDE,
    )


def _joined_charts(runs: Sequence[RunRecord], styles: Mapping[str, str]) -> dict[str, Markup]:
    """Charts by title, of the metrics that any run has logged."""
    charts = {}
    for key, title in ({name: TITLES[name] for name in COMPARED} | WHILE_TRAINING).items():
        lines = []
        for run in runs:
            metrics = run.while_training if key in WHILE_TRAINING else run.metrics
            if metrics and (curve := metrics.curve(key)):
                drawn = curve if key in WHILE_TRAINING else smoothed(curve)
                lines.append(Line(drawn, styles[run.name], run.name))
        if lines:
            charts[title] = line_chart(lines, f"{title} over the steps")
    return charts


def _frames(runs: Sequence[RunRecord]) -> dict[str, list[Image.Image | None]]:
    """Frames that most runs have painted: the frame, then each run's map of it; None where it has none."""
    ending = ".map.jpg"
    have = [
        {file.name.removesuffix(ending): file for file in (run.folder / "pictures").glob(f"*{ending}")}
        for run in runs
    ]
    counts = Counter(name for own in have for name in own)
    frames = {}
    for name in sorted(counts, key=lambda name: (-counts[name], name))[:MOST_FRAMES]:
        maps = [own.get(name) for own in have]
        first = next(file for file in maps if file)
        files = [first.with_name(f"{name}.frame.jpg"), *maps]
        frames[name] = [read_image(file, "evaluate the run again") if file else None for file in files]
    return frames
