"""What training and evaluation left in a run's folder, read again to be compared with other runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megaregion.errors import UserError
from megaregion.schemas.evaluation import EVALUATION, SUMMARY, Evaluation, Table, read_evaluation
from megaregion.schemas.metrics import Metrics, read_metrics

TRAINED = "trained"


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder tells it."""

    name: str
    """Name in the comparison, different from all others'."""
    folder: Path
    settings: Mapping[str, str]
    """All settings, by dotted name."""
    metrics: Metrics | None
    """None where nothing was logged."""
    evaluation: Evaluation | None
    """None where the run was not evaluated."""
    looks: Metrics | None
    """Evaluations beside training; None where there were none."""

    @property
    def tables(self) -> dict[str, Table]:
        """The measures of evaluation.json by key, without the summary; none where it was not evaluated."""
        tables = self.evaluation.tables if self.evaluation else ()
        return {table.key: table for table in tables if table.key != SUMMARY}


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs.

    Raises:
        UserError: A folder is no run, or one is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice; name each run once")
    names = [folder.resolve().name for folder in folders]
    # Runs of one name are told apart by the folder that they lie in.
    return [
        _read(folder, name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}")
        for folder, name in zip(folders, names, strict=True)
    ]


def joined_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """A table for each measure with a row for each run; a run that lacks a measure or a column has a gap."""
    return [_joined(key, runs) for key in dict.fromkeys(key for run in runs for key in run.tables)]


def _joined(key: str, runs: Sequence[RunRecord]) -> Table:
    found = {run.name: run.tables.get(key) for run in runs}
    first = next(table for table in found.values() if table is not None)
    rows, notes = {}, {}
    for name, table in found.items():
        own = table.rows.get(TRAINED, ()) if table else ()
        cells = dict(zip((column.key for column in table.columns), own, strict=False)) if table else {}
        rows[name] = tuple(cells.get(column.key) for column in first.columns)
        if table is not None and table.told != first.told:
            notes[name] = f"asked otherwise: {table.told}"
    return replace(first, rows=rows, notes=notes)


def _read(folder: Path, name: str) -> RunRecord:
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} is no run: it holds no config.yaml; name a folder of tools/pretrain.py")
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} cannot be read ({reason}); evaluate the run again") from None
    file = folder / EVALUATION
    evaluation = read_evaluation(file) if file.is_file() else None
    return RunRecord(
        name, folder, _flat(settings), _metrics(folder / "metrics.jsonl"), evaluation,
        _metrics(folder / "evaluations.jsonl"),
    )  # fmt: skip


def _metrics(file: Path) -> Metrics | None:
    try:
        return read_metrics(file)
    except UserError:
        return None  # The page says which run has no curve.


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
