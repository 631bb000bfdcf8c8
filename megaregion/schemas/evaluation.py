"""evaluation.json: what was measured of a run, as tables in which every number has its interval.

    {"run": "demo", "step": 600, "split": "test", "neighbours": 5, "seeds": 5, "test_regions": 900, ...,
     "seconds": {"trained": 4.2, ...},
     "tables": [{"key": "region", "title": "Naming regions", "told": "900 held-out objects ...",
                 "columns": [{"key": "knn", "title": "5-NN", "group": "", "chance": 0.12}, ...],
                 "chance_is": "most frequent class", "notes": {"pixels": "crops at 32 x 32, raw"},
                 "rows": {"trained": {"knn": {"mean": 0.5, "low": 0.4, "high": 0.6, "seeds": [0.5]}, ...}}}]}

Evaluation writes it, and the demo adds its times. The report, the comparison of runs and the model card read
it; Markdown, text for a terminal and TensorBoard scalars are made of its tables here, so that all of them
show the same numbers. Shares lie in 0..1.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from megaregion.errors import UserError
from megaregion.files import write_text

EVALUATION = "evaluation.json"
"""Name of the file in a run's folder; that of another split than test has the split in its name."""
SUMMARY = "summary"
"""Key of the table that every evaluation has: test beside train against the whole gallery."""
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
    rows: Mapping[str, tuple[Estimate | None, ...]]
    """By encoder, one estimate a column; None where the encoder cannot say."""
    chance: str = "chance"
    """What the columns' chance stands for."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Further words on an encoder's row."""

    def estimate(self, encoder: str, column: str) -> Estimate | None:
        """One cell.

        Raises:
            KeyError: There is no such row or column.
        """
        place = {each.key: place for place, each in enumerate(self.columns)}[column]
        return self.rows[encoder][place]


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
    seeds: int
    """Draws behind a mean."""
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

    Args:
        split: Name of the held-out split.
        region_chance: Accuracy of always naming the most frequent class.
        word_chance: Recall of always naming the most frequent tokens; None without text.
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


# ---- rendering -------------------------------------------------------------------------------------


def markdown(tables: Iterable[Table], level: int = 2) -> str:
    """Tables as Markdown, each under a heading of this level, with a note on how to read a cell."""
    parts = []
    for table in tables:
        titles = [f"{column.group}, {column.title}".removeprefix(", ") for column in table.columns]
        lines = [["encoder", *titles], ["---", *(["---:"] * len(titles))], *_body(table)]
        rows = "\n".join(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )
        notes = "".join(f"\n\n{encoder}: {note}" for encoder, note in table.notes.items())
        parts.append(f"{'#' * level} {table.title}\n\n{table.told}\n\n{rows}{notes}\n")
    return "\n".join([*parts, f"{FOOTNOTE}\n"])


