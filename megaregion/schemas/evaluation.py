"""evaluation.json: what was measured of a run, as tables in which every number has its interval.

    {"run": "demo", "step": 600, "split": "test", "neighbours": 5, "seeds": 5, "test_regions": 900, ...,
     "seconds": {"trained": 4.2, ...},
     "tables": [{"key": "region", "title": "Naming regions", "told": "900 held-out objects ...",
                 "columns": [{"key": "knn", "title": "5-NN", "group": "", "chance": 0.12}, ...],
                 "chance_is": "most frequent class", "notes": {"pixels": "crops at 32 x 32, raw"},
                 "rows": {"trained": {"knn": {"mean": 0.5, "low": 0.4, "high": 0.6, "seeds": [0.5]}, ...}}}]}

The dataclasses are the file: a field is a key, its type what the reader takes. Markdown, text for a terminal
and the scalars of trackers are made of its tables here, so that all who read it show the same numbers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from itertools import groupby
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from megaregion.errors import UserError
from megaregion.files import read_json, write_text

EVALUATION = "evaluation.json"
"""Name of the file in a run's folder; that of another split than test has the split in its name."""
SUMMARY = "summary"
"""Key of the table that every evaluation has: test beside train against the whole gallery."""
MEASURES = ("region", "retrieval", "ocr", "correspondence", "segmentation", "separation")
"""Keys of the tables that are made when they are asked for, in the order in which they are shown."""
QUICK = ("region", "retrieval", "ocr", "separation")
"""Those that cost little beside encoding the regions."""
ANNOTATED = ("region", "frequency", "retrieval", "segmentation", "proposals")
"""Those of annotated images, in this order; their tables' keys are NAME/KEY, with the file's name."""
TRAINED = "trained"
"""Name of the row of a run's own encoder."""
FOOTNOTE = "Percent; in brackets the 95% interval over seeds and over the groups of test data."
DIGITS = 5
"""Decimals of a share in the file: finer than one region in ten thousand."""


@dataclass(frozen=True)
class Estimate:
    """A statistic on test data."""

    mean: float
    """Mean over the seeds."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""
    seeds: tuple[float, ...]
    """The statistic under each seed; one where nothing is drawn, none if an old file says only the mean."""

    def __str__(self) -> str:
        mean = f"{100 * self.mean:.1f}"
        return f"{mean} [{100 * self.low:.1f}, {100 * self.high:.1f}]" if self.seeds else mean


@dataclass(frozen=True)
class Column:
    """One number of a table."""

    key: str
    """Name in JSON and TensorBoard."""
    title: str
    """Head of the column."""
    chance: float | None = None
    """What knowing nothing of the image gives: the most frequent answer, or a random one."""
    group: str = ""
    """Head over this column and its neighbours of the same group."""


@dataclass(frozen=True)
class Table:
    """What one measure found of every encoder."""

    key: str
    """Name in JSON and TensorBoard."""
    title: str
    """Name on a page."""
    told: str
    """One or two sentences: what is asked of whom, and how many."""
    columns: tuple[Column, ...]
    rows: Mapping[str, Mapping[str, Estimate | None]]
    """By encoder and column; None where the encoder cannot say."""
    chance_is: str = "chance"
    """What the columns' chance stands for."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Further words on an encoder's row."""


@dataclass(frozen=True)
class Evaluation:
    """The content of evaluation.json."""

    run: str
    """Name of the run."""
    step: int
    """Optimizer steps behind the weights."""
    split: str
    """Held-out split that was asked about."""
    tables: tuple[Table, ...]
    """The summary first."""
    test_regions: int
    test_words: int
    gallery_regions: int
    gallery_words: int
    gallery_scenes: int
    classes: int
    """Classes of the gallery's objects."""
    seeds: int = 1
    """Draws behind a mean; version 0.1.0 made one and did not say so."""
    neighbours: int = 5
    """Neighbours that vote."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time by encoder, and by step of the demo."""
    demo_peak_memory_bytes: int | None = None
    """Most memory of all processes of the demo."""

    def table(self, key: str) -> Table:
        """The table of this key.

        Raises:
            KeyError: It was not measured.
        """
        return {table.key: table for table in self.tables}[key]


def summary_columns(split: str, region_chance: float | None, word_chance: float | None) -> tuple[Column, ...]:
    """Columns of the summary: each number of the held-out split beside that of the training scenes.

    The chances are those of always naming the most frequent class, and the most frequent tokens.
    """
    groups = (
        ("region_knn", "region_knn_train", "Region 5-NN", region_chance),
        ("ocr_recall_at_5", "ocr_train_recall_at_5", "OCR recall@5, text head", word_chance),
        ("ocr_knn_recall_at_5", "ocr_knn_train_recall_at_5", "OCR recall@5, 5-NN", word_chance),
    )
    return tuple(
        column
        for asked, known, group, chance in groups
        for column in (Column(asked, split, chance, group), Column(known, "train", None, group))
    )


