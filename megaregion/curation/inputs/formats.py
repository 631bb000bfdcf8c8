"""Annotation files of other people, as entries of one kind: images, rows, classes and captions.

COCO, LVIS and Objects365 (one JSON) and Open Images (CSV) annotate many images, YOLO (text) and Pascal VOC
(XML) one. A row is COCO's: bbox [x, y, w, h], segmentation (polygons or run lengths), iscrowd, score. Where
``relative`` is set, its numbers are shares of the image's sides.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Generator, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import urlsplit
from xml.etree import ElementTree

import yaml

CHUNK = 2**20
"""Characters of a JSON file that are read at once."""
MAX_VALUE = 2**26
"""Characters of one row; a file in which one never ends is no annotation, and must not fill the memory."""
MAX_LABELS = 2**24
"""Bytes of one image's label file."""
KEPT = ("bbox", "segmentation", "iscrowd", "score", "predicted_iou")
"""What is kept of a row."""
BOXES = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
"""Columns that tell Open Images' boxes."""
DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
"""Where YOLO's classes are named: in or above the folder of labels."""
CLASSES = "Open Images' classes"
"""Format of a file that names classes alone."""
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


class Named(NamedTuple):
    """An image that a file annotates."""

    image: str
    name: str
    """Its path as the file gives it; its ending may be missing."""
    width: int = 0
    """In pixels; 0 where the file does not say."""
    height: int = 0


class Row(NamedTuple):
    """One region of an image."""

    image: str
    category: str
    content: dict[str, Any]


class Category(NamedTuple):
    """The name of a class."""

    category: str
    name: str


class Caption(NamedTuple):
    """A text about an image."""

    image: str
    text: str


Entry = Named | Row | Category | Caption


def read_dataset(path: Path) -> Generator[Entry, None, str]:
    """The entries of a file that may annotate a dataset; gives the format's name, empty if it is none.

    Raises:
        ValueError: It cannot be read to its end.
    """
    try:
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                return (yield from _read_csv(file))
        with path.open(encoding="utf-8-sig") as file:
            return (yield from _read_coco(file))
    except (RecursionError, csv.Error) as error:
        raise ValueError(str(error)) from None


def _read_coco(file: TextIO) -> Generator[Entry, None, str]:
    kind, named = "COCO", False
    for key, item in stream_json(file):
        if not isinstance(item, dict):
            continue
        identity = str(item.get("id"))
        if key == "images":
            # LVIS names no file, but where COCO has it.
            url = "/".join(urlsplit(str(item.get("coco_url") or "")).path.split("/")[-2:])
            name = str(item.get("file_name") or url)
            named |= bool(name)
            kind = "LVIS" if "neg_category_ids" in item else "Objects365" if "objects365" in name else kind
            yield Named(
                identity, name.replace("\\", "/"), _side(item.get("width")), _side(item.get("height"))
            )
        elif key == "categories":
            yield Category(identity, str(item.get("name", identity)))
        elif key == "annotations" and "caption" in item:
            yield Caption(str(item.get("image_id")), str(item["caption"]).strip())
        elif key == "annotations" and "segments_info" not in item:
            content = {key: item[key] for key in KEPT if item.get(key) is not None}
            yield Row(str(item.get("image_id")), str(item.get("category_id", "")), content)
    return kind if named else ""


def _read_csv(file: TextIO) -> Generator[Entry, None, str]:
    lines = csv.reader(file)
    header = next(lines, [])
    if len(header) == 2 and (header[0] == "LabelName" or re.match(r"/[mtg]/", header[0])):
        yield from (Category(*line) for line in (header, *lines) if len(line) == 2)
        return CLASSES
    if not set(BOXES) <= set(header):
        return ""
    places = [header.index(name) for name in BOXES]
    group = header.index("IsGroupOf") if "IsGroupOf" in header else None
    last = ""
    for line in lines:
        try:
            image, label, *sides = (line[place] for place in places)
            x0, x1, y0, y1 = map(float, sides)
            content: dict[str, Any] = {"bbox": [x0, y0, x1 - x0, y1 - y0], "relative": True}
            if group is not None and line[group] == "1":
                content["iscrowd"] = 1
        except (IndexError, ValueError):
            image, label, content = line[places[0]] if len(line) > places[0] else "", "", {}
        if image != last:
            yield Named(image, image)
            last = image
        yield Row(image, label, content)
    return "Open Images"


