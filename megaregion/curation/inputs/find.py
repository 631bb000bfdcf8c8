"""Finds a run's images: loose files of a folder, told apart by content, and WebDataset tars.

An image file that occurs twice counts once. Hashes, and what a tar holds, are remembered by size and time
of change, so that only new files are read again. What is found is written to disk as it comes: 16 bytes of
memory for each loose image, and a line for each tar.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.inputs.source import (
    FILES,
    INPUTS,
    TARS,
    VERSION,
    Listing,
    Source,
    mark_key,
    move_listing,
    plain_key,
    sample_keys,
    write_listing,
)
from megaregion.curation.inputs.tars import scan_tar
from megaregion.data.writer import MAX_KEY_BYTES
from megaregion.errors import UserError
from megaregion.files import file_sha256, write_bytes

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
"""Files that are taken for images, in lower or upper case."""

NAMED = 1000
"""Damaged tars that are named; more are counted."""


class Found(NamedTuple):
    """A file below the input's folder."""

    path: Path
    name: str
    """Relative to the folder, with slashes."""
    annotated: bool
    """A .json file of the same name lies beside it."""


def find_images(folder: Path, place: Path, out: Path, slice_size: int, workers: int = 0) -> Source:
    """Find the images below a folder; hidden files and folders are skipped.

    What an earlier search found stays until the new list is complete and holds an image.

    Args:
        folder: Where to look.
        place: Folder for the listings, which also remember the hashes from run to run.
        out: The run's own folder, which is skipped if it lies inside.
        slice_size: Most images of a slice.
        workers: Processes that look into tars.

    Raises:
        UserError: There is no such folder, no image in it, or a file that may not be read.
    """
    if not folder.is_dir():
        raise _no_folder(folder)
    seen = _Seen()
    with _scratch(place / ".new") as new:
        candidates = new / "candidates.jsonl"
        write_listing(candidates, seen.take(_walk(folder, "", out.resolve()), _Known(place / FILES)))
        write_listing(new / FILES, seen.unique(Listing(candidates)))
        rows, bad, twice = _look_into_tars(folder, seen.tars, place / TARS, workers)
        write_listing(new / TARS, iter(rows))
        if not len(Listing(new / FILES)) and not any(row["images"] for row in rows):
            raise _no_image(folder, seen, bad)
        summary = {
            "version": VERSION, "folder": str(folder.resolve()), "duplicates": seen.duplicates + twice,
            "others": seen.others, "bad": bad, "digest": _digest(new),
        }  # fmt: skip
        _accept(new, place, summary)
    return Source(folder, place, slice_size)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is empty at first and gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _accept(new: Path, place: Path, summary: dict[str, Any]) -> None:
    """Put a complete list in the place of the one before it."""
    # A list without its summary counts as none, so a kill in between does no harm.
    (place / INPUTS).unlink(missing_ok=True)
    for name in (FILES, TARS):
        move_listing(new / name, place / name)
    write_bytes(place / INPUTS, json.dumps(summary, indent=1).encode())


class _Known:
    """Hashes from an earlier listing, asked for in the order of paths."""

    def __init__(self, path: Path) -> None:
        try:
            listing = Listing(path)
            self._rows = listing.rows(0, len(listing))
        except (OSError, ValueError):
            self._rows = iter(())
        self._row: dict[str, Any] | None = self._next()

    def of(self, name: str, state: os.stat_result) -> dict[str, Any]:
        """The row of a file that has not changed since, or nothing."""
        while self._row is not None and self._row["path"] < name:
            self._row = self._next()
        row = self._row
        same = row is not None and (row["path"], row["size"], row["changed"]) == (
            name, state.st_size, state.st_mtime_ns,
        )  # fmt: skip
        return row if same and row is not None else {}

    def _next(self) -> dict[str, Any] | None:
        try:
            row = next(self._rows, None)
        # A damaged listing can be made again; what it knew is hashed anew.
        except (OSError, ValueError):
            row = None
        return row if row is not None and {"path", "size", "changed"} <= row.keys() else None


