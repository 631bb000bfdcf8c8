"""Finds a run's images: loose files of a folder, told apart by content, WebDataset tars, Parquet and Arrow.

An image file that occurs twice counts once. Hashes, and what a tar holds, are remembered by size and time
of change, so that only new files are read again. What is found is written to disk as it comes: 16 bytes of
memory for each loose image, and a line for each tar. Whatever is left out is counted, and named where it can
be mended.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.inputs.index import DATASETS, INDEX, IndexWriter, mark
from megaregion.curation.inputs.source import (
    COLUMNAR,
    FILES,
    INPUTS,
    TARS,
    VERSION,
    Known,
    Listing,
    Source,
    mark_key,
    move_listing,
    plain_key,
    sample_keys,
    write_listing,
)
from megaregion.curation.inputs.tars import sample_of, scan_tar, split_name
from megaregion.curation.picture import ENDINGS, NO_IMAGES, OTHER_FORMATS, begins_like_an_image
from megaregion.curation.settings import AnnotationSettings
from megaregion.data.writer import MAX_KEY_BYTES
from megaregion.errors import UserError
from megaregion.files import file_sha256, read_json, write_bytes
from megaregion.schemas import curation as kinds

TAR_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Files that are looked into; one that is compressed is named with the way out."""
SCAN = 3
"""Raised when the same tar would be found to hold something else: old lists of tars are not believed then."""
NAMED = 1000
"""Damaged tars and links that are named; more are counted alone."""
WRITTEN = ({"atlas.json", "sheets/"}, {"config.yaml", "metrics.jsonl"})
"""Names by which a folder is known for an atlas or a training run: its pictures are no input."""
DOWNLOAD = (
    "download them first: img2dataset --url_list {} --input_format parquet --url_col URL "
    "--output_format webdataset --output_folder TARS, then give --images TARS"
)


class Found(NamedTuple):
    """A file below the input's folder."""

    path: Path
    name: str
    """Relative to the folder, with slashes."""
    annotated: bool
    """A .json file of the same name lies beside it; of a .json file, an image."""
    packed: bool
    """The index of a shard of the same name lies beside it."""
    beside: bool
    """An image of the same name up to the first dot lies beside it."""


def find_images(
    folder: Path,
    place: Path,
    out: Path,
    slice_size: int,
    workers: int = 0,
    annotation: AnnotationSettings = AnnotationSettings(),  # noqa: B008 - it is frozen
    hashed: bool = True,
) -> Source:
    """Find the images below a folder; hidden files and folders, and what megaregion wrote, are skipped.

    What an earlier search found stays until the new list is complete and holds an image.

    Args:
        folder: Where to look.
        place: Folder for the listings, which also remember the hashes from run to run.
        out: The run's own folder, which is skipped if it lies inside.
        slice_size: Most images of a slice.
        workers: Processes that look into tars.
        annotation: Which annotation files are read.
        hashed: Read all loose images to tell which have the same content; else all of them stay.

    Raises:
        UserError: There is no such folder, no image in it, or a file that cannot be read.
    """
    if folder.suffix.lower() in COLUMNAR and not folder.is_dir():
        if folder.is_file() and _count(folder, annotation.image_column)["images"]:
            raise UserError(
                f"--images {folder} is a file of images; give its folder, --images {folder.parent}"
            )
        raise UserError(f"--images {folder} is a Parquet file of URLs; {DOWNLOAD.format(folder)}")
    if not folder.is_dir():
        raise UserError(
            f"--images {folder} is no folder; give a folder of {', '.join(ENDINGS)} files "
            "or of WebDataset tars"
        )
    search = _Search(folder, out, hashed, annotation.image_column)
    with _scratch(place / ".new") as new, open_index(place, folder, annotation) as index:
        candidates = new / "candidates.jsonl"
        write_listing(candidates, search.images(Known(place / FILES)))
        if index is not None:
            search.annotate(index, Listing(candidates))
        write_listing(new / FILES, search.unique(Listing(candidates), index))
        tars = search.look_into_tars(Known(place / TARS, _scanned_alike(place)), workers, index)
        write_listing(new / TARS, tars)
        if not search.found:
            raise search.no_image()
        digest = hashlib.sha256((file_sha256(new / FILES) + file_sha256(new / TARS)).encode()).hexdigest()
        # A list without its summary counts as none, so a kill in between does no harm.
        (place / INPUTS).unlink(missing_ok=True)
        if index is None:
            (place / INDEX).unlink(missing_ok=True)
        else:
            index.commit()
        for name in (FILES, TARS):
            move_listing(new / name, place / name)
        write_bytes(place / INPUTS, json.dumps(search.summary() | {"digest": digest}, indent=1).encode())
    return Source(folder, place, slice_size)


