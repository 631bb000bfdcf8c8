"""The page that shows runs side by side: measures, curves in one frame, maps of the same frames, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from megaregion.errors import UserError
from megaregion.evaluation.page import Line, line_chart, smoothed, write_page
from megaregion.evaluation.report import WHILE_TRAINING, dotted, metrics_or_none
from megaregion.evaluation.scenes import read_image
from megaregion.schemas.evaluation import EVALUATION, SUMMARY, Evaluation, Table, read_evaluation
from megaregion.schemas.run import EVALUATIONS, METRICS, Metrics
from megaregion.settings import read_yaml

TRAINED = "trained"
"""The encoder whose rows are compared."""
CURVES = {
    "loss": "Loss",
    "loss_object": "Loss on objects",
    "loss_text": "Loss on text",
    "images_per_second": "Images per second",
}
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
    """Read runs.

    Raises:
        UserError: A folder is no run, cannot be read, or is named twice.
    """
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
        metrics_or_none(folder / METRICS),
        read_evaluation(evaluation) if evaluation.is_file() else None,
        metrics_or_none(folder / EVALUATIONS),
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
        charts=_charts(runs, styles),
        frames=_frames(runs),
        settings=[key for key in keys if len({run.settings.get(key) for run in runs}) > 1],
        MAP_SIDE=MAP_SIDE,
    )


def _charts(runs: Sequence[RunRecord], styles: Mapping[str, str]) -> dict[str, Markup]:
    """Charts by title, of the metrics that any run has logged."""
    charts = {}
    for key, title in (CURVES | WHILE_TRAINING).items():
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
