"""The Hub: the card that it shows of an exported encoder, filled from its run, and the folder's way there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import SafetensorError, safe_open

from megaregion.checkpoint.pretrained import INDEX
from megaregion.errors import UserError
from megaregion.files import read_json
from megaregion.schemas.evaluation import EVALUATION, TRAINED, Evaluation, markdown, read_evaluation

CARD = "README.md"
"""Name of the card in a folder."""
TASK = "image-feature-extraction"
"""What the Hub calls the use of an encoder."""


# The card


class Measured(NamedTuple):
    """What a card says of an evaluation."""

    section: str
    """Markdown: its tables, or why there are none."""
    head: str = ""
    """YAML of the means for the card's head, which the Hub shows beside the model."""


def model_card(measured: Measured, **facts: Any) -> str:
    """Fill the card with all that its template names."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["thousands"] = "{:,}".format
    return templates.get_template("card.md.jinja").render(facts, measured=measured, task=TASK)


def measured_at(checkpoint: Path, name: str, file: Path | None = None) -> Measured:
    """What evaluation.json, the run's own or another, says of a checkpoint that the Hub calls ``name``.

    Raises:
        UserError: A file was given and cannot be used.
    """
    found = file or checkpoint.parent.parent / EVALUATION
    if file is None and not found.is_file():
        return Measured("This checkpoint has not been evaluated (`tools/evaluate.py` does it).\n")
    try:
        evaluation = read_evaluation(found)
        if not evaluation.tables:
            raise UserError(f"{found} holds no table; write it anew with tools/evaluate.py")
    except UserError as error:
        if file is None:
            # Nobody asked for it: an export must not fail over a table.
            return Measured(f"`{EVALUATION}` of the run could not be read; see `report.html` there.\n")
        raise UserError(f"--evaluation: {error}") from None
    told = f"Measured at step {evaluation.step:,} on the `{evaluation.split}` split, beside its baselines."
    results = list(_results(evaluation))
    head = {"model-index": [{"name": name, "results": results}]} if results else {}
    return Measured(
        f"{told}\n\n{markdown(evaluation.tables, level=3)}",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True) if head else "",
    )


def _results(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """The trained encoder's row of each table, in percent."""
    for table in evaluation.tables:
        data, _, _ = table.key.rpartition("/")
        metrics = [
            {
                "type": column.key,
                "name": f"{column.group}, {column.title}".removeprefix(", "),
                "value": round(100 * cell.mean, 1),
            }
            for column in table.columns
            if (cell := table.rows.get(TRAINED, {}).get(column.key)) is not None
        ]
        if metrics:
            dataset = {"name": f"{data or 'composed scenes'}: {table.title}", "type": data or "scenes"}
            yield {
                "task": {"type": TASK},
                "dataset": {**dataset, "split": evaluation.split},
                "metrics": metrics,
            }


# The way there


def files_to_push(folder: Path) -> dict[str, int]:
    """Bytes by name of all that goes to the Hub: every file but hidden ones and Python's caches.

    Raises:
        UserError: It is no exported folder, or its weights are not whole.
    """
    for name in ("config.json", CARD):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; write it with tools/convert_checkpoint.py to-hf")
    try:
        weights = set(read_json(folder / INDEX)["weight_map"].values() if (folder / INDEX).is_file() else ())
        for name in sorted(
            weights | {path.name for path in folder.glob("*.safetensors")} or {"model.safetensors"}
        ):
            with safe_open(folder / name, "pt"):
                pass
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder}: the weights are not whole ({error}); write it anew") from None
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in found}
    return {
        name.as_posix(): path.stat().st_size
        for path, name in names.items()
        if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    }


def push(folder: Path, repo: str, names: list[str], private: bool, message: str) -> str:
    """Send files of a folder to a model of the Hub in one commit, and give its address.

    The model is made where there is none; its other files stay. The token is that of ``HF_TOKEN`` or of
    ``hf auth login``.

    Raises:
        UserError: The Hub cannot be reached or refuses; the commit is there whole or not at all.
    """
    from huggingface_hub import HfApi

    # That of its HTTP library, whose name has changed.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    hub = HfApi()
    try:
        made = hub.create_repo(repo, private=private, exist_ok=True)
        # Names, not patterns: a bracket in a name would be one.
        patterns = [name.replace("[", "[[]") for name in names]
        done = hub.upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=patterns, commit_message=message
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{repo} cannot be pushed to {hub.endpoint} ({reason}); log in with `hf auth login` or "
            "set HF_TOKEN, and see that it may write there"
        ) from None
    return str(done.commit_url)
