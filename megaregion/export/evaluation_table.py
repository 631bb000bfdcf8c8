"""The numbers of a run's evaluation.json as Markdown tables, for the model card.

Both forms are read: ``{"rows": [{"encoder": ..., NAME: share, ...}]}`` and ``{"tables": [{"title", "columns",
"rows": {ENCODER: [estimate, ...]}}]}``. A cell may be a number, null, or an object with ``mean`` (and ``low``
and ``high``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaregion.errors import UserError

FILE = "evaluation.json"


def run_tables(checkpoint: Path, file: Path | None = None) -> str:
    """Markdown of what was measured of a run.

    Args:
        checkpoint: A step folder.
        file: evaluation.json; the one in the run's folder if None.

    Returns:
        Tables, each with its title; a sentence if nothing was measured.

    Raises:
        UserError: The file was named and cannot be used.
    """
    found = file or checkpoint.parent.parent / FILE
    if file is None and not found.is_file():
        return "This checkpoint has not been evaluated (`tools/evaluate.py` does it).\n"
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
        tables = list(_tables(content))
        if not tables:
            raise ValueError("it holds no table")
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        if file is None:
            # Nobody asked for it: an export must not fail over a table.
            return f"`{FILE}` of the run could not be read; see `report.html` there.\n"
        raise UserError(
            f"--evaluation: {found} cannot be used ({error}); write it anew with tools/evaluate.py"
        ) from error
    step = content.get("step")
    told = (
        f"Measured at step {step:,} on the `{content.get('split', 'test')}` split"
        if step is not None
        else "Measured"
    )
    return f"{told}, beside its baselines.\n\n" + "\n".join(tables)


def _tables(content: Mapping[str, Any]) -> Iterator[str]:
    rows = content.get("rows")
    if rows:
        columns = [
            key for key in rows[0] if key != "encoder" and any(_is_number(row.get(key)) for row in rows)
        ]
        if columns:
            yield _markdown(columns, {row["encoder"]: [row.get(key) for key in columns] for row in rows})
    for table in content.get("tables") or []:
        columns = [
            column["title"] if isinstance(column, Mapping) else str(column) for column in table["columns"]
        ]
        yield f"**{table.get('title', '')}**\n\n" + _markdown(columns, table["rows"])


def _markdown(columns: Sequence[str], rows: Mapping[str, Sequence[Any] | Mapping[str, Any]]) -> str:
    lines = ["| encoder | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, cells in rows.items():
        values = list(cells.values()) if isinstance(cells, Mapping) else list(cells)
        lines.append(f"| {name} | " + " | ".join(_cell(value) for value in values) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        middle = _cell(value.get("mean"))
        low, high = value.get("low"), value.get("high")
        return f"{middle} ({_cell(low)} to {_cell(high)})" if _is_number(low) and _is_number(high) else middle
    if not _is_number(value):
        return ""
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:,.4g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
