"""A folder that appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megaregion.errors import UserError


def refuse_taken(out: Path) -> None:
    """Refuse a destination that holds something.

    Raises:
        UserError: It is a file, or a folder with content.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; name another folder or empty this one")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside its destination, renamed into place if all went well, deleted if not.

    Raises:
        UserError: It cannot be written.
    """
    refuse_taken(out)
    partial = out.parent / f".{out.name}.{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{out} cannot be written: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people and libraries to read."""
    file.write_text(json.dumps(content, indent=2) + "\n")
