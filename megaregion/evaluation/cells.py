"""The page's tables of measures: every estimate with its interval, drawn as a bar with a whisker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from megaregion.schemas.evaluation import Column, Estimate, Table

KNOWN_STYLES = ("trained", "untrained", "pixels", "curation")


def measure_cards(tables: Sequence[Table]) -> str:
    """All tables, one card each."""
    return "".join(f'<div class="card measure">{measure_table(table)}</div>' for table in tables)


def measure_table(table: Table, styles: Mapping[str, str] | None = None) -> str:
    """One table; a tick on every bar marks chance.

    Args:
        table: What was measured.
        styles: CSS class of each row, which colours it; by default the encoder's own.
    """
    head = "".join(f"<th>{escape(column.title)}</th>" for column in table.columns)
    rows = []
    for encoder, cells in table.rows.items():
        style = (styles or {}).get(encoder) or (encoder if encoder in KNOWN_STYLES else "other")
        note = table.notes.get(encoder, "")
        told = f'<div class="what">{escape(note)}</div>' if note else ""
        name = escape(encoder)
        drawn = "".join(_cell(cell, column) for cell, column in zip(cells, table.columns, strict=True))
        rows.append(f'<tr class="{style}"><td><div class="who">{name}</div>{told}</td>{drawn}</tr>')
    chance = "".join(
        f'<td class="estimate">{"&ndash;" if column.chance is None else f"{column.chance:.1%}"}</td>'
        for column in table.columns
    )
    last = f'<tr class="prior"><td><div class="who">{escape(table.chance)}</div></td>{chance}</tr>'
    return (
        f'<h3>{escape(table.title)}</h3><p class="note">{escape(table.told)}</p><div class="scroll">'
        f'<table class="results estimates"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}{last}</tbody></table></div>"
    )


def _cell(cell: Estimate | None, column: Column) -> str:
    if cell is None:
        return '<td class="estimate none">&ndash;</td>'
    chance = "" if column.chance is None else f'<b style="left:{column.chance:.2%}"></b>'
    seeds = ", ".join(f"{value:.1%}" for value in cell.seeds)
    told = f"{column.title}: 95% interval {cell.low:.1%} to {cell.high:.1%}" + (
        f"; seeds {seeds}" if len(cell.seeds) > 1 else ""
    )
    return (
        f'<td class="estimate" title="{escape(told)}">{100 * cell.mean:.1f}'
        f"<small> {100 * cell.low:.0f}&ndash;{100 * cell.high:.0f}</small>"
        f'<div class="range"><i style="width:{cell.mean:.2%}"></i>'
        f'<u style="left:{cell.low:.2%};width:{cell.high - cell.low:.2%}"></u>{chance}</div></td>'
    )