def text(tables: Iterable[Table], intervals: bool = True) -> str:
    """Tables aligned for a terminal, with their intervals or without."""
    blocks = []
    for table in tables:
        lines = [[table.title, *(column.title for column in table.columns)], *_body(table, intervals)]
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        sizes = Counter(column.group for column in table.columns)
        for place, column in enumerate(table.columns, start=1):
            widths[place] = max(widths[place], -(-len(column.group) // sizes[column.group]))
        heads = [_heads(table.columns, widths)] if any(sizes) else []
        blocks.append("\n".join([*heads, *(_line(line, widths) for line in lines)]))
    return "\n\n".join(blocks)


def scalars(tables: Iterable[Table], encoder: str) -> dict[str, float]:
    """Means of one encoder, by TABLE/COLUMN."""
    return {
        f"{table.key}/{column.key}": cell.mean
        for table in tables
        for column, cell in zip(table.columns, table.rows.get(encoder, ()), strict=False)
        if cell is not None
    }


def write_board(folder: Path, step: int, tables: Sequence[Table]) -> None:
    """Add the means to TensorBoard, one series an encoder, under evaluation/TABLE/COLUMN.

    Args:
        folder: The run's tensorboard folder; each encoder gets a folder of its own in it.
        step: Steps behind the weights.
        tables: What was measured.
    """
    from torch.utils.tensorboard.writer import SummaryWriter

    for encoder in sorted({encoder for table in tables for encoder in table.rows}):
        writer = SummaryWriter(str(folder / "evaluation" / encoder.replace("/", "-")))
        for name, value in scalars(tables, encoder).items():
            writer.add_scalar(f"evaluation/{name}", value, step)
        writer.close()


def _body(table: Table, intervals: bool = True) -> Iterator[list[str]]:
    for encoder, cells in table.rows.items():
        shown = (cell if intervals or cell is None else dataclasses.replace(cell, seeds=()) for cell in cells)
        yield [encoder, *("-" if cell is None else str(cell) for cell in shown)]
    chances = (column.chance for column in table.columns)
    yield [table.chance, *("" if chance is None else f"{100 * chance:.1f}" for chance in chances)]


def _heads(columns: Sequence[Column], widths: Sequence[int]) -> str:
    """The line above the titles: each group over its columns."""
    spans = groupby(zip(columns, widths[1:], strict=True), lambda pair: pair[0].group)
    heads = [f"{group:>{sum(width + 2 for _, width in own) - 2}}" for group, own in spans]
    return "  ".join([" " * widths[0], *heads])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    pairs = zip(cells[1:], widths[1:], strict=True)
    return f"{cells[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in pairs).rstrip()


# ---- the file --------------------------------------------------------------------------------------


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json, so that a reader sees the old file or the new one."""
    content = {each.name: getattr(evaluation, each.name) for each in dataclasses.fields(evaluation)}
    content["seconds"] = {name: round(value, 2) for name, value in evaluation.seconds.items()}
    content["tables"] = [_table_content(table) for table in evaluation.tables]
    if evaluation.demo_peak_memory_bytes is None:
        del content["demo_peak_memory_bytes"]
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    """Read evaluation.json of this version or of an older one.

    Raises:
        UserError: It cannot be read, lacks a key, or a value is of another type; the text names file and key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}); write it anew with tools/evaluate.py") from None
    node = _Node(content, "", path)
    tables = [
        _table(each) for each in node.get("tables" if "tables" in node.entries() else "measures", []).items()
    ]
    if not any(table.key == SUMMARY for table in tables) and "rows" in node.entries():
        tables.insert(0, _old_summary(node))
    memory = node.get("demo_peak_memory_bytes", None)
    counts = ("test_regions", "test_words", "gallery_regions", "gallery_words", "gallery_scenes", "classes")
    return Evaluation(
        run=node.get("run").text(),
        step=node.get("step").count(),
        split=node.get("split").text(),
        tables=tuple(tables),
        **{name: node.get(name).count() for name in counts},
        seeds=node.get("seeds", 1).count(),
        neighbours=node.get("neighbours", 5).count(),
        seconds={name: value.number() for name, value in node.get("seconds", {}).entries().items()},
        demo_peak_memory_bytes=None if memory.value is None else memory.count(),
    )


_REQUIRED = object()


@dataclass(frozen=True)
class _Node:
    """A value of the file and the keys that lead to it."""

    value: Any
    way: str
    file: Path

    def get(self, key: str, default: Any = _REQUIRED) -> _Node:
        """The entry of this key; one with the default's value where the file lacks it."""
        way = f"{self.way}.{key}".removeprefix(".")
        found = self.entries().get(key)
        if found is None and default is _REQUIRED:
            raise UserError(f"{self.file} lacks {way}; write it anew with tools/evaluate.py")
        return found or _Node(default, way, self.file)

    def entries(self) -> dict[str, _Node]:
        if not isinstance(self.value, dict):
            self._refuse("an object")
        return {
            key: _Node(each, f"{self.way}.{key}".removeprefix("."), self.file)
            for key, each in self.value.items()
        }

    def items(self) -> list[_Node]:
        if not isinstance(self.value, list):
            self._refuse("a list")
        return [_Node(each, f"{self.way}[{place}]", self.file) for place, each in enumerate(self.value)]

    def text(self) -> str:
        return self.value if isinstance(self.value, str) else self._refuse("a text")

    def number(self) -> float:
        if isinstance(self.value, int | float) and not isinstance(self.value, bool):
            try:
                value = float(self.value)
            except OverflowError:
                value = math.inf
            if math.isfinite(value):
                return value
        self._refuse("a finite number")

    def pair(self) -> tuple[float, float]:
        values = [each.number() for each in self.items()]
        return (values[0], values[1]) if len(values) == 2 else self._refuse("two numbers")

    def count(self) -> int:
        value = self.number()
        return (
            int(value) if value >= 0 and value.is_integer() else self._refuse("a whole number of at least 0")
        )

    def _refuse(self, wanted: str) -> NoReturn:
        shown = json.dumps(self.value)
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        way = self.way or "its content"
        raise UserError(
            f"{self.file}: {way} must be {wanted}, got {shown}; write it anew with tools/evaluate.py"
        )


