"""Cut-outs and backgrounds: the files that scenes are composed of, the pack's or anyone's own.

Each cut-out, background and word belongs to one part of the demo: train, val or test, never two.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.errors import UserError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
Item = TypeVar("Item")
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; x1 and y1 exclusive."""

TEST_SHARE = 0.25
"""Share of the instances of a class that only test scenes show."""
VAL_SHARE = 0.10
"""Share of the instances of a class that only val scenes show."""

PACK = Path(__file__).with_name("assets")
"""The pack that comes with the project; SOURCES.tsv in it names author and licence of every file."""

SUFFIXES = frozenset({".png", ".webp", ".jpg", ".jpeg"})
VIEW_MARK = "@"
"""NAME@1.webp and NAME@2.webp show one instance (or place) from two sides, and never part."""

CUTOUT_LIMIT = 320
"""Longest side of a cut-out in memory, in pixels."""
BACKGROUND_LIMIT = 768
"""Shorter side of a background in memory, in pixels."""
MAX_PIXELS = 50_000_000
"""A larger picture is left out: decoding it would cost more than any scene is worth."""


@dataclass(frozen=True)
class Cutout:
    """One picture of one object, with alpha."""

    path: Path
    name: str
    """Class: the name of the folder."""
    instance: str
    """CLASS/NAME without the mark of the view: what must not be in two parts."""