def with_other_data(evaluation: Evaluation, path: Path) -> Evaluation:
    """An evaluation with the tables that the file at a path holds of other data, at the same step.

    What a scene set says stands before annotated images, and the file keeps its counts.
    """
    try:
        old = read_evaluation(path)
    except UserError:
        return evaluation
    if (old.run, old.step, old.split) != (evaluation.run, evaluation.step, evaluation.split):
        return evaluation
    own = {table.key.rpartition("/")[0] for table in evaluation.tables}
    kept = [table for table in old.tables if table.key.rpartition("/")[0] not in own]
    tables = sorted((*kept, *evaluation.tables), key=lambda table: "/" in table.key)
    counts = old if any("/" not in table.key for table in kept) else evaluation
    return replace(counts, tables=tuple(tables), seconds={**old.seconds, **evaluation.seconds})


# ---- rendering -------------------------------------------------------------------------------------


def markdown(tables: Iterable[Table], level: int = 2, footnote: str = FOOTNOTE) -> str:
    """Tables as Markdown, each under a heading of this level, with a note on how to read a cell."""
    parts = []
    for table in tables:
        head, *body = cells(table)
        lines = [head, ["---", *(["---:"] * len(table.columns))], *body]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        rows = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
        notes = "".join(f"\n\n{encoder}: {note}" for encoder, note in table.notes.items())
        parts.append(f"{'#' * level} {table.title}\n\n{table.told}\n\n{rows}{notes}\n")
    return "\n".join([*parts, f"{footnote}\n"])


def cells(table: Table) -> list[list[str]]:
    """A table as texts, the heads of its columns first."""
    titles = [f"{column.group}, {column.title}".removeprefix(", ") for column in table.columns]
    return [["encoder", *titles], *_body(table)]


def text(tables: Iterable[Table], intervals: bool = True) -> str:
    """Tables aligned for a terminal, with their intervals or without."""
    blocks = []
    for table in tables:
        sizes = Counter(column.group for column in table.columns)
        # The columns of a group share the width of its name.
        titles = [each.title.rjust(-(-len(each.group) // sizes[each.group])) for each in table.columns]
        lines = [[table.title, *titles], *_body(table, intervals)]
        heads = _heads(table.columns, lines) if any(sizes) else ""
        blocks.append(f"{heads}{aligned(lines)}")
    return "\n\n".join(blocks)


def joined_tables(runs: Mapping[str, Mapping[str, Table]]) -> list[Table]:
    """A table for each measure with a row for each run, from the tables by key of each run by name.

    A run that lacks a measure or a column has a gap.
    """
    return [_joined(key, runs) for key in dict.fromkeys(key for tables in runs.values() for key in tables)]


def _joined(key: str, runs: Mapping[str, Mapping[str, Table]]) -> Table:
    found = {name: tables.get(key) for name, tables in runs.items()}
    first = next(table for table in found.values() if table is not None)
    rows, notes = {}, {}
    for name, table in found.items():
        cells = table.rows.get(TRAINED, {}) if table else {}
        rows[name] = {column.key: cells.get(column.key) for column in first.columns}
        if table is not None and table.told != first.told:
            notes[name] = f"asked otherwise: {table.told}"
    return replace(first, rows=rows, notes=notes)


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,), indent: str = "") -> str:
    """Rows of cells below each other, two spaces between columns; all but ``left`` ones aligned right.

    Any table's rows: of a plan, of a curation, of a benchmark.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(indent + line.rstrip() for line in lines)


def scalars(tables: Iterable[Table], encoder: str) -> dict[str, float]:
    """Means of one encoder, by TABLE/COLUMN."""
    return {
        f"{table.key}/{key}": cell.mean
        for table in tables
        for key, cell in table.rows.get(encoder, {}).items()
        if cell is not None
    }


def _body(table: Table, intervals: bool = True) -> Iterator[list[str]]:
    for encoder, cells in table.rows.items():
        own = (cells[column.key] for column in table.columns)
        shown = (cell if intervals or cell is None else replace(cell, seeds=()) for cell in own)
        yield [encoder, *("-" if cell is None else str(cell) for cell in shown)]
    chances = (column.chance for column in table.columns)
    yield [table.chance_is, *("" if chance is None else f"{100 * chance:.1f}" for chance in chances)]


def _heads(columns: Sequence[Column], lines: Sequence[Sequence[str]]) -> str:
    """The line above the titles: each group over its columns."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    spans = groupby(zip(columns, widths[1:], strict=True), lambda pair: pair[0].group)
    heads = [f"{group:>{sum(width + 2 for _, width in own) - 2}}" for group, own in spans]
    return "  ".join([" " * widths[0], *heads]) + "\n"


# ---- the file --------------------------------------------------------------------------------------


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json, so that a reader sees the old file or the new one."""
    seconds = {name: round(value, 2) for name, value in evaluation.seconds.items()}
    write_text(path, json.dumps({**_rounded(asdict(evaluation)), "seconds": seconds}, indent=1) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    """Read evaluation.json of this version or of an older one.

    Raises:
        UserError: It cannot be read, lacks a key, or a value is of another type; the text names file and key.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}); write it anew with tools/evaluate.py") from None
    try:
        content = _require(content, dict, "an object", "its content")
        key = "tables" if "tables" in content else "measures"
        tables: tuple[Table, ...] = _read(tuple[Table, ...], content.get(key, []), key)
        for place, table in enumerate(tables):
            for encoder, cells in table.rows.items():
                for column in table.columns:
                    if column.key not in cells:
                        raise ValueError(f" lacks {key}[{place}].rows.{encoder}.{column.key}")
        if "rows" in content and all(table.key != SUMMARY for table in tables):
            tables = (_old_summary(content), *tables)
        found: Evaluation = _read(Evaluation, {**content, "tables": []}, "")
    except ValueError as error:
        raise UserError(f"{path}{error}; write it anew with tools/evaluate.py") from None
    return replace(found, tables=tables)


