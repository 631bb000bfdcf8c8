"""What stages hand on about each image: one JSON object a line, in the order of the images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megaregion.curation.boxes import Box
from megaregion.curation.types import Proposal, Word
from megaregion.data.sample import RLE


@dataclass(frozen=True)
class ImageRegions:
    """An image and the regions found in it, candidates or chosen ones."""

    key: str
    width: int = 0
    """0 if the image could not be used."""
    height: int = 0
    regions: Sequence[Proposal] = field(default_factory=tuple)


@dataclass(frozen=True)
class ImageWords:
    """An image and the words read in it."""

    key: str
    words: Sequence[Word] = field(default_factory=tuple)

    def above(self, confidence: float) -> list[Word]:
        """Words that were recognised with more than this confidence."""
        return [word for word in self.words if word.score > confidence]


def write_regions(file: BinaryIO, image: ImageRegions) -> None:
    """Append one image."""
    regions = [_from_region(region) for region in image.regions]
    _write(file, {"key": image.key, "width": image.width, "height": image.height, "regions": regions})


def read_regions(paths: Iterable[Path]) -> Iterator[ImageRegions]:
    """Read the images of several pieces, one after the other."""
    for line in _lines(paths):
        yield ImageRegions(line["key"], line["width"], line["height"], [*map(_to_region, line["regions"])])


def write_words(file: BinaryIO, image: ImageWords) -> None:
    """Append one image."""
    words = [{"text": w.text, "box": _rounded(w.box), "score": round(w.score, 4)} for w in image.words]
    _write(file, {"key": image.key, "words": words})


def read_words(paths: Iterable[Path]) -> Iterator[ImageWords]:
    """Read the images of several pieces, one after the other."""
    for line in _lines(paths):
        yield ImageWords(line["key"], [Word(w["text"], _box(w["box"]), w["score"]) for w in line["words"]])


def _write(file: BinaryIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _lines(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        # Bytes, not text lines: a word may hold one of Unicode's other line ends.
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)


def _from_region(region: Proposal) -> dict[str, Any]:
    line: dict[str, Any] = {"box": _rounded(region.box), "score": round(region.score, 4)}
    if region.mask is not None:
        line["mask"] = {"size": region.mask.size, "counts": region.mask.counts}
    return line


def _to_region(line: dict[str, Any]) -> Proposal:
    mask = line.get("mask")
    rle = None if mask is None else RLE((mask["size"][0], mask["size"][1]), tuple(mask["counts"]))
    return Proposal(_box(line["box"]), line["score"], rle)


def _box(values: Sequence[float]) -> Box:
    x0, y0, x1, y1 = values
    return x0, y0, x1, y1


def _rounded(box: Box) -> list[float]:
    """Hundredths of a pixel are enough, and keep the files small."""
    return [round(value, 2) for value in box]