@dataclass(frozen=True)
class Assets:
    """The usable files of one part."""

    cutouts: dict[str, dict[str, list[Cutout]]]
    """Class -> instance -> views."""
    backgrounds: tuple[Path, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes with at least one instance in this part, sorted."""
        return tuple(sorted(self.cutouts))


@dataclass(frozen=True)
class Library:
    """All usable files, and those that were left out with the reason."""

    cutouts: tuple[Cutout, ...]
    backgrounds: tuple[Path, ...]
    left_out: dict[Path, str] = field(default_factory=dict)

    def part(self, part: Part) -> Assets:
        """The files that scenes of this part may show.

        Raises:
            UserError: There are too few files to give this part any.
        """
        cutouts: dict[str, dict[str, list[Cutout]]] = {}
        for name in sorted({cutout.name for cutout in self.cutouts}):
            own = [cutout for cutout in self.cutouts if cutout.name == name]
            parts = split_names(f"{name}/{cutout.instance}" for cutout in own)
            for cutout in own:
                if parts[f"{name}/{cutout.instance}"] == part:
                    cutouts.setdefault(name, {}).setdefault(cutout.instance, []).append(cutout)
        scenery = split_names(f"background/{_stem(path)}" for path in self.backgrounds)
        backgrounds = tuple(path for path in self.backgrounds if scenery[f"background/{_stem(path)}"] == part)
        if not cutouts or not backgrounds:
            lacking = "backgrounds" if cutouts else "cut-outs"
            raise UserError(f"too few {lacking} for the part {part!r}; give at least 3 (of one class)")
        return Assets(cutouts, backgrounds)

    def fingerprint(self) -> str:
        """Hash over names and sizes of all usable files; scenes made of other files are other scenes."""
        paths = [cutout.path for cutout in self.cutouts] + list(self.backgrounds)
        lines = sorted(f"{path.parent.name}/{path.name} {path.stat().st_size}" for path in paths)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def load_library(cutouts: Path | None = None, backgrounds: Path | None = None) -> Library:
    """Look through folders of cut-outs (one folder per class) and of backgrounds; the pack's by default.

    A file that is not the pack's is opened, and left out with the reason if it cannot serve.

    Raises:
        UserError: A folder is missing, or nothing in it is usable.
    """
    # The pack's own files are opened by a test, once for all; that saves seconds in every run.
    open_cutout = read_cutout if cutouts else None
    open_background = read_background if backgrounds else None
    cutouts, backgrounds = cutouts or PACK / "cutouts", backgrounds or PACK / "backgrounds"
    left_out: dict[Path, str] = {}
    objects = tuple(
        Cutout(path, folder.name, f"{folder.name}/{_stem(path)}")
        for folder in sorted(path for path in _listed(cutouts) if path.is_dir())
        for path in _usable(folder, open_cutout, left_out)
    )
    if not objects:
        raise UserError(
            f"{cutouts} holds no usable cut-out{_example(left_out)}; it needs one folder per class "
            "with PNG or WebP pictures that have transparent pixels"
        )
    scenery = tuple(_usable(backgrounds, open_background, left_out))
    if not scenery:
        raise UserError(
            f"{backgrounds} holds no usable picture{_example(left_out)}; put JPEG or PNG files there"
        )
    return Library(objects, scenery, left_out)


@lru_cache(maxsize=2048)
def read_cutout(path: Path) -> Image.Image:
    """Decode a cut-out, RGBA, trimmed to what is visible, at most CUTOUT_LIMIT pixels on its longer side.

    Raises:
        ValueError: No picture, too large, empty or without any transparent pixel.
    """
    image = _open(path)
    if "A" not in image.getbands() and "transparency" not in image.info:
        raise ValueError("has no alpha")
    image = image.convert("RGBA")
    alpha = np.asarray(image.getchannel("A"))
    if alpha.min() > 250:
        raise ValueError("has no transparent pixel")
    visible = alpha > 8
    if min(visible.any(axis=0).sum(), visible.any(axis=1).sum()) < 8:
        raise ValueError("shows less than 8 pixels")
    image = image.crop(bounding_box(visible))
    image.thumbnail((CUTOUT_LIMIT, CUTOUT_LIMIT), Image.Resampling.LANCZOS)
    return image


@lru_cache(maxsize=256)
def read_background(path: Path) -> Image.Image:
    """Decode a background, RGB, at most BACKGROUND_LIMIT pixels on its shorter side.

    Raises:
        ValueError: No picture, too large, or smaller than 64 pixels.
    """
    image = _open(path)
    if min(image.size) < 64:
        raise ValueError(f"is only {image.width} x {image.height} pixels")
    image.draft("RGB", (BACKGROUND_LIMIT, BACKGROUND_LIMIT))
    image = image.convert("RGB")
    scale = BACKGROUND_LIMIT / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        image.draft("RGB", (BACKGROUND_LIMIT, BACKGROUND_LIMIT))
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read ({type(error).__name__})") from None
    return image


def _stem(path: Path) -> str:
    """Name of what a picture shows, without the mark of the view."""
    return path.stem.split(VIEW_MARK)[0]


def bounding_box(mask: NDArray[np.bool_]) -> Box:
    """The least box that holds all that is true of a mask, [h, w]; zeros if nothing is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _usable(
    folder: Path, read: Callable[[Path], Image.Image] | None, left_out: dict[Path, str]
) -> Iterator[Path]:
    for path in _listed(folder):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        try:
            if read is not None:
                read(path)
        except ValueError as error:
            left_out[path] = str(error)
        else:
            yield path


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name an existing one")
    return sorted(folder.iterdir())


def _example(left_out: dict[Path, str]) -> str:
    if not left_out:
        return ""
    path, reason = next(iter(left_out.items()))
    return f" ({len(left_out)} left out, such as {path.name}: {reason})"


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """One of some items, all alike likely."""
    return items[int(rng.integers(len(items)))]


def split_names(names: Iterable[str]) -> dict[str, Part]:
    """Deal the names of one stratum (a class, or all words) to the three parts.

    The names are put in the order of their hashes and parted at the shares, so the parts are the same for any
    order of the files. One name alone trains; of two, one is for test; from three on, every part has one.
    """
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    count = len(ordered)
    test = max(round(TEST_SHARE * count), 1 if count >= 2 else 0)
    val = max(round(VAL_SHARE * count), 1 if count >= 3 else 0)
    cuts: tuple[tuple[Part, int], ...] = (("test", test), ("val", val), ("train", count - test - val))
    return dict(zip(ordered, (part for part, size in cuts for _ in range(size)), strict=True))
