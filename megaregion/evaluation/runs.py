"""What training and evaluation left in a run's folder, read again to be compared with other runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megaregion.errors import UserError
from megaregion.evaluation.estimates import Estimate
from megaregion.evaluation.tables import Column, Table
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
    evaluation: Mapping[str, Any] | None
    """Content of evaluation.json; None where the run was not evaluated."""
    looks: Metrics | None
    """Evaluations beside training; None where there were none."""

    def table(self, key: str) -> Mapping[str, Any] | None:
        """One measure of evaluation.json; None if it was not measured."""
        measures = (self.evaluation or {}).get("measures", ())
        return next((each for each in measures if each["key"] == key), None)


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
    keys = list(dict.fromkeys(
        each["key"] for run in runs for each in (run.evaluation or {}).get("measures", ())
    ))  # fmt: skip
    return [_joined(key, runs) for key in keys]


def _joined(key: str, runs: Sequence[RunRecord]) -> Table:
    found = {run.name: run.table(key) for run in runs}
    first = next(table for table in found.values() if table is not None)
    columns = tuple(Column(each["key"], each["title"], each["chance"]) for each in first["columns"])
    rows, notes = {}, {}
    for name, table in found.items():
        cells = (table or {}).get("rows", {}).get(TRAINED) or {}
        rows[name] = tuple(_estimate(cells.get(column.key)) for column in columns)
        if table is not None and table["told"] != first["told"]:
            notes[name] = f"asked otherwise: {table['told']}"
    return Table(key, first["title"], first["told"], columns, rows, first["chance_is"], notes)


def _estimate(cell: Mapping[str, Any] | None) -> Estimate | None:
    return None if cell is None else Estimate(cell["mean"], cell["low"], cell["high"], tuple(cell["seeds"]))


def _read(folder: Path, name: str) -> RunRecord:
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} is no run: it holds no config.yaml; name a folder of tools/pretrain.py")
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        file = folder / "evaluation.json"
        evaluation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} cannot be read ({reason}); evaluate the run again") from None
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