@contextmanager
def open_index(place: Path, folder: Path, settings: AnnotationSettings) -> Iterator[IndexWriter | None]:
    """Read annotation files, unless all are ignored; a database that cannot be written is a UserError."""
    if settings.annotations == "ignore":
        yield None
        return
    index = IndexWriter(place, folder, settings)
    try:
        yield index
    except sqlite3.Error as error:
        raise UserError(
            f"{place / INDEX} cannot be written ({error}); free space or remove it, run again"
        ) from None
    finally:
        index.close()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is empty at first and gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Search:
    """What lies below a folder: counts, tars, and 16 bytes for each image that tell it from others."""

    def __init__(self, folder: Path, out: Path, hashed: bool, column: str) -> None:
        self._folder, self._out, self._hashed, self._column = folder, out.resolve(), hashed, column
        self._tars: list[Found] = []
        self._parquets = self._damaged = 0
        self._kinds = kinds.Kinds()
        self._bad: dict[str, str] = {}
        self._contents, self._keys, self._others = array("Q"), array("Q"), array("Q")
        self._ambiguous: set[str] = set()
        self._datasets: list[Path] = []
        self._annotations: dict[str, Any] = {}
        self._counted: dict[str, dict[str, Any]] = {}
        """What tars hold that were looked into for annotations."""
        self.found = 0
        """Images, duplicates left out."""

    def images(self, known: Known) -> Iterator[dict[str, Any]]:
        """A row for every loose image, with its hash; tars are only noted."""
        for file in self._walk(self._folder, ""):
            ending = file.path.suffix.lower()
            if file.name.lower().endswith((*TAR_ENDINGS, *COLUMNAR)):
                self._tars += [] if file.packed else [file]
                if file.packed:
                    self._kinds.add(kinds.OUTPUT, file.name)
            elif _is_image(file, ending):
                state = _state(file.path)
                row = known.of(file.name, state)
                sha256 = row.get("sha256") or (_hash(file.path) if self._hashed else "")
                # Annotations are small: they are always read again.
                annotation = _hash(file.path.with_suffix(".json")) if file.annotated else ""
                self._contents.append(int(sha256[:16], 16) if sha256 else len(self._contents))
                self._keys.append(_number(plain_key(_stem(file.name))))
                yield {
                    "path": file.name, "size": state.st_size, "changed": state.st_mtime_ns, "sha256": sha256,
                    **({"annotation": annotation} if annotation else {}),
                }  # fmt: skip
            elif ending in OTHER_FORMATS:
                self._kinds.add(kinds.FORMAT + ending, file.name)
            else:
                self._kinds.add(kinds.BESIDE if file.beside else kinds.OTHER, file.name)
                if not file.beside:
                    self._others.append(mark(file.name))
                # One that lies beside an image counts as the image's.
                wanted = ending in DATASETS and not file.annotated and not file.beside
                self._datasets += [file.path] if wanted else []

    def annotate(self, index: IndexWriter, candidates: Listing) -> None:
        """Read all annotation files but those beside an image, and find out what each is about."""
        index.read(self._datasets)
        loose = (row["path"] for row, first in zip(candidates.rows(), self._firsts, strict=True) if first)
        # The number of a row is no name.
        tars = [tar for tar in self._tars if tar.path.suffix.lower() not in COLUMNAR]
        members = ((tar.name, name) for tar in tars for name in self._members(tar))

        def state() -> list[Any] | None:
            # Loose images may have files of labels, which are read again.
            found = [
                (tar.name, each.st_size, each.st_mtime_ns) for tar in tars for each in [_state(tar.path)]
            ]
            return None if len(candidates) else [SCAN, found]

        index.match(loose, members, state)
        self._annotations = index.summary()
        # What lies beside an image counts as the image's.
        used = set(np.intersect1d(self._others, index.used).tolist())
        if used:
            others, names = self._kinds.pop(kinds.OTHER)
            if others > len(used):
                rest = [name for name in names if mark(name) not in used]
                self._kinds.add(kinds.OTHER, *rest, count=others - len(used))
            examples = [name for name in index.examples if mark(name) in used]
            self._kinds.add(kinds.ANNOTATION, *examples, count=len(used))
        for path, why in index.damaged.items():
            self._tell(path, why)  # Its kind is counted already.

    def _members(self, tar: Found) -> Iterator[str]:
        """The images of a tar; what is counted by the way need not be looked for again."""
        names: list[str] = []
        self._counted[tar.name] = _count(tar.path, self._column, names)
        yield from names

    @cached_property
    def _firsts(self) -> NDArray[np.bool_]:
        """Whether each image is the first of its content, in the order of the candidates."""
        first = np.zeros(len(self._contents), dtype=bool)
        first[np.unique(np.frombuffer(self._contents, dtype=np.uint64), return_index=True)[1]] = True
        return first

    def unique(self, candidates: Listing, index: IndexWriter | None) -> Iterator[dict[str, Any]]:
        """The first row of every content, with its key and the hash of its annotations."""
        keys, first = np.frombuffer(self._keys, dtype=np.uint64), self._firsts
        self.found += int(first.sum())
        values, counts = np.unique(keys[first], return_counts=True)
        shared = np.isin(keys, values[counts > 1])
        tars = {plain_key(tar.name.rsplit(".", 1)[0]) for tar in self._tars}
        for number, row in enumerate(candidates.rows()):
            name = row["path"]
            if not first[number]:
                self._kinds.add(kinds.DUPLICATE, name)
            else:
                key = plain_key(_stem(name))
                if shared[number] or len(key.encode()) > MAX_KEY_BYTES:
                    key = mark_key(key, name)
                self._ambiguous.update(_beginnings(key, tars))
                labels = index.digest(name) if index is not None else ""
                yield {"key": key, **row, **({"labels": labels} if labels else {})}

    def look_into_tars(
        self, known: Known, workers: int, index: IndexWriter | None
    ) -> Iterator[dict[str, Any]]:
        """A row for each tar."""
        rows: list[dict[str, Any]] = []
        for tar in self._tars:
            state = _state(tar.path)
            own = {"path": tar.name, "size": state.st_size, "changed": state.st_mtime_ns}
            row = self._counted.get(tar.name) or known.of(tar.name, state)
            rows.append({**(row if row.get("asked", self._column) == self._column else {}), **own})
        new = [row for row in rows if "images" not in row]
        paths = [self._folder / row["path"] for row in new]
        several = ProcessPoolExecutor(workers) if workers > 1 and len(new) > 1 else nullcontext()
        with several as pool:
            count = partial(_count, column=self._column)
            for row, counted in zip(new, (pool.map if pool else map)(count, paths), strict=True):
                row.update(counted)
        # Parquet files of URLs lie beside the tars that were made of them.
        named = [row for row in rows if row.get("column") != ""]
        keys = dict(zip((row["path"] for row in named), self._tar_keys(named), strict=True))
        for row in rows:
            row["key"] = keys.get(row["path"], "")
            row["labels"] = index.tar_digest(row["path"]) if index is not None else ""
            self._tell_tar(row)
        return iter(rows)

    def _tell_tar(self, row: dict[str, Any]) -> None:
        """Count what a tar, or a Parquet or Arrow file, is and holds."""
        path = row["path"]
        self.found += row["images"]
        for kind, (count, examples) in row["kinds"].items():
            self._kinds.add(kind, *(f"{path}/{name}" for name in examples), count=count)
        whole, broken = (kinds.TABLE, kinds.BROKEN_TABLE) if "column" in row else (kinds.TAR, kinds.BROKEN)
        if row["damage"]:
            self._name(broken, path, f"{row['damage']}; images before it: {row['images']}")
        elif row.get("column") == "":
            self._parquets += 1
            self._kinds.add(kinds.OTHER, path)
        else:
            self._kinds.add(whole, path)

    def summary(self) -> dict[str, Any]:
        """What is not in the rows; JSON."""
        return {
            "version": VERSION, "scan": SCAN, "folder": str(self._folder.resolve()),
            "duplicates": self._kinds.count(kinds.DUPLICATE), "others": self._kinds.count(kinds.OTHER),
            "outputs": self._kinds.count(kinds.OUTPUT), "formats": self._kinds.formats, "bad": self._bad,
            "damaged": self._damaged, "kinds": self._kinds, "annotations": self._annotations,
        }  # fmt: skip

    def no_image(self) -> UserError:
        """Why there is nothing to curate, and the way out."""
        holds = f"--images {self._folder} holds"
        if self._bad:
            path, why = next(iter(self._bad.items()))
            inside = any(tar.name.lower().endswith(TAR_ENDINGS) for tar in self._tars)
            return UserError(f"{holds} no image{' in its tars' * inside}; {path}: {why}")
        if self._kinds.count(kinds.OUTPUT):
            return UserError(
                f"{holds} nothing but what megaregion wrote (shards, stages, runs, an atlas); "
                "give the folder of the original images"
            )
        if self._parquets:
            return UserError(f"{holds} Parquet files of URLs; {DOWNLOAD.format(self._folder)}")
        if self._kinds.formats:
            return UserError(
                f"{holds} images of {', '.join(self._kinds.formats)} only; convert them to JPEG or PNG"
            )
        others = self._kinds.count(kinds.OTHER)
        return UserError(f"{holds} no {', '.join(ENDINGS)} or .tar file among its {others} files")

    def _walk(self, folder: Path, below: str) -> Iterator[Found]:
        """Files in the order of their names; a folder's counts with its slash, as in its files' names."""
        with _reading(folder), os.scandir(folder) as found:
            entries = {entry.name + "/" * entry.is_dir(follow_symlinks=False): entry for entry in found}
        if any(marks <= entries.keys() for marks in WRITTEN):
            self._kinds.add(kinds.OUTPUT, below)
            return
        samples = {sample_of(stem) for stem, ending in map(split_name, entries) if ending in ENDINGS}
        for name in sorted(entries):
            entry, path = entries[name], folder / entries[name].name
            if name.startswith("."):
                self._hide(path, below + name)
            elif name.endswith("/"):
                if path.resolve() == self._out or (name == "stages/" and "run.json" in entries):
                    self._kinds.add(kinds.OUTPUT, below + name)
                elif not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
                    self._name(kinds.UNREADABLE, below + name, "a folder that may not be read")
                else:
                    yield from self._walk(path, below + name)
            elif entry.is_file() and not os.access(path, os.R_OK, effective_ids=True):
                self._name(kinds.UNREADABLE, below + name, "a file that may not be read")
            elif entry.is_file():
                stem = path.stem
                beside = ENDINGS if path.suffix.lower() == ".json" else (".json",)
                annotated = any(stem + ending in entries for ending in beside)
                yield Found(
                    path, below + name, annotated, f"{stem}.index.npy" in entries, sample_of(stem) in samples
                )
            elif entry.is_symlink():
                kind = "a link to a folder, which is not followed" if path.is_dir() else "a link to nothing"
                self._name(kinds.LINK, below + name, kind)
            else:
                # A socket or a pipe, unless it is gone.
                _state(path)
                self._kinds.add(kinds.OTHER, below + name)

    def _hide(self, path: Path, name: str) -> None:
        """Count a hidden file, or all files of a hidden folder, the run's own ones left out."""
        if not name.endswith("/"):
            self._kinds.add(kinds.HIDDEN, name)
        elif path.resolve() != self._out:
            files = sum(len(names) for _, _, names in os.walk(path))
            if files:
                self._kinds.add(kinds.HIDDEN, name, count=files)

    def _tar_keys(self, rows: list[dict[str, Any]]) -> list[str]:
        """How the keys of each tar's images begin; no image of another tar or folder begins likewise."""
        # Of x.tar and x.parquet, the latter keeps its ending.
        stems = Counter(row["path"].rsplit(".", 1)[0] for row in rows)
        names = [
            row["path"] if "column" in row and stems[stem] > 1 else stem
            for row in rows
            for stem in [row["path"].rsplit(".", 1)[0]]
        ]
        plain = {plain_key(name) for name in names}
        # The images x_y.tar/1 and x.tar/y_1 would have one key, and so would the file x_1.jpg and x.tar/1.
        for key in plain:
            self._ambiguous.update(_beginnings(key, plain))
        return [
            mark_key(key, name) if key in self._ambiguous else key
            for name, key in zip(names, sample_keys(names), strict=True)
        ]

    def _name(self, kind: str, path: str, why: str) -> None:
        self._kinds.add(kind, f"{path} ({why})")
        self._tell(path, why)

    def _tell(self, path: str, why: str) -> None:
        self._damaged += 1
        if len(self._bad) < NAMED:
            self._bad[path] = why