def _table(node: _Node) -> Table:
    columns = tuple(
        Column(
            key=each.get("key").text(),
            title=each.get("title").text(),
            chance=_unless_null(each.get("chance", None)),
            group=each.get("group", "").text(),
        )
        for each in node.get("columns").items()
    )
    return Table(
        key=node.get("key").text(),
        title=node.get("title").text(),
        told=node.get("told").text(),
        columns=columns,
        rows={
            encoder: tuple(_estimate(cells.get(column.key)) for column in columns)
            for encoder, cells in node.get("rows").entries().items()
        },
        chance=node.get("chance_is").text(),
        notes={encoder: note.text() for encoder, note in node.get("notes", {}).entries().items()},
    )


def _estimate(node: _Node) -> Estimate | None:
    if node.value is None:
        return None
    low, mean, high = (node.get(key).number() for key in ("low", "mean", "high"))
    return Estimate(mean, low, high, tuple(seed.number() for seed in node.get("seeds").items()))


def _unless_null(node: _Node) -> float | None:
    return None if node.value is None else node.number()


def _table_content(table: Table) -> dict[str, Any]:
    return {
        "key": table.key,
        "title": table.title,
        "told": table.told,
        "columns": [
            dataclasses.asdict(column) | {"chance": _rounded(column.chance)} for column in table.columns
        ],
        "chance_is": table.chance,
        "notes": dict(table.notes),
        "rows": {
            encoder: {
                column.key: None if cell is None else _estimate_content(cell)
                for column, cell in zip(table.columns, cells, strict=True)
            }
            for encoder, cells in table.rows.items()
        },
    }


def _estimate_content(cell: Estimate) -> dict[str, Any]:
    ends = {key: _rounded(getattr(cell, key)) for key in ("mean", "low", "high")}
    return {**ends, "seeds": [_rounded(value) for value in cell.seeds]}


def _rounded(share: float | None) -> float | None:
    """A share as the file holds it; JSON has no word for a number that is not finite."""
    return None if share is None or not math.isfinite(share) else round(share, DIGITS)


def _old_summary(node: _Node) -> Table:
    """The summary of version 0.1.0, whose "rows" had an interval for one number and no other."""
    rows, notes = {}, {}
    word_chance = None
    for row in node.get("rows").items():
        encoder = row.get("encoder").text()
        cells: list[Estimate | None] = []
        for column in summary_columns("", None, None):
            share = _unless_null(row.get(column.key))
            cells.append(None if share is None else Estimate(share, share, share, ()))
        low, high = row.get("region_knn_interval").pair()
        if cells[0] is not None:
            cells[0] = Estimate(cells[0].mean, low, high, (cells[0].mean,))
        word_chance = _unless_null(row.get("ocr_prior"))
        if row.get("variant", None).value is not None:
            notes[encoder] = row.get("variant").text()
        rows[encoder] = tuple(cells)
    split = node.get("split").text()
    told = f"{node.get('test_regions').count():,} objects and {node.get('test_words').count():,} words."
    columns = summary_columns(split, node.get("region_prior").number(), word_chance)
    return Table(SUMMARY, "Test beside train", told, columns, rows, "most frequent", notes)