def _read(kind: Any, value: Any, way: str) -> Any:
    """A value of the file as an annotation says.

    Raises:
        ValueError: It is something else, or lacks a key; the text goes on from the file's name.
    """
    base, of = get_origin(kind), get_args(kind)
    if base is UnionType:
        return None if value is None else _read(of[0], value, way)
    if base is tuple:
        items = _require(value, list, "a list", way)
        if Ellipsis not in of and len(items) != len(of):
            _refuse(value, "two numbers", way)
        return tuple(_read(of[0], each, f"{way}[{place}]") for place, each in enumerate(items))
    if base is Mapping:
        items = _require(value, dict, "an object", way).items()
        return {key: _read(of[1], each, f"{way}.{key}") for key, each in items}
    if is_dataclass(kind):
        return _read_fields(kind, _require(value, dict, "an object", way), way)
    if kind is str:
        return _require(value, str, "a text", way)
    try:
        finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # An int that no float holds.
        finite = False
    if not finite:
        _refuse(value, "a finite number", way)
    if kind is int and (value < 0 or value != int(value)):
        _refuse(value, "a whole number of at least 0", way)
    return kind(value)


def _read_fields(kind: Any, content: Mapping[str, Any], way: str) -> Any:
    hints, values = get_type_hints(kind), {}
    for each in fields(kind):
        key = f"{way}.{each.name}".removeprefix(".")
        if each.name in content:
            values[each.name] = _read(hints[each.name], content[each.name], key)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f" lacks {key}")
    return kind(**values)


def _require(value: Any, kind: type, wanted: str, way: str) -> Any:
    return value if isinstance(value, kind) else _refuse(value, wanted, way)


def _refuse(value: Any, wanted: str, way: str) -> Any:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    raise ValueError(f": {way} must be {wanted}, got {shown}")


def _rounded(value: Any) -> Any:
    """Shares as the file holds them; JSON has no word for a number that is not finite."""
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class _OldRow:
    """A row of the summary of version 0.1.0, which had an interval for one number and no other."""

    encoder: str
    region_knn: float | None
    region_knn_train: float | None
    ocr_recall_at_5: float | None
    ocr_train_recall_at_5: float | None
    ocr_knn_recall_at_5: float | None
    ocr_knn_train_recall_at_5: float | None
    ocr_prior: float | None
    region_knn_interval: tuple[float, float]
    variant: str | None = None


@dataclass(frozen=True)
class _OldSummary:
    split: str
    test_regions: int
    test_words: int
    region_prior: float
    rows: tuple[_OldRow, ...]


def _old_summary(content: Mapping[str, Any]) -> Table:
    old: _OldSummary = _read(_OldSummary, content, "")
    word_chance = old.rows[-1].ocr_prior if old.rows else None
    columns = summary_columns(old.split, old.region_prior, word_chance)
    rows: dict[str, dict[str, Estimate | None]] = {}
    for row in old.rows:
        shares = {column.key: getattr(row, column.key) for column in columns}
        cells = {key: None if x is None else Estimate(x, x, x, ()) for key, x in shares.items()}
        if row.region_knn is not None:
            cells["region_knn"] = Estimate(row.region_knn, *row.region_knn_interval, (row.region_knn,))
        rows[row.encoder] = cells
    notes = {row.encoder: row.variant for row in old.rows if row.variant is not None}
    told = f"{old.test_regions:,} objects and {old.test_words:,} words."
    return Table(SUMMARY, "Test beside train", told, columns, rows, "most frequent", notes)
