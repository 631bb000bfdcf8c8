"""The page of an evaluation, report.html, which fetches nothing and fits light and dark screens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from megaregion.evaluation import pictures
from megaregion.evaluation.encoders import crop
from megaregion.evaluation.page import duration, render, write_page
from megaregion.evaluation.pictures import Visuals
from megaregion.evaluation.runs import Run, charts
from megaregion.evaluation.scenes import RegionTable, Scene, open_image
from megaregion.evaluation.study import Study
from megaregion.files import read_json
from megaregion.schemas.curation import DROPPED
from megaregion.schemas.curation import SUMMARY as CURATED
from megaregion.schemas.evaluation import Evaluation, Table
from megaregion.settings import dotted

QUERIES, WORDS, SCENES = 12, 12, 4
"""How many objects, words and scenes are drawn."""
MOST_CLASSES = 40
"""Classes that the chart has room for; the most frequent ones are pictures."""


def write_tables(evaluation: Evaluation, path: Path) -> None:
    """Write a page of an evaluation's tables alone, for what has neither scenes nor curves."""
    write_page(path, "tables.html", title=evaluation.run, evaluation=evaluation)


def write_report(
    study: Study, visuals: Visuals, folder: Path, path: Path, tables: Sequence[Table] | None = None
) -> None:
    """Write the page of a study and its pictures; without curves in the run's folder, it says so there.

    The tables shown are the study's measures, unless others are given.
    """
    queries, seed = study.queries, study.config.seed
    run = Run(folder).read()
    times = run.metrics.curve("time")[1]
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
        duration=duration(float(times[-1] - times[0])) if len(times) > 1 else "",
        visuals=visuals,
        pictures=pictures,
        charts=charts([run]),
        broken=run.broken,
        objects=pictures.draw_objects(queries.objects, QUERIES, seed),
        words=pictures.draw(len(queries.words), WORDS, seed),
        scenes=[queries.scenes[place] for place in pictures.draw(len(queries.scenes), SCENES, seed)],
        picture=region_picture,
        classes=_class_chart(study),
        curation=Markup().join(curation_card(part.folder) for part in study.datasets.parts),
        settings=dotted(asdict(study.run.config)),
    )


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
