"""What annotation files say of a run's images: read once when images are listed, then looked up by image.

    OUT/stages/annotations.db (SQLite): the entries of every file, and which image of the run each is about

Of a row in JSON only its place is kept, and a hash: what it says is read from its own file when it is wanted.
A file of many images is read again only when it changed. An image of the run is the one that a file names if
one path ends as the other does; of several, the one whose folder the file is named after or lies in. Where
that leaves two, neither gets the annotations.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from megaregion.curation.picture import ENDINGS, OTHER_FORMATS
from megaregion.curation.settings import AnnotationSettings
from megaregion.data.formats import (
    CLASSES,
    Caption,
    Category,
    Entry,
    Named,
    Row,
    has_classes,
    plain_text,
    read_dataset,
    read_labels,
    row_of,
)
from megaregion.errors import UserError
from megaregion.schemas.curation import EXAMPLES

INDEX = "annotations.db"
DATASETS = (".json", ".csv", ".jsonl")
"""Files that may annotate many images."""
LABELS = (".xml", ".txt")
"""Files that may annotate one image."""
PLACES = ("labels", "Annotations", "annotations", "annotations/xmls")
"""Folders beside the one of the images where such files lie."""
MAX_CAPTION = 2**16
"""Bytes of a caption that are kept."""
BATCH = 10_000
"""Entries that are written at once."""
LAYOUT = 2
"""Version of the tables."""
CACHE = 8 * 2**10
"""KiB of memory for the database, also to sort its indexes in."""
_TABLES = f"""
PRAGMA cache_size = -{CACHE};
PRAGMA user_version = {LAYOUT};
CREATE TABLE IF NOT EXISTS files(id INTEGER PRIMARY KEY, path TEXT UNIQUE, state, format, place);
CREATE TABLE IF NOT EXISTS images(file, id, stem, name, width, height, PRIMARY KEY(file, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows(file, image, category, content, size, mark);
CREATE TABLE IF NOT EXISTS classes(file, id, name, PRIMARY KEY(file, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS captions(file, image, text);
CREATE TABLE IF NOT EXISTS claims(path, file, image, shared, named, depth);
CREATE TABLE IF NOT EXISTS matched(state, unnamed, faults);
"""
_SAID = """
SELECT claims.path, claims.file, width, height, category, content, size, mark FROM claims
JOIN images ON images.file=claims.file AND images.id=claims.image
JOIN rows ON rows.file=claims.file AND rows.image=claims.image
WHERE claims.path >= ? AND claims.path <= ? ORDER BY claims.path, claims.file, rows.rowid
"""
"""What files say of some images, by a row each."""
_INDEXES = ("images(stem)", "rows(file, image)", "captions(file, image)", "claims(path)")
_INSERTS = {
    Named: "INSERT OR IGNORE INTO images VALUES(?,?,?,?,?,?)",
    Row: "INSERT INTO rows VALUES(?,?,?,?,?,?)",
    Category: "INSERT OR REPLACE INTO classes VALUES(?,?,?)",
    Caption: "INSERT INTO captions VALUES(?,?,?)",
}


class AnnotationIndex:
    """Looks up annotations; cheap to make anew in another process."""

    def __init__(self, place: Path) -> None:
        self._path = place / INDEX
        self._open: dict[int, BinaryIO] = {}

    def record(self, path: str) -> bytes | None:
        """JSON of what files say of an image, as `read_annotations` takes it; None for nothing.

        Raises:
            UserError: A file is gone or not what it was when it was listed.
        """
        found = []
        key = plain_text(path)
        for (_, file), rows in groupby(self._said(key, key), itemgetter(0, 1)):
            classes, parts = [], []
            sides = 0, 0
            for _, _, width, height, category, content, size, _ in rows:
                sides = width, height
                classes.append(self._class(file, category))
                parts.append(self._part(file, content, size) if isinstance(content, int) else content)
            image = {"width": sides[0], "height": sides[1]} if all(sides) else {}
            head = json.dumps({"image": image, "classes": classes})[:-1].encode()
            found.append(head + b',"annotations":[' + b",".join(parts) + b"]}")
        return b"[" + b",".join(found) + b"]" if found else None

    def digest(self, path: str, last: str = "") -> str:
        """Hash of what files say of an image, or of all up to the last one; empty for nothing."""
        found, said = hashlib.sha256(), ""
        rows = self._said(plain_text(path), plain_text(last or path))
        for name, file, width, height, category, _, size, mark in rows:
            said = f"{name}\0{width}\0{height}\0{self._class(file, category)}\0{size}\0{mark}\n"
            found.update(said.encode())
        return found.hexdigest() if said else ""

    def _said(self, first: str, last: str) -> Iterable[tuple[Any, ...]]:
        return self._base.execute(_SAID, (first, last)) if self._base is not None else ()

    def _part(self, file: int, place: int, size: int) -> bytes:
        """Bytes of an annotation file."""
        if file not in self._open:
            assert self._base is not None
            query = "SELECT place, state FROM files WHERE id=?"
            name, state = self._base.execute(query, (file,)).fetchone()
            path = Path(os.fsdecode(name))
            try:
                self._open[file] = path.open("rb")
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}); run again") from None
            if _state(os.fstat(self._open[file].fileno())) != state:
                raise UserError(f"{path} changed while curation ran; run again")
        return os.pread(self._open[file].fileno(), size, place)

    def caption(self, path: str) -> str:
        """The first text about an image, or nothing."""
        for file, image in self._claims(path) if self._base else ():
            query = "SELECT text FROM captions WHERE file=? AND image=? ORDER BY rowid LIMIT 1"
            for (text,) in self._base.execute(query, (file, image)) if self._base else ():
                return str(text)
        return ""

    def _claims(self, path: str) -> list[tuple[int, str]]:
        assert self._base is not None
        query = "SELECT file, image FROM claims WHERE path=? ORDER BY file"
        return self._base.execute(query, (plain_text(path),)).fetchall()

    def _class(self, file: int, category: str) -> str:
        return self._classes.get((file, category)) or self._classes.get((0, category)) or category

    @cached_property
    def _classes(self) -> dict[tuple[int, str], str]:
        """Names by file and class; 0 for those that a file without images names for all."""
        file = "CASE format WHEN ? THEN 0 ELSE files.id END"
        query = f"SELECT {file}, classes.id, name FROM classes JOIN files ON files.id=file"
        found = self._base.execute(query, (CLASSES,)) if self._base else ()
        return {(file, category): name for file, category, name in found}

    @cached_property
    def _base(self) -> sqlite3.Connection | None:
        if not self._path.exists():
            return None
        if not _is_of_now(self._path):
            raise UserError(f"{self._path} is of another version; run tools/curate.py --stage list first")
        # Nobody writes while stages run, so that no file system needs to lock.
        return sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)


class IndexWriter(AnnotationIndex):
    """Reads annotation files below and beside a folder of images, and finds the images that they name."""

    def __init__(self, place: Path, folder: Path, settings: AnnotationSettings) -> None:
        super().__init__(place)
        self._folder, self._settings = folder, settings
        self._parts = PurePosixPath(folder.resolve().as_posix()).parts
        self._faults = Counter[str]()
        self._unnamed = 0
        self._single: dict[str, int] = {}
        self._indexed = True
        self.used = array("Q")
        """Marks of the files below the folder that annotate something; one may annotate several images."""
        self.examples: list[str] = []
        """The first of them."""
        self.damaged: dict[str, str] = {}
        """Files of many images that could not be read, and why."""

    def read(self, found: Iterable[Path]) -> None:
        """Read files that may annotate many images: those given, and those in the folder's neighbours.

        Raises:
            UserError: The file that the settings name is no annotation, or cannot be read.
        """
        own = self._settings.annotations_file
        beside = (self._folder.resolve().parent / "annotations").glob("*.json")
        wanted = [Path(own)] if own else sorted({path.resolve() for path in (*found, *beside)})
        known = dict(self._base.execute("SELECT path, id FROM files").fetchall())
        fresh: set[int] = set()
        for path in wanted:
            if not path.is_file():
                raise UserError(
                    f"--annotations-file {path} is no file; name a JSON or CSV file of annotations"
                )
            state = _state(path.stat())
            old = self._base.execute(
                "SELECT id FROM files WHERE path=? AND state=?", (plain_text(path), state)
            )
            row = old.fetchone()
            file = row[0] if row else self._read(path, state, known.get(plain_text(path)))
            if file is None and own:
                why = self.damaged.get(str(path), "no images are named in it")
                raise UserError(f"--annotations-file {path} is no annotation ({why})")
            fresh |= {file} if file is not None else set()
            if file is not None:
                self._use(path, self._folder.resolve())
        for file in set(known.values()) - fresh:
            self._forget(file)
        for number, columns in enumerate(_INDEXES):
            self._base.execute(f"CREATE INDEX IF NOT EXISTS index{number} ON {columns}")
        self._indexed = True

    def _use(self, file: Path, folder: Path) -> None:
        if file.is_relative_to(folder):
            name = file.relative_to(folder).as_posix()
            self.used.append(mark(name))
            self.examples = [*self.examples, name][:EXAMPLES]

    def match(self, paths: Iterable[str], tars: Iterable[tuple[str, str]], state: Callable[[], Any]) -> None:
        """Find the annotations of loose images, by path, and of members of tars, by tar and name.

        What is known of the same files and ``state`` of all images is believed; None is never the same.
        """
        datasets = bool(self._base.execute("SELECT 1 FROM images LIMIT 1").fetchone())
        files = self._base.execute("SELECT path, state FROM files ORDER BY path").fetchall()
        now = state() if datasets else None
        key = json.dumps([files, now])
        known = self._base.execute("SELECT unnamed, faults FROM matched WHERE state=?", (key,)).fetchone()
        if known:
            self._unnamed, self._faults = known[0], Counter(json.loads(known[1]))
            return
        self._base.execute("DELETE FROM claims")
        self._base.execute("DELETE FROM matched")
        for path in paths:
            claimed = datasets and self._claim(path, path)
            labelled = not self._settings.annotations_file and self._find_labels(path)
            self._unnamed += not (claimed or labelled)
            if self._settings.captions:
                self._find_caption(path)
        for tar, name in tars if datasets else ():
            self._unnamed += not self._claim(f"{tar}/{name}", name)
        self._settle()
        if now is not None:
            told = json.dumps(self._faults)
            self._base.execute("INSERT INTO matched VALUES(?,?,?)", (key, self._unnamed, told))

    def tar_digest(self, tar: str) -> str:
        """Hash of what files say of a tar's images, empty for nothing."""
        return self.digest(f"{tar}/", f"{tar}/\U0010ffff")

    def commit(self) -> None:
        """Keep what was read and found."""
        self._base.commit()

    def close(self) -> None:
        """Forget what was not kept; nothing is left where nothing is annotated."""
        with suppress(sqlite3.Error):
            self._base.rollback()
            found = self._base.execute("SELECT 1 FROM files").fetchone()
            self._base.close()
            if not found:
                self._path.unlink()

    def summary(self) -> dict[str, Any]:
        """How many images and rows each file annotates, by path, and what fits nothing; JSON."""
        files = {}
        for file, path, kind in self._base.execute(
            "SELECT id, path, format FROM files ORDER BY path"
        ).fetchall():
            count = lambda query, file=file: self._base.execute(query, (file,)).fetchone()[0]  # noqa: E731
            images = count("SELECT count(*) FROM images WHERE file=?")
            here = count("SELECT count(DISTINCT image) FROM claims WHERE file=?")
            files[path] = {
                "format": kind, "images": images, "here": here,
                "rows": count("SELECT count(*) FROM rows WHERE file=?"),
            }  # fmt: skip
        named = {"images that they do not name": self._unnamed} if files else {}
        return {"files": files, **{why: n for why, n in sorted({**self._faults, **named}.items()) if n}}

    @cached_property
    def _base(self) -> sqlite3.Connection:  # type: ignore[override]
        if not _is_of_now(self._path):
            self._path.unlink()
        base = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?nolock=1", uri=True, isolation_level="DEFERRED"
        )
        base.executescript(_TABLES)
        return base

    def _read(self, path: Path, state: str, old: int | None) -> int | None:
        """Store a file's entries; gives its number, None if it annotates nothing."""
        if old is not None:
            self._forget(old)
        add = "INSERT INTO files(path, state, place) VALUES(?, ?, ?)"
        place = os.fsencode(path.absolute())
        file = int(self._base.execute(add, (plain_text(path), state, place)).lastrowid or 0)
        entries, waiting = read_dataset(path), {kind: list[tuple[Any, ...]]() for kind in _INSERTS}
        kind = ""
        try:
            while True:
                entry = next(entries)
                waiting[type(entry)].append((file, *(entry if isinstance(entry, Row) else _columns(entry))))
                if len(waiting[type(entry)]) >= BATCH:
                    self._flush(waiting)
        except StopIteration as end:
            kind = end.value
        except ValueError as error:
            if self._base.execute("SELECT 1 FROM images WHERE file=?", (file,)).fetchone() or waiting[Named]:
                self.damaged[str(path)] = f"annotations that cannot be read ({error})"
        self._flush(waiting)
        if not kind:
            self._forget(file)
            return None
        self._base.execute("UPDATE files SET format=? WHERE id=?", (kind, file))
        return file

    def _find_labels(self, path: str) -> bool:
        """Keep what the label file of an image says; whether it has one."""
        image = self._folder / path
        for folder, endings in _label_places(image.parent):
            for ending in endings:
                file = folder / (image.stem + ending)
                if not file.is_file():
                    continue
                found = read_labels(file)
                if found is not None:
                    kind, (width, height), rows = found
                    self._keep(f"{kind} files", path, Named(path, "", width, height), rows)
                    if folder != image.parent:
                        self._use(file, self._folder)
                    return True
                self._faults["label files that cannot be read"] += folder != image.parent
        return False

    def _find_caption(self, path: str) -> None:
        """Keep the text beside an image."""
        file = (self._folder / path).with_suffix(".txt")
        if file.is_file():
            with file.open("rb") as stream:
                text = stream.read(MAX_CAPTION).decode("utf-8-sig", errors="replace").strip()
            self._keep("captions", path, Named(path, ""), [], text)

    def _keep(
        self, kind: str, path: str, image: Named, rows: list[dict[str, Any]], caption: str = ""
    ) -> None:
        if kind not in self._single:
            add = "INSERT INTO files(path, state, format) VALUES(?, '', ?)"
            self._single[kind] = int(self._base.execute(add, (kind, kind)).lastrowid or 0)
        file, key = self._single[kind], plain_text(path)
        entries: list[Entry] = [image]
        entries += [row_of(path, row.pop("class", ""), row) for row in rows]
        entries += [Caption(path, caption)] if caption else []
        for entry in entries:
            self._base.execute(_INSERTS[type(entry)], (file, *_columns(entry)))
        self._base.execute("INSERT INTO claims VALUES(?,?,?,0,0,0)", (key, file, key))

    def _flush(self, waiting: dict[type, list[tuple[Any, ...]]]) -> None:
        if self._indexed and any(len(rows) >= BATCH for rows in waiting.values()):
            # Sorted at once they cost a tenth of what they cost row by row.
            for number in range(len(_INDEXES)):
                self._base.execute(f"DROP INDEX IF EXISTS index{number}")
            self._indexed = False
        for kind, rows in waiting.items():
            self._base.executemany(_INSERTS[kind], rows)
            rows.clear()

    def _forget(self, file: int) -> None:
        for table in ("images", "rows", "classes", "captions"):
            self._base.execute(f"DELETE FROM {table} WHERE file=?", (file,))
        self._base.execute("DELETE FROM files WHERE id=?", (file,))

    def _claim(self, path: str, name: str) -> bool:
        """Note which annotated images an image may be; whether there is one."""
        own = (*self._parts, *_plain(path))
        by_file: dict[int, list[tuple[int, str, bool, int]]] = {}
        query = "SELECT file, id, name FROM images WHERE stem=?"
        for file, image, other in self._base.execute(query, (own[-1],)):
            theirs, (folder, stem) = _plain(other), self._place_of(file)
            shared = _alike(own[::-1], theirs[::-1])
            if shared == len(theirs) or shared >= min(len(_plain(name)), 2):
                named = len(own[-2]) > 2 and own[-2].lower() in stem
                claim = (shared, image, named, _alike(own, folder))
                by_file.setdefault(file, []).append(claim)
        best = []
        for file, claims in by_file.items():
            most = max(claim[0] for claim in claims)
            first, *more = [claim for claim in claims if claim[0] == most]
            self._faults["images that two annotations fit"] += bool(more)
            best += [] if more else [(file, *first)]
        top = max((claim[3:] for claim in best), default=())
        rows = [
            (plain_text(path), file, image, shared, named, depth)
            for file, shared, image, named, depth in best
            if (named, depth) == top
        ]
        self._base.executemany("INSERT INTO claims VALUES(?,?,?,?,?,?)", rows)
        return bool(rows)

    @lru_cache(maxsize=1000)  # noqa: B019 - it lives as long as a search
    def _place_of(self, file: int) -> tuple[tuple[str, ...], str]:
        """Folder of a file, in parts, and its name without the ending, in lower case."""
        [path] = self._base.execute("SELECT path FROM files WHERE id=?", (file,)).fetchone()
        return PurePosixPath(path).parts[:-1], PurePosixPath(path).stem.lower()

    def _settle(self) -> None:
        """Leave each annotated image to the image that fits best; to none where two fit alike."""
        query = "SELECT file, image FROM claims GROUP BY file, image HAVING count(*) > 1"
        for key in self._base.execute(query).fetchall():
            claims = self._base.execute(
                "SELECT rowid, shared, named, depth FROM claims WHERE file=? AND image=?", key
            ).fetchall()
            best = max(claim[1:] for claim in claims)
            lost = [claim for claim in claims if claim[1:] != best]
            if len(claims) - len(lost) > 1:
                lost = claims
                self._faults["annotations that two images fit"] += 1
            self._unnamed += len(lost)
            self._base.executemany("DELETE FROM claims WHERE rowid=?", [claim[:1] for claim in lost])


def _columns(entry: Entry) -> tuple[Any, ...]:
    """An entry as its table has it, without the file."""
    match entry:
        case Row():
            return entry
        case Named(image, name, width, height):
            return plain_text(image), plain_text((_plain(name) or ("",))[-1]), plain_text(name), width, height
        case Category(category, name):
            return plain_text(category), plain_text(name)
    return tuple(map(plain_text, entry))


def _state(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


def _is_of_now(path: Path) -> bool:
    """Whether a database is not there yet, or has the tables of this version: SQLite keeps it at byte 60."""
    content = path.open("rb").read(64) if path.exists() else b""
    return not content or int.from_bytes(content[60:64], "big") == LAYOUT


def _plain(name: str) -> tuple[str, ...]:
    """The parts of an image's path, without its ending."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if parts and parts[-1].lower().endswith((*ENDINGS, *OTHER_FORMATS)):
        parts[-1] = parts[-1].rsplit(".", 1)[0]
    return tuple(parts)


def _alike(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Parts with which both begin."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))  # noqa: B905


def mark(name: str) -> int:
    """64 bits that tell one name from another."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")


@lru_cache(maxsize=4)
def _label_places(folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Folders in which label files of a folder's images may lie, and their endings there."""
    head, found, tail = str(folder.absolute()).rpartition("/images")
    beside = [Path(f"{head}/labels{tail}")] if found and tail[:1] in ("", "/") else []
    beside += [folder.parent / name for name in PLACES]
    places = [(place, LABELS) for place in dict.fromkeys(beside) if place.is_dir()]
    endings = {path.suffix for path in folder.iterdir()} & (
        {".xml", ".txt"} if has_classes(folder) else {".xml"}
    )
    return [*places, (folder, tuple(sorted(endings)))]
