"""Tables for other programs and other readers: JSON, Markdown, plain text and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaregion.evaluation.estimates import Estimate
from megaregion.evaluation.tables import Table

DIGITS = 5
"""Decimals of a share in JSON: finer than one region in ten thousand."""


def table_json(table: Table) -> dict[str, Any]:
    """A table with every estimate's mean, interval and seeds."""
    return {
        "key": table.key,
        "title": table.title,
        "told": table.told,
        "columns": [
            {"key": column.key, "title": column.title, "chance": _rounded(column.chance)}
            for column in table.columns
        ],
        "chance_is": table.chance,
        "rows": {
            encoder: {
                column.key: None if cell is None else _estimate_json(cell)
                for column, cell in zip(table.columns, cells, strict=True)
            }
            for encoder, cells in table.rows.items()
        },
    }


def markdown(title: str, tables: Sequence[Table]) -> str:
    """All tables as one Markdown page."""
    parts = [f"# {title}\n"]
    for table in tables:
        head = ["encoder", *(column.title for column in table.columns)]
        lines = [head, ["---", *(["---:"] * len(table.columns))]]
        lines += [[encoder, *(_cell(cell) for cell in cells)] for encoder, cells in table.rows.items()]
        lines.append([table.chance, *(_percent(column.chance) for column in table.columns)])
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {table.title}\n\n{table.told}\n\n{rows}\n")
    parts.append("Percent; in brackets the 95% interval over seeds and over the groups of test data.\n")
    return "\n".join(parts)


def plain(tables: Sequence[Table]) -> str:
    """All tables as aligned text for a terminal."""
    blocks = []
    for table in tables:
        lines = [[table.title, *(column.title for column in table.columns)]]
        lines += [[encoder, *(_cell(cell) for cell in cells)] for encoder, cells in table.rows.items()]
        lines.append([table.chance, *(_percent(column.chance) for column in table.columns)])
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        blocks.append("\n".join(_line(line, widths) for line in lines))
    return "\n\n".join(blocks)


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


def scalars(tables: Sequence[Table], encoder: str) -> Mapping[str, float]:
    """Means of one encoder, by TABLE/COLUMN."""
    return {
        f"{table.key}/{column.key}": cell.mean
        for table in tables
        for column, cell in zip(table.columns, table.rows.get(encoder, ()), strict=False)
        if cell is not None
    }


def _estimate_json(cell: Estimate) -> dict[str, Any]:
    return {
        "mean": _rounded(cell.mean),
        "low": _rounded(cell.low),
        "high": _rounded(cell.high),
        "seeds": [_rounded(value) for value in cell.seeds],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _cell(cell: Estimate | None) -> str:
    return "-" if cell is None else f"{100 * cell.mean:.1f} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    pairs = zip(cells[1:], widths[1:], strict=True)
    return f"{cells[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in pairs).rstrip()
