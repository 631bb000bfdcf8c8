"""Annotation files of other people, as entries of one kind: images, rows, classes and captions.

COCO, LVIS and Objects365 (one JSON), Open Images (CSV) and HuggingFace's imagefolder (metadata.csv or .jsonl)
annotate many images, YOLO (text), Pascal VOC (XML) and SA-1B (JSON) one. A row is COCO's, with iscrowd and
score, as :mod:`megaregion.data.coco` reads it.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO
from urllib.parse import urlsplit
from xml.etree import ElementTree
from zlib import crc32

import yaml

CHUNK = 2**20
"""Bytes of a JSON file that are read at once."""
MAX_VALUE = 2**26
"""Bytes of one row; a file in which one never ends is no annotation, and must not fill the memory."""
MAX_LABELS = 2**24
"""Bytes of one image's label file."""
SIDES = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
"""Columns that tell Open Images' boxes."""
BOXES = ("bbox", "bboxes", "boxes")
CLASS_NAMES = (
    "category", "categories", "label", "labels", "class", "category_name", "category_id", "class_id",
)  # fmt: skip
"""What HuggingFace's datasets call boxes and classes; the first name that is there counts."""
TEXTS = ("caption", "text")
"""Columns of a metadata file that hold a text about the image."""
DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
"""Where YOLO's classes are named: in or above the folder of labels."""
CLASSES = "Open Images' classes"
"""Format of a file that names classes alone."""
_SCAN: Callable[[str, int], tuple[Any, int]] = json.scanner.make_scanner(json.JSONDecoder())  # type: ignore[attr-defined]
_SPACE, _COMMA = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n]*,[ \t\r\n]*")


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
    content: bytes | int
    """Its JSON, or where that begins in the file, in bytes."""
    size: int
    """Bytes of its JSON."""
    mark: int
    """CRC of its JSON."""


def row_of(image: str, category: str, content: dict[str, Any]) -> Row:
    """A row that its file has in another form."""
    said = json.dumps(content).encode()
    return Row(plain_text(image), plain_text(category), said, len(said), crc32(said))


def plain_text(value: object) -> str:
    """A text that a database takes: a path may hold bytes that are no text."""
    text = str(value)
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


class Category(NamedTuple):
    """The name of a class."""

    category: str
    name: str
    frequency: str = ""
    """LVIS: r(are), c(ommon) or f(requent), by the images of its training split; empty elsewhere."""


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
        if path.suffix.lower() == ".jsonl":
            with path.open("rb") as stream:
                return (yield from _read_metadata(_lines(stream)))
        with path.open("rb") as stream:
            return (yield from _read_coco(stream))
    except (RecursionError, csv.Error) as error:
        raise ValueError(str(error)) from None


def _read_coco(file: BinaryIO) -> Generator[Entry, None, str]:
    kind, named = "COCO", False
    for key, item, content, place in stream_json(file):
        if not isinstance(item, dict):
            continue
        if key == "annotations":
            if "caption" in item:
                yield Caption(str(item.get("image_id")), str(item["caption"]).strip())
            elif "segments_info" not in item:
                image, category = plain_text(item.get("image_id")), plain_text(item.get("category_id", ""))
                yield Row(image, category, place, len(content), crc32(content.encode("latin-1")))
        elif key == "images":
            # LVIS names no file, but where COCO has it.
            url = "/".join(urlsplit(str(item.get("coco_url") or "")).path.split("/")[-2:])
            name = str(item.get("file_name") or url).replace("\\", "/")
            named |= bool(name)
            kind = "LVIS" if "neg_category_ids" in item else "Objects365" if "objects365" in name else kind
            yield Named(str(item.get("id")), name, _side(item.get("width")), _side(item.get("height")))
        elif key == "categories":
            number, often = str(item.get("id")), str(item.get("frequency", ""))
            yield Category(number, str(item.get("name", number)), often)
    return kind if named else ""


def _read_csv(file: TextIO) -> Generator[Entry, None, str]:
    lines = csv.reader(file)
    header = next(lines, [])
    if len(header) == 2 and (header[0] == "LabelName" or re.match(r"/[mtg]/", header[0])):
        yield from (Category(*line) for line in (header, *lines) if len(line) == 2)
        return CLASSES
    if "file_name" in header:
        return (yield from _read_metadata(dict(zip(header, line, strict=False)) for line in lines))
    if not set(SIDES) <= set(header):
        return ""
    places = [header.index(name) for name in SIDES]
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
        yield row_of(image, label, content)
    return "Open Images"


def _read_metadata(entries: Iterable[Any]) -> Generator[Entry, None, str]:
    """HuggingFace's imagefolder: an entry for each image, by its file_name."""
    named = False
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            if not named:
                break  # It is something else, and may be long.
            continue
        name = entry["file_name"].replace("\\", "/")
        named = True
        yield Named(name, name, _side(entry.get("width")), _side(entry.get("height")))
        yield from (row_of(name, row.pop("class", ""), row) for row in regions_of(entry))
        yield from (Caption(name, str(entry[text]).strip()) for text in TEXTS if entry.get(text))
    return "imagefolder" if named else ""


def _lines(stream: BinaryIO) -> Iterator[Any]:
    """What each line of a file of JSON lines says."""
    for line in iter(lambda: stream.readline(MAX_VALUE), b""):
        if line.strip():
            yield json.loads(line.decode("utf-8-sig"))