def stream_json(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Every member of a JSON object, arrays item by item; memory holds one item and a chunk of the file.

    Raises:
        ValueError: It is no JSON object.
    """
    stream = _Stream(file)
    stream.take("{")
    if stream.peek() == "}":
        return
    while True:
        key = stream.value()
        stream.take(":")
        if stream.peek() != "[":
            yield str(key), stream.value()
        else:
            stream.take("[")
            more = stream.peek() != "]"
            if not more:
                stream.take("]")
            while more:
                yield str(key), stream.value()
                more = stream.take(",]") == ","
        if stream.take(",}") == "}":
            return


class _Stream:
    """A text of JSON, of which a part is in memory."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._place, self._ended = file, "", 0, False

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._place)
            self._place = space.end() if space else self._place
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._more()

    def take(self, allowed: str) -> str:
        """Go over one of some characters."""
        found = self.peek()
        if not found or found not in allowed:
            raise ValueError(f"{found or 'the end'} where {' or '.join(allowed)} belongs")
        self._place += 1
        return found

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
                # A number that ends with the chunk may go on.
                if end < len(self._text) or self._ended:
                    self._place = end
                    return value
            except ValueError:
                if self._ended or len(self._text) - self._place > MAX_VALUE:
                    raise
            self._more()

    def _more(self) -> None:
        rest = self._text[self._place :]
        part = self._file.read(max(CHUNK, len(rest)))
        self._text, self._place, self._ended = rest + part, 0, not part


def read_labels(path: Path) -> tuple[str, tuple[int, int], list[dict[str, Any]]] | None:
    """One image's label file: its format, the image's width and height or 0, and rows with ``class``.

    None where it is something else, as a caption. What of it cannot be read gives a row without a box.
    """
    content = path.read_bytes()[:MAX_LABELS]
    if path.suffix.lower() == ".xml":
        return _read_voc(content)
    return _read_yolo(content.decode("utf-8-sig", errors="replace"), _yolo_classes(path.parent))


def _read_voc(content: bytes) -> tuple[str, tuple[int, int], list[dict[str, Any]]] | None:
    # No annotation declares entities, and some make a parser work without end.
    if b"<annotation" not in content:
        return None
    if b"<!ENTITY" in content:
        return "Pascal VOC", (0, 0), [{}]
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError):
        return "Pascal VOC", (0, 0), [{}]
    size = (_side(root.findtext("size/width")), _side(root.findtext("size/height")))
    return "Pascal VOC", size, [_voc_row(one) for one in root.iter("object")]


def _voc_row(found: ElementTree.Element) -> dict[str, Any]:
    row: dict[str, Any] = {"class": (found.findtext("name") or "").strip()}
    try:
        x0, y0, x1, y1 = (
            float(found.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return row
    # Its first pixel is 1, and its last one belongs to the box.
    return row | {"bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]}


def _read_yolo(text: str, classes: _Classes) -> tuple[str, tuple[int, int], list[dict[str, Any]]] | None:
    rows, good = [], 0
    for line in text.splitlines():
        if line.strip():
            rows.append(_yolo_row(line.split(), classes))
            good += len(rows[-1]) > 1
    # A caption has no line of numbers.
    return ("YOLO", (0, 0), rows) if good or not rows else None


def _yolo_row(words: list[str], classes: _Classes) -> dict[str, Any]:
    try:
        number, *values = int(words[0]), *map(float, words[1:])
    except ValueError:
        return {}
    row: dict[str, Any] = {"class": classes.names.get(number, words[0])}
    if len(values) >= 6 and len(values) % 2 == 0 and not classes.keypoints:
        return row | {"segmentation": [values], "relative": True}
    if len(values) < 4:
        return row
    x, y, w, h = values[:4]
    row |= {"bbox": [x - w / 2, y - h / 2, w, h], "relative": True}
    return row | ({"score": values[4]} if len(values) == 5 else {})


class _Classes(NamedTuple):
    names: dict[int, str]
    keypoints: bool
    """Whether numbers behind the box are points of a pose."""


@lru_cache(maxsize=64)
def _yolo_classes(folder: Path) -> _Classes:
    """The classes that are named in a folder of labels or nearest above it."""
    for place in (folder, *folder.parents[:3]):
        for name in DATA_FILES:
            path = place / name
            if not path.is_file() or path.stat().st_size > MAX_LABELS:
                continue
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            try:
                found = (
                    yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else {"names": text.split("\n")}
                )
                names = found["names"]
                pairs = names.items() if isinstance(names, dict) else enumerate(names)
                return _Classes({int(k): str(v).strip() for k, v in pairs}, "kpt_shape" in found)
            except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
                continue
    return _Classes({}, False)


def has_classes(folder: Path) -> bool:
    """Whether YOLO's classes are named in or above a folder, so that texts beside images may be labels."""
    return bool(_yolo_classes(folder).names)


def _side(value: Any) -> int:
    try:
        number = float(value)
        return int(number) if 0 < number < 2**31 else 0
    except (TypeError, ValueError):
        return 0
