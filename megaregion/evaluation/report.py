"""report.html of a run: one self-contained page, no script, nothing fetched, for light and dark screens."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from megaregion.errors import UserError
from megaregion.evaluation import charts, exhibits, numbers, sheets
from megaregion.evaluation.cells import measure_cards
from megaregion.evaluation.curated import curation_card
from megaregion.evaluation.study import Study
from megaregion.evaluation.visualise import Pictures
from megaregion.files import write_text
from megaregion.schemas.metrics import Metrics, read_metrics

CURVES = (
    ("loss_object", "Loss on objects", "object", True),
    ("loss_text", "Loss on text", "text", True),
    ("lr", "Learning rate", "neutral", False),
    ("images_per_second", "Images per second", "neutral", True),
)
"""Metric, title, style and whether to smooth it."""

LOOKS = (("region/knn", "Region 5-NN while training"), ("ocr/head_recall", "OCR tokens while training"))
"""Measures of evaluations.jsonl, and their titles."""


def write_report(study: Study, pictures: Pictures, metrics: Path, path: Path) -> None:
    """Write the page.

    Args:
        study: What was found.
        pictures: Maps, attention and clusters, see visualise.py.
        metrics: The run's metrics.jsonl; without it the page says so where the curves would be.
        path: The page; readers see the old one or the new one.
    """
    template = Template(read_part("report.html"))
    curves, logged = _curves(metrics)
    page = template.substitute(
        title=escape(study.run.config.name),
        style=read_part("style.html"),
        split=escape(study.config.split),
        summary=_summary(study, logged),
        tiles=numbers.tiles(study),
        table=numbers.result_table(study),
        measures=measure_cards(study.tables)
        or '<div class="card missing">No measure was asked for; see --measures.</div>',
        maps=exhibits.map_section(pictures),
        attention=exhibits.attention_section(pictures),
        clusters=exhibits.cluster_section(pictures),
        curves=curves,
        neighbours=sheets.neighbour_sheet(study, ("trained", "untrained")),
        words=sheets.word_sheet(study) or '<div class="card missing">This run has no text to read.</div>',
        classes=numbers.class_chart(study),
        scenes=sheets.scene_sheet(study),
        facts=_facts(study),
        footer=_footer(study),
    )
    write_text(path, page)


def read_part(name: str) -> str:
    """A file of the page's that lies beside this one."""
    return files("megaregion.evaluation").joinpath(name).read_text(encoding="utf-8")


def _curves(path: Path) -> tuple[str, Metrics | None]:
    try:
        metrics = read_metrics(path)
    except UserError as error:
        return f'<div class="card missing">No curves: {escape(str(error))}.</div>', None
    cards = []
    for name, title, style, smooth in CURVES:
        curve = metrics.curve(name)
        if curve:
            chart = charts.line_chart(curve, style, f"{title} over the steps", smooth=smooth)
            cards.append(f'<div class="card"><h3>{title}</h3>{chart}</div>')
        else:
            cards.append(f'<div class="card missing"><h3>{title}</h3>Never logged in this run.</div>')
    cards += _looks(path.with_name("evaluations.jsonl"))
    return f'<div class="curves">{"".join(cards)}</div>', metrics


def _looks(path: Path) -> list[str]:
    """Curves of the evaluations beside training, if there were any."""
    try:
        looks = read_metrics(path)
    except UserError:
        return []
    cards = []
    for name, title in LOOKS:
        curve = looks.curve(name)
        if curve:
            chart = charts.line_chart(curve, "object", f"{title} over the steps", _share, smooth=False)
            cards.append(f'<div class="card"><h3>{title}</h3>{chart}</div>')
    return cards


def _share(value: float) -> str:
    return f"{value:.1%}"


def _summary(study: Study, metrics: Metrics | None) -> str:
    config, step = study.run.config, study.run.step
    model = config.model
    images = step * config.train.global_batch
    duration = metrics.duration if metrics else None
    hours = f" in {_duration(duration)}" if duration else ""
    return (
        f"<b>{step:,} of {config.train.steps:,} steps</b>, {images:,} images seen{hours}. "
        f"{model.image_size} px, patches of {model.patch_size}, width {model.width}, {model.depth} blocks, "
        f"region tokens in the last {model.region_layers}. Asked about "
        f"<b>{len(study.queries.objects):,} objects and {len(study.queries.words):,} words</b> in "
        f"{len(study.queries.scenes):,} held-out scenes."
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def _facts(study: Study) -> str:
    data = study.data
    facts = {
        "training images": data.samples,
        "object regions": data.objects,
        "object classes (clusters)": data.object_classes,
        "text regions": data.texts,
        "text classes (tokens)": data.text_classes,
        "shards": len(data.shards),
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{value:,}</dd></div>" for name, value in facts.items())
    settings = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(str(value))}</b></div>"
        for name, value in _flatten(asdict(study.run.config))
    )
    return (
        f'{curation_card(study.config.dataset)}<div class="card"><dl class="facts">{shown}</dl>'
        f'<details><summary>All settings</summary><div class="settings">{settings}</div></details></div>'
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    flat: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat.extend(_flatten(value, f"{prefix}{name}."))
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def _footer(study: Study) -> str:
    spent = ", ".join(f"{escape(name)} {value:.1f} s" for name, value in study.seconds.items())
    return (
        f"Gallery: {len(study.gallery.objects):,} objects and {len(study.gallery.words):,} words of "
        f"{len(study.gallery.scenes):,} training scenes, drawn with seed {study.config.seed}. "
        f"Time: {spent}. Made by tools/evaluate.py, which also writes the numbers as JSON beside this page."
    )
