"""OUT/run.json: what a run was started with, so that its state and report need nothing but the folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaregion.curation.settings import CurationSettings, settings_from
from megaregion.data.info import replace_file
from megaregion.errors import UserError

RUN = "run.json"


def record_run(out: Path, images: Path, settings: CurationSettings) -> None:
    """Write the record."""
    content = {"images": str(images.absolute()), "settings": asdict(settings)}
    replace_file(out / RUN, json.dumps(content, indent=1).encode())


def recorded_run(out: Path) -> tuple[Path, CurationSettings]:
    """Folder of images and settings of a run.

    Raises:
        UserError: The folder holds no run, or one of another version.
    """
    try:
        content = json.loads((out / RUN).read_bytes())
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for group in content["settings"].values()
            for key, value in group.items()
        }
        return Path(content["images"]), settings_from(values)
    except OSError:
        raise UserError(f"--out {out} holds no run of tools/curate.py; give the folder of one") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{out / RUN} is damaged; run tools/curate.py --stage list again") from None
