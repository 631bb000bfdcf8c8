"""Where an atlas goes: built beside its place, moved there when whole, left alone if up to date."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaregion.atlas.settings import AtlasSettings
from megaregion.atlas.source import Source
from megaregion.errors import UserError
from megaregion.files import locked

VERSION = 1
"""Goes up when the same source and settings would give another atlas."""
MARK = "atlas.json"
"""File that tells an atlas from any other folder."""
SITE = Path(__file__).with_name("site")
"""The page itself: HTML, style and scripts."""


def identify(source: Source, settings: AtlasSettings) -> dict[str, Any]:
    """All that decides what an atlas holds, the page's own files included."""
    page = hashlib.sha256()
    for path in sorted(SITE.iterdir()):
        page.update(path.read_bytes())
    return {
        "version": VERSION,
        "source": source.identity,
        "settings": asdict(settings),
        "page": page.hexdigest(),
    }


def is_done(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds just this atlas already.

    Raises:
        UserError: The folder holds something that is no atlas; it is never replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MARK).read_bytes())
    except (OSError, ValueError):
        raise UserError(f"--out {out} exists and is no atlas; name another folder") from None
    return bool(found == wanted)


@contextmanager
def replacing(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """Give a folder to build in; it takes its place when all went well, and is gone when not.

    Raises:
        UserError: Another process builds the same atlas, or the disk takes no more.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial / ".lock", wait=False) as free:
            if not free:
                raise UserError(f"--out {out} is in use by another process; wait until it has ended")
            try:
                site, scratch = partial / "site", partial / "scratch"
                for folder in (site, scratch):
                    shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(SITE, site)
                scratch.mkdir()
                yield partial
                (site / MARK).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
                _replace(site, out, partial / "old")
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); make room, or name another folder"
        ) from None


def _replace(site: Path, out: Path, old: Path) -> None:
    if out.exists():
        out.rename(old)
    site.rename(out)
