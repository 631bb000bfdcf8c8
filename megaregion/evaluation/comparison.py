"""The page that shows runs side by side: measures, curves in one frame, maps of the same frames, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from megaregion.evaluation.cells import measure_table
from megaregion.evaluation.charts import lines_chart
from megaregion.evaluation.pictures import data_uri
from megaregion.evaluation.report import read_part
from megaregion.evaluation.runs import RunRecord, joined_tables
from megaregion.files import write_text
from megaregion.schemas.metrics import Curve

CURVES = (
    ("loss", "Loss"),
    ("loss_object", "Loss on objects"),
    ("loss_text", "Loss on text"),
    ("images_per_second", "Images per second"),
)
LOOKS = (("region/knn", "Region 5-NN while training"), ("ocr/head_recall", "OCR tokens while training"))
STYLES = 8
"""Colours of runs; more runs share them."""
MOST_FRAMES = 8
MAP_SIDE = 300
"""Longest side of a map in the page, in pixels."""
LOCATION = ("name", "output")
"""Settings that only say where a run lies."""


def write_comparison(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page.

    Args:
        runs: Runs in the order of their columns.
        path: The page; readers see the old one or the new one.
    """
    styles = {run.name: f"run{place % STYLES}" for place, run in enumerate(runs)}
    tables = joined_tables(runs)
    cards = "".join(
        f'<div class="card measure">{measure_table(each, styles=styles)}</div>' for each in tables
    )
    missing = [run.name for run in runs if not run.tables]
    if missing:
        told = f"Not evaluated: {escape(', '.join(missing))}; see tools/evaluate.py."
        cards += f'<div class="card missing">{told}</div>'
    page = Template(read_part("comparison.html")).substitute(
        title=escape(" · ".join(run.name for run in runs)),
        style=read_part("style.html"),
        summary=_summary(runs),
        measures=cards,
        legend="".join(f'<span class="{styles[run.name]}">{escape(run.name)}</span>' for run in runs),
        curves=_curves(runs, styles),
        maps=_maps(runs),
        settings=_settings(runs),
    )
    write_text(path, page)


def _summary(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        trained = f"{run.metrics.last_step:,} steps" if run.metrics else "nothing logged"
        evaluated = f", evaluated after {run.evaluation.step:,}" if run.evaluation else ""
        parts.append(f"<b>{escape(run.name)}</b>: {trained}{evaluated}")
    return "; ".join(parts) + "."


def _curves(runs: Sequence[RunRecord], styles: Mapping[str, str]) -> str:
    cards = []
    for names, source in ((CURVES, "metrics"), (LOOKS, "looks")):
        for key, title in names:
            curves: dict[str, Curve] = {}
            for run in runs:
                metrics = getattr(run, source)
                if metrics is not None and metrics.curve(key):
                    curves[run.name] = metrics.curve(key)
            if curves:
                chart = lines_chart(curves, styles, f"{title} over the steps", smooth=source == "metrics")
                cards.append(f'<div class="card"><h3>{title}</h3>{chart}</div>')
    if not cards:
        return '<div class="card missing">None of these runs has logged a step.</div>'
    return f'<div class="curves">{"".join(cards)}</div>'


def _maps(runs: Sequence[RunRecord]) -> str:
    """Frames that several runs have painted, or the first run's own, in one row each."""
    have = [{file.name.removesuffix(".map.jpg"): file for file in _files(run)} for run in runs]
    counts = {name: sum(name in own for own in have) for own in have for name in own}
    frames = sorted(counts, key=lambda name: (-counts[name], name))[:MOST_FRAMES]
    if not frames:
        return "No run here has pictures; tools/evaluate.py makes them."
    cells = [
        '<div class="name">frame</div>',
        *(f'<div class="name">{escape(run.name)}</div>' for run in runs),
    ]
    for name in frames:
        first = next(own[name] for own in have if name in own)
        cells.append(_picture(first.with_name(f"{name}.frame.jpg"), name))
        cells += [_picture(own[name], name) if name in own else "<div>&ndash;</div>" for own in have]
    return f'<div class="versus" style="--runs:{len(runs) + 1}">{"".join(cells)}</div>'


def _files(run: RunRecord) -> list[Path]:
    return sorted((run.folder / "pictures").glob("*.map.jpg"))


def _picture(file: Path, name: str) -> str:
    with Image.open(file) as image:
        return f'<div><img src="{data_uri(image.convert("RGB"), MAP_SIDE)}" alt="{escape(name)}"></div>'


def _settings(runs: Sequence[RunRecord]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key not in LOCATION))
    differing = [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
    if not differing:
        return "All settings are the same."
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{escape(key)}</td>"
        + "".join(f"<td>{escape(run.settings.get(key, '-'))}</td>" for run in runs)
        + "</tr>"
        for key in differing
    )
    top = f"<thead><tr><th>setting</th>{head}</tr></thead>"
    return f'<table class="differing">{top}<tbody>{rows}</tbody></table>'
