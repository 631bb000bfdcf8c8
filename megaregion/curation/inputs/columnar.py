"""Parquet and Arrow files, an image a row, as HuggingFace has them, and copies of its hub's datasets.

Files consist of blocks: Parquet's row groups, Arrow's record batches. They are read as a stream, from the
block of a wanted row on, few rows at once: neighbours cost one pass, and no block fills the memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from megaregion.curation.inputs.index import MAX_CAPTION
from megaregion.curation.picture import BadImage
from megaregion.data.formats import BOXES, CLASS_NAMES, regions_of
from megaregion.errors import UserError

CAPTIONS = ("caption", "text", "captions")
"""Columns that may hold a text about the image; the first one counts."""
BESIDE_BOXES = ("segmentation", "iscrowd", "is_crowd", "keypoints")
"""Columns that say more of regions where they are columns of their own."""
ROWS = 16
"""Rows of a Parquet file that are in memory at once."""
BUFFER = 2**20
"""Bytes of a column that are read at once."""
DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError, OverflowError)
"""What pyarrow raises on damaged files; an OSError with a number is of the disk."""
_NONE = pa.RecordBatch.from_pylist([])
HUB = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<inside>.+))?")
"""Address of a dataset of the hub, at a branch, tag or commit, or of a folder inside of it."""


def copy_of_hub(address: str, folder: Path, fetch: bool = True) -> Path:
    """Copy hf://datasets/OWNER/NAME[@REVISION][/FOLDER], not its code, into a folder; gives the images' one.

    Stages read images several times and by place, so a stream would load the dataset as often. What is there
    is not fetched again, and nothing is unless ``fetch`` says so.

    Raises:
        UserError: The address is none, or the hub does not give the dataset.
    """
    from huggingface_hub import HfApi, snapshot_download

    # That of its HTTP library, whose name has changed.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    if (found := HUB.fullmatch(address)) is None:
        raise UserError(f"--images must be a folder or hf://datasets/OWNER/NAME, got {address}")
    inside = found["inside"]
    if not fetch:
        return folder / (inside or "")
    try:
        # Asked for by its commit, a copy that is not whole is refused where the hub cannot be reached.
        commit = HfApi().dataset_info(found["name"], revision=found["revision"] or "main").sha
        snapshot_download(
            found["name"], repo_type="dataset", revision=commit, local_dir=folder,
            allow_patterns=None if inside is None else f"{inside}/*", ignore_patterns=["*.py", ".*"],
        )  # fmt: skip
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--images {address} cannot be fetched ({reason}); see its name, or log in by HF_TOKEN"
        ) from None
    return folder / (inside or "")


class Columnar:
    """One file: its images, and what other columns say of them.

    Args:
        path: Where it lies.
        column: The column of images; empty finds it.

    Raises:
        ValueError: It cannot be read, or its column of images cannot be told; the text is the reason.
        OSError: Likewise.
    """

    def __init__(self, path: Path, column: str = "") -> None:
        self._path, self.damage = path, ""
        """What is wrong behind the rows that can be read, or empty."""
        try:
            self._open(path)
        except DAMAGE as error:
            if getattr(error, "errno", None):
                raise
            raise ValueError(f"not a Parquet or Arrow file ({_line(error)})") from None
        self._starts = np.cumsum([0, *self._sizes])
        self._features = _features(self._schema)
        self.column = self._find(column)
        """The column of images; empty if there is none."""
        names = self._schema.names
        boxes = [name for name in (*BOXES, *CLASS_NAMES, *BESIDE_BOXES) if name in names]
        self._objects = ["objects"] if "objects" in names else boxes if {*BOXES} & {*boxes} else []
        self._classes = _class_names({name: self._features.get(name) for name in self._objects})
        self._caption = next((name for name in CAPTIONS if name in names), "")
        sides = [name for name in ("width", "height") if name in names]
        self._wanted = [*dict.fromkeys(filter(None, (self.column, self._caption, *self._objects, *sides)))]
        self._stream: Iterator[Any] = iter(())
        self._first, self._rows = len(self), _NONE

    def __len__(self) -> int:
        return int(self._starts[-1])

    def image(self, row: int) -> bytes:
        """The content of an image; raises BadImage where a row has none or is damaged."""
        value = self._row(row)[self.column]
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is None:
            raise BadImage("named by a path alone; embed its bytes" if path else "no image in its row")
        return bytes(content)

    def annotation(self, row: int) -> bytes | None:
        """JSON of an image's regions, as `read_annotations` takes it; None without such columns."""
        if not self._objects:
            return None
        found = self._row(row)
        size = {name: found.get(name) for name in ("width", "height")}
        record = {"image": size, "annotations": regions_of(found, self._classes)}
        return json.dumps(record, default=str).encode()

    def caption(self, row: int) -> str:
        """The text about an image, or nothing."""
        text = self._row(row).get(self._caption) if self._caption else None
        text = next(iter(text), None) if isinstance(text, list) else text
        return text[:MAX_CAPTION].strip() if isinstance(text, str) else ""

    def _open(self, path: Path) -> None:
        if path.suffix.lower() == ".parquet":
            self._file = parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
            self._schema, meta = self._file.schema_arrow, self._file.metadata
            self._sizes = [meta.row_group(block).num_rows for block in range(meta.num_row_groups)]
            return
        # Mapped, a batch costs no memory but what is touched of it.
        self._file, self._mapped, self._sizes = None, pa.memory_map(str(path)), []
        self._schema = self._batches().schema
        try:
            self._sizes.extend(batch.num_rows for batch in self._batches())
        except DAMAGE as error:
            self.damage = f"truncated or damaged ({_line(error)})"

    def _batches(self) -> Any:
        """The batches of an Arrow file, in either of its two forms."""
        self._mapped.seek(0)
        if self._mapped.read(6) == b"ARROW1":
            file = pa.ipc.open_file(self._mapped)
            return pa.RecordBatchReader.from_batches(
                file.schema, map(file.get_batch, range(file.num_record_batches))
            )
        self._mapped.seek(0)
        return pa.ipc.open_stream(self._mapped)

    def _find(self, column: str) -> str:
        """The column of images."""
        if column:
            if column not in self._schema.names or not _holds_bytes(self._schema.field(column).type):
                raise ValueError(f"no column {column} of images; name another one by --image-column")
            return column
        found = [name for name, kind in self._features.items() if _type(kind) == "Image"]
        found = [name for name in found if name in self._schema.names] or [
            field.name for field in self._schema
            if _holds_bytes(field.type) and (pa.types.is_struct(field.type) or field.name == "image")
        ]  # fmt: skip
        if len(found) > 1:
            raise ValueError(f"several columns of images ({', '.join(found)}); name one by --image-column")
        return found[0] if found else ""

    def _row(self, number: int) -> dict[str, Any]:
        """What the wanted columns say in a row."""
        behind = self._first + self._rows.num_rows
        try:
            if not self._first <= number < behind:
                block = int(np.searchsorted(self._starts, number, side="right")) - 1
                if number < self._first or self._starts[block] > behind:
                    self._stream, behind = self._blocks(block), int(self._starts[block])
                while number >= behind:
                    self._rows = next(self._stream)
                    # Else offsets that lead nowhere would be followed there.
                    self._rows.validate(full=True)
                    self._first, behind = behind, behind + self._rows.num_rows
            [found] = self._rows.slice(number - self._first, 1).to_pylist()
        except (*DAMAGE, StopIteration) as error:
            if getattr(error, "errno", None):
                raise UserError(f"{self._path} cannot be read ({_line(error)}); run again") from None
            # Where the stream is now nobody knows.
            self._first, self._rows = len(self), _NONE
            raise BadImage("its row is damaged") from None
        return dict(found)

    def _blocks(self, first: int) -> Iterator[Any]:
        if self._file is not None:
            groups = range(first, len(self._sizes))
            yield from self._file.iter_batches(ROWS, list(groups), self._wanted, use_threads=False)
        else:
            yield from (batch.select(self._wanted) for batch in islice(self._batches(), first, None))


def count_rows(path: Path, column: str) -> dict[str, Any]:
    """What a listing says of a file: how many images it holds in which column, and what is wrong with it."""
    found: dict[str, Any] = {"images": 0, "kinds": {}, "damage": "", "column": "", "asked": column}
    try:
        file = Columnar(path, column)
    except ValueError as error:
        return found | {"damage": str(error)}
    images = len(file) if file.column else 0
    return found | {"images": images, "damage": file.damage, "column": file.column}


def _features(schema: Any) -> dict[str, Any]:
    """What HuggingFace's datasets say of the columns."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return dict(features)
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _type(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _holds_bytes(kind: Any) -> bool:
    """Whether a column's values are bytes, or bytes with a path."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(features: Any) -> list[str]:
    """Names of the classes by number, where the features have any."""
    if _type(features) == "ClassLabel":
        return [str(name) for name in features.get("names") or ()]
    parts = features if isinstance(features, list) else []
    if isinstance(features, dict):
        parts = [features[name] for name in sorted(features, key=lambda name: name not in CLASS_NAMES)]
    return next((found for part in parts if (found := _class_names(part))), [])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
