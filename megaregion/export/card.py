"""The model card of an exported encoder: card.md.jinja, filled from its run and what was measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megaregion.errors import UserError
from megaregion.schemas.evaluation import EVALUATION, markdown, read_evaluation


def model_card(**facts: Any) -> str:
    """Fill the card with all that its template names."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["thousands"] = "{:,}".format
    return templates.get_template("card.md.jinja").render(facts)


def evaluation_section(checkpoint: Path, file: Path | None = None) -> str:
    """Markdown of what evaluation.json, the run's own or another, says of a checkpoint, if there is one.

    Raises:
        UserError: A file was named and cannot be used.
    """
    found = file or checkpoint.parent.parent / EVALUATION
    if file is None and not found.is_file():
        return "This checkpoint has not been evaluated (`tools/evaluate.py` does it).\n"
    try:
        evaluation = read_evaluation(found)
        if not evaluation.tables:
            raise UserError(f"{found} holds no table; write it anew with tools/evaluate.py")
    except UserError as error:
        if file is None:
            # Nobody asked for it: an export must not fail over a table.
            return f"`{EVALUATION}` of the run could not be read; see `report.html` there.\n"
        raise UserError(f"--evaluation: {error}") from None
    told = f"Measured at step {evaluation.step:,} on the `{evaluation.split}` split, beside its baselines."
    return f"{told}\n\n{markdown(evaluation.tables, level=3)}"