def regions_of(entry: dict[str, Any], classes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of an image's regions as HuggingFace's datasets have them, with ``class``.

    Boxes are [x, y, w, h] in pixels. They come in ``objects``, as lists of one length or as a list of
    structs, or as columns of their own. ``classes`` are the names of classes that are numbers.
    """
    found = entry.get("objects", entry)
    if isinstance(found, dict):
        lists = {name: values for name, values in found.items() if isinstance(values, list)}
        length = max((len(lists[name]) for name in (*BOXES, "segmentation") if name in lists), default=0)
        found = [
            {name: values[n] for name, values in lists.items() if n < len(values)} for n in range(length)
        ]
    rows = []
    for given in found if isinstance(found, list) else ():
        row = dict(given) if isinstance(given, dict) else {}
        row["bbox"] = next((row[name] for name in BOXES if row.get(name) is not None), None)
        row["iscrowd"] = row.get("iscrowd") or row.get("is_crowd")
        label = next((row[name] for name in CLASS_NAMES if row.get(name) is not None), "")
        if isinstance(label, int) and classes:
            label = classes[label] if 0 <= label < len(classes) else ""
        kept = ("bbox", "iscrowd", "segmentation", "keypoints")
        rows.append({"class": str(label), **{key: row[key] for key in kept if row.get(key) is not None}})
    return rows


def stream_json(file: BinaryIO) -> Iterator[tuple[str, Any, str, int]]:
    """Every member of a JSON object, arrays item by item; memory holds one item and a chunk of the file.

    Yields:
        Key and value; the bytes that say the value, as letters of Latin-1, and where they begin in the file.

    Raises:
        ValueError: It is no JSON object.
    """
    stream = _Stream(file)
    stream.take("{")
    if stream.peek() == "}":
        return
    while True:
        key = str(stream.value()[0])
        stream.take(":")
        if stream.peek() != "[":
            yield key, *stream.value()
        else:
            stream.take("[")
            for value, content, place in stream.items():
                yield key, value, content, place
        if stream.take(",}") == "}":
            return


class _Stream:
    """A file of JSON, of which a part is in memory: read as Latin-1, which has a letter for every byte."""

    def __init__(self, file: BinaryIO) -> None:
        start = file.read(len(codecs.BOM_UTF8))
        marked = start == codecs.BOM_UTF8
        self._file, self._place, self._ended, self._plain = file, 0, False, False
        self._text, self._begin = ("", len(start)) if marked else (start.decode("latin-1"), 0)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            found = self._text[self._place : self._place + 1]
            if found > " " or (not found and self._ended):
                return found
            space = _SPACE.match(self._text, self._place)
            end = space.end() if space else self._place
            if found and end == self._place:
                return found  # No space of JSON's.
            self._place = end
            if end == len(self._text):
                self._more()

    def take(self, allowed: str) -> str:
        """Go over one of some characters."""
        found = self.peek()
        if not found or found not in allowed:
            raise ValueError(f"{found or 'the end'} where {' or '.join(allowed)} belongs")
        self._place += 1
        return found

    def items(self) -> Iterator[tuple[Any, str, int]]:
        """The values of an array, behind its bracket."""
        if self.peek() == "]":
            self._place += 1
            return
        while True:
            yield self.value()
            comma = _COMMA.match(self._text, self._place)
            if comma and comma.end() < len(self._text):
                self._place = comma.end()
            elif self.take(",]") == "]":
                return

    def value(self) -> tuple[Any, str, int]:
        """The next value, whole; its bytes, and their place in the file."""
        if self._text[self._place : self._place + 1] <= " ":
            self.peek()
        while True:
            try:
                value, end = _SCAN(self._text, self._place)
                # A number may go on behind the chunk: 1, 1. and 1.5e are cut ones.
                if self._ended or self._text[end : end + 1] not in ("", *".eE"):
                    break
            except (StopIteration, ValueError) as error:
                if self._ended or len(self._text) - self._place > MAX_VALUE:
                    raise ValueError(f"no value where one belongs ({error})") from None
            self._more()
        content, place = self._text[self._place : end], self._begin + self._place
        if not self._plain:
            value = json.loads(content.encode("latin-1").decode())
        self._place = end
        return value, content, place

    def _more(self) -> None:
        rest = self._text[self._place :]
        part = self._file.read(max(CHUNK, len(rest)))
        self._begin += self._place
        self._text, self._place, self._ended = rest + part.decode("latin-1"), 0, not part
        self._plain = self._text.isascii()


def read_labels(path: Path) -> tuple[str, tuple[int, int], list[dict[str, Any]]] | None:
    """One image's label file: its format, the image's width and height or 0, and rows with ``class``.

    None where it is something else, as a caption. What of it cannot be read gives a row without a box.
    """
    content = path.read_bytes()[:MAX_LABELS]
    if path.suffix.lower() == ".xml":
        return _read_voc(content)
    if path.suffix.lower() == ".json":
        return _read_record(content)
    return _read_yolo(content.decode("utf-8-sig", errors="replace"), _yolo_classes(path.parent))


def _read_record(content: bytes) -> tuple[str, tuple[int, int], list[dict[str, Any]]] | None:
    """SA-1B's JSON of one image; its rows have no class."""
    try:
        record = json.loads(content.decode("utf-8-sig"))
        rows, image = record["annotations"], record.get("image") or {}
        size = _side(image.get("width")), _side(image.get("height"))
        return "SA-1B", size, [row if isinstance(row, dict) else {} for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


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