def _scanned_alike(place: Path) -> bool:
    """Whether an earlier search looked into tars as this one does."""
    try:
        return bool(read_json(place / INPUTS).get("scan") == SCAN)
    except (OSError, ValueError, AttributeError):
        return False


def _count(path: Path, column: str, names: list[str] | None = None) -> dict[str, Any]:
    """What a row says of the images in a tar, or in a Parquet or Arrow file; a tar's names are added."""
    with _reading(path):
        before = path.stat()
        if path.suffix.lower() in COLUMNAR:
            # Here, for pyarrow costs a start some tenths of a second.
            from megaregion.curation.inputs.columnar import count_rows

            found = count_rows(path, column)
        else:
            scan = scan_tar(path)
            if names is not None:
                names.extend(member.name for member in scan.members)
            found = {"images": len(scan.members), "kinds": scan.kinds, "damage": scan.damage}
        after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path} changed while the images were listed; run again")
    return {"size": after.st_size, "changed": after.st_mtime_ns, **found}


def _stem(name: str) -> str:
    """What stands before the last ending of an image; all of a name that has none."""
    stem, _, ending = name.rpartition(".")
    return stem if f".{ending.lower()}" in ENDINGS else name


def _is_image(file: Found, ending: str) -> bool:
    if ending in ENDINGS or ending in NO_IMAGES or ending in OTHER_FORMATS or file.beside:
        return ending in ENDINGS
    with _reading(file.path), file.path.open("rb") as stream:
        return begins_like_an_image(stream.read(12))


def _beginnings(key: str, among: set[str]) -> Iterable[str]:
    """Those keys of a set that a key begins with, up to one of its underscores."""
    return [key[:place] for place, letter in enumerate(key) if letter == "_" and key[:place] in among]


def _state(path: Path) -> os.stat_result:
    with _reading(path):
        return path.stat()


def _hash(path: Path) -> str:
    with _reading(path):
        return file_sha256(path)


def _number(text: str) -> int:
    content = text.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} vanished while the images were listed; run again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend or remove it") from None