class _Seen:
    """What the walk passed: counts, tars, and 16 bytes for each image that tell it from others."""

    def __init__(self) -> None:
        self.tars: list[Found] = []
        self.parquets = self.others = self.duplicates = 0
        self._contents, self._keys = array("Q"), array("Q")

    def take(self, files: Iterator[Found], known: _Known) -> Iterator[dict[str, Any]]:
        """A row for every image, with its hash."""
        for file in files:
            ending = file.path.suffix.lower()
            if ending == ".tar":
                self.tars.append(file)
            elif ending not in ENDINGS:
                self.others += 1
                self.parquets += ending == ".parquet"
            else:
                state = file.path.stat()
                row = known.of(file.name, state)
                sha256 = row.get("sha256") or _hash(file.path)
                # Annotations are small: they are always read again.
                annotation = _hash(file.path.with_suffix(".json")) if file.annotated else ""
                self._contents.append(int(sha256[:16], 16))
                self._keys.append(_number(plain_key(file.name.rsplit(".", 1)[0])))
                yield {
                    "path": file.name, "size": state.st_size, "changed": state.st_mtime_ns, "sha256": sha256,
                    **({"annotation": annotation} if annotation else {}),
                }  # fmt: skip

    def unique(self, candidates: Listing) -> Iterator[dict[str, Any]]:
        """The first row of every content, with its key."""
        contents, keys = (np.frombuffer(each, dtype=np.uint64) for each in (self._contents, self._keys))
        first = np.zeros(len(contents), dtype=bool)
        first[np.unique(contents, return_index=True)[1]] = True
        self.duplicates = int((~first).sum())
        shared = _occurs_twice(keys, first)
        for number, row in enumerate(candidates.rows(0, len(candidates))):
            if first[number]:
                name = row["path"]
                key = plain_key(name.rsplit(".", 1)[0])
                if shared[number] or len(key.encode()) > MAX_KEY_BYTES:
                    key = mark_key(key, name)
                yield {"key": key, **row}


def _occurs_twice(keys: NDArray[np.uint64], counted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each key occurs more than once among those that count."""
    values, counts = np.unique(keys[counted], return_counts=True)
    return np.isin(keys, values[counts > 1])


def _look_into_tars(
    folder: Path, tars: list[Found], listing: Path, workers: int
) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """A row for each tar, what is wrong with some, and how many of their images have another one's name."""
    known = {(row["path"], row["size"], row["changed"]): row for row in _old_rows(listing)}
    keys = sample_keys([tar.name.rsplit(".", 1)[0] for tar in tars])
    rows: list[dict[str, Any]] = []
    for tar, key in zip(tars, keys, strict=True):
        state = tar.path.stat()
        row = {"path": tar.name, "size": state.st_size, "changed": state.st_mtime_ns}
        rows.append({**known.get((tar.name, row["size"], row["changed"]), {}), **row, "key": key})
    new = [row for row in rows if "images" not in row]
    paths = [folder / row["path"] for row in new]
    several = ProcessPoolExecutor(workers) if workers > 1 and len(new) > 1 else nullcontext()
    with several as pool:
        for row, found in zip(new, (pool.map if pool else map)(_count, paths), strict=True):
            row["images"], row["duplicates"], row["damage"] = found
    damaged = [row for row in rows if row["damage"]]
    bad = {row["path"]: f"{row['damage']}; images before it: {row['images']}" for row in damaged[:NAMED]}
    return rows, bad, sum(row["duplicates"] for row in rows)


def _count(path: Path) -> tuple[int, int, str]:
    try:
        scan = scan_tar(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend or remove it") from None
    return len(scan.members), scan.duplicates, scan.damage


def _old_rows(path: Path) -> list[dict[str, Any]]:
    try:
        listing = Listing(path)
        return [row for row in listing.rows(0, len(listing)) if {"path", "size", "changed"} <= row.keys()]
    except (OSError, ValueError):
        return []


def _walk(folder: Path, below: str, skipped: Path) -> Iterator[Found]:
    """Files in the order of their names; a folder's name counts with its slash, as in its files' names."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); mend or remove it") from None
    names = {entry.name + "/" * entry.is_dir(follow_symlinks=False): Path(entry.path) for entry in shown}
    for name in sorted(names):
        path = names[name]
        if name.endswith("/"):
            if path.resolve() != skipped:
                yield from _walk(path, below + name, skipped)
        elif path.is_file():
            yield Found(path, below + name, f"{path.stem}.json" in names)


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend or remove it") from None


def _number(text: str) -> int:
    content = text.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _digest(place: Path) -> str:
    return hashlib.sha256((file_sha256(place / FILES) + file_sha256(place / TARS)).encode()).hexdigest()


def _no_folder(folder: Path) -> UserError:
    if folder.suffix.lower() == ".parquet":
        return UserError(f"--images {folder} is a Parquet file of URLs; {_DOWNLOAD.format(folder)}")
    return UserError(
        f"--images {folder} is no folder; give a folder of {', '.join(ENDINGS)} files or of WebDataset tars"
    )


def _no_image(folder: Path, seen: _Seen, bad: dict[str, str]) -> UserError:
    if bad:
        path, why = next(iter(bad.items()))
        return UserError(f"--images {folder} holds no image in its tars; {path}: {why}")
    if seen.parquets:
        return UserError(f"--images {folder} holds Parquet files of URLs; {_DOWNLOAD.format(folder)}")
    return UserError(
        f"--images {folder} holds no {', '.join(ENDINGS)} or .tar file among its {seen.others} files"
    )


_DOWNLOAD = (
    "download them first: img2dataset --url_list {} --input_format parquet --url_col URL "
    "--output_format webdataset --output_folder TARS, then give --images TARS"
)
