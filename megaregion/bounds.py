"""What the value of a setting may be: a number within bounds, a word of some, a line of text.

All bounds are finite, so NaN, infinity and endless counts are refused.
"""

from __future__ import annotations

import argparse
import difflib
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

COUNT = 10**9
"""Greatest count of most things; fits 32 bits with their sign."""
LARGE = 10**18
"""Greatest number of bytes, and of images in a stream; fits 64 bits with their sign."""


class Misfit(ValueError, argparse.ArgumentTypeError):
    """What is wrong with a value; its text goes on from a setting's name, as "must be true or false"."""


class Kind(ABC):
    """What the values of a setting may be."""

    @property
    @abstractmethod
    def told(self) -> str:
        """The values in words, as "a whole number in [1, 1e9]"."""

    @property
    @abstractmethod
    def metavar(self) -> str:
        """What stands for a value in ``--help``."""

    def read(self, value: object) -> Any:
        """The value from a text, or from what JSON holds; bounds are not looked at.

        Raises:
            Misfit: It is of another kind.
        """
        if isinstance(value, str):
            return value
        raise self.misfit(value)

    def check(self, value: Any) -> None:  # noqa: B027 - a kind without bounds takes all of its values
        """Judge a value of this kind.

        Raises:
            Misfit: It is out of bounds.
        """

    def fit(self, value: object) -> Any:
        """What :meth:`read` gives, if :meth:`check` lets it pass; a ``type=`` of argparse."""
        found = self.read(value)
        self.check(found)
        return found

    def misfit(self, value: object, way_out: str = "") -> Misfit:
        """What to raise about a value."""
        return Misfit(f"must be {self.told}, got {shown(value)}{way_out}")


@dataclass(frozen=True)
class Real(Kind):
    """Numbers from ``low`` to ``high``, both included unless ``above`` or ``below`` says otherwise."""

    low: float
    high: float
    metavar: str = "X"
    """Their unit."""
    above: bool = False
    below: bool = False
    zero: str = ""
    """What 0 stands for, where it may be given though it lies outside."""
    advice: str = ""
    """The way out of a refusal, where the bounds do not say it."""

    @property
    def bounds(self) -> str:
        """As "(0, 1]"."""
        first, last = "(" if self.above else "[", ")" if self.below else "]"
        edges = f"{first}{_short(self.low)}, {_short(self.high)}{last}"
        return f"{edges}, or 0 ({self.zero})" if self.zero else edges

    @property
    def told(self) -> str:
        """As "a number in (0, 1]"."""
        return f"a number in {self.bounds}"

    def read(self, value: object) -> float:
        """A float."""
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                return float(value)
        raise self.misfit(value)

    def check(self, value: float) -> None:
        """Judge a number; NaN lies nowhere."""
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        if not (over and under) and not (self.zero and value == 0):
            way_out = f"; {self.advice}" if self.advice else ""
            raise Misfit(f"must lie in {self.bounds}, got {shown(value)}{way_out}")


@dataclass(frozen=True)
class Whole(Real):
    """Whole numbers."""

    metavar: str = "N"
    multiple: int = 1
    """Every value is a multiple of it."""

    @property
    def told(self) -> str:
        """As "a whole number in [1, 1e9]"."""
        kind = f"a multiple of {self.multiple}" if self.multiple > 1 else "a whole number"
        return f"{kind} in {self.bounds}"

    def read(self, value: object) -> int:
        """An int; a text may also write it as 1_000 or 1e9."""
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            with suppress(ValueError):
                return int(value)
            with suppress(ValueError, OverflowError):
                if float(value).is_integer():
                    return int(float(value))
        raise self.misfit(value)

    def check(self, value: float) -> None:
        """Judge a number."""
        super().check(value)
        if value % self.multiple:
            near = max(self.multiple, round(value / self.multiple) * self.multiple)
            raise self.misfit(value, f"; use {near}")


@dataclass(frozen=True)
class Text(Kind):
    """One line of text."""

    metavar: str = "TEXT"
    empty: bool = True
    """Whether it may be empty."""
    folder: bool = False
    """Whether it is the name of one folder, that leads nowhere else."""

    @property
    def told(self) -> str:
        """As "a line of text"."""
        return "a folder's name" if self.folder else "a line of text"

    def check(self, value: str) -> None:
        """Judge a text: control characters would break the lines and files that it enters."""
        if not value and not self.empty:
            raise Misfit(f"must not be empty; give a {self.metavar.lower()}")
        unreadable = any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in value)
        if unreadable or (self.folder and ("/" in value or value in (".", "..") or len(value) > 100)):
            raise self.misfit(value)


@dataclass(frozen=True)
class Weighted(Text):
    """Places with weights in one line, as a=2,b=1; or one place alone."""

    metavar: str = "PATH"
    empty: bool = False

    @property
    def told(self) -> str:
        """As the other kinds."""
        return "a path, or several with weights as a=2,b=1"

    def read(self, value: object) -> str:
        """The line; a list holds paths or {path, weight}, of weight 1 where none is given."""
        if not isinstance(value, (list, tuple)):
            return super().read(value)
        parts = [one if isinstance(one, dict) else {"path": one} for one in value]
        if not parts or not all({"path"} <= part.keys() <= {"path", "weight"} for part in parts):
            raise self.misfit(value, "; each is a path, or {path: PATH, weight: NUMBER}")
        line = ",".join(f"{part['path']}={part.get('weight', 1)}" for part in parts)
        if len(weighted(line)) != len(parts):
            raise self.misfit(value, "; a weight is a number above 0")
        return line if len(parts) > 1 else str(parts[0]["path"])

    def check(self, value: str) -> None:
        """Judge paths and weights."""
        super().check(value)
        parts = weighted(value)
        paths = [path for path, _ in parts]
        if not all(0 < weight <= COUNT for _, weight in parts):
            raise self.misfit(value, f"; weights lie in (0, {COUNT:.0e}]".replace("e+0", "e"))
        if twice := {path for path in paths if paths.count(path) > 1}:
            raise self.misfit(value, f"; it names {min(twice)} twice")


def weighted(line: str) -> list[tuple[str, Fraction]]:
    """Places and weights of a :class:`Weighted`; a line that is no list of two or more is one place."""
    part = r"(.+?)=(\d+(?:\.\d+)?)"
    if not re.fullmatch(rf"{part}(?:,{part})+", line):
        return [(line, Fraction(1))]
    return [(path, Fraction(weight)) for path, weight in re.findall(rf"{part}(?:,|$)", line)]


class Switch(Kind):
    """On or off."""

    told = "true or false"
    metavar = "{true,false}"

    def read(self, value: object) -> bool:
        """A bool."""
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        known = value if isinstance(value, bool) else words.get(str(value).lower())
        if known is None:
            raise self.misfit(value)
        return known


@dataclass(frozen=True)
class Located(Kind):
    """Files and folders of this machine."""

    metavar: str = "PATH"
    told = "a path"

    def read(self, value: object) -> Path:
        """A path; an empty one would be the folder that one stands in."""
        if not value:
            raise Misfit("must not be empty; give a path")
        return Path(super().read(value))


@dataclass(frozen=True)
class Choice(Kind):
    """One of some words."""

    words: tuple[str, ...]

    @property
    def told(self) -> str:
        """The words."""
        return " or ".join(self.words)

    @property
    def metavar(self) -> str:
        """The words, as argparse lists them."""
        return f"{{{','.join(self.words)}}}"

    def check(self, value: str) -> None:
        """Judge a word."""
        if value not in self.words:
            raise self.misfit(value, did_you_mean(value, self.words))


@dataclass(frozen=True)
class Several(Kind):
    """Values of one kind: ``count`` of them, or one and more."""

    item: Kind
    count: int | None = None

    @property
    def told(self) -> str:
        """As "2 values, each a number in [0, 1]"."""
        return f"{self.count or 'one or more'} values, each {self.item.told}"

    @property
    def metavar(self) -> str:
        """That of an item."""
        return self.item.metavar

    def read(self, value: object) -> tuple[Any, ...]:
        """A tuple; a text holds the items between commas, in brackets or without."""
        if isinstance(value, str):
            value = [part.strip() for part in value.strip().removeprefix("[").removesuffix("]").split(",")]
        if not isinstance(value, (list, tuple)):
            raise self.misfit(value)
        return tuple(self.item.read(one) for one in value)

    def check(self, value: tuple[Any, ...]) -> None:
        """Judge every item, and their number."""
        if len(value) != (self.count or max(1, len(value))):
            raise self.misfit(list(value))
        for one in value:
            self.item.check(one)


def kind_of(annotation: Any) -> Kind:
    """What the values of a type may be; a :class:`Kind` is one itself.

    Raises:
        TypeError: A number without bounds, or a type that no setting may have.
    """
    if isinstance(annotation, Kind):
        return annotation
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated and isinstance(inner[1], Kind):
        return inner[1]
    if origin is Literal:
        return Choice(inner)
    if origin is tuple:
        return Several(kind_of(inner[0]), None if inner[-1] is Ellipsis else len(inner))
    if annotation in (bool, str):
        return Switch() if annotation is bool else Text()
    raise TypeError(
        f"{annotation} is no type of a setting; a number has bounds, as megaregion.settings.Share"
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word as a question, or nothing; of keys with dots the last part may be near, too."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not near:
        last = {key.rpartition(".")[2]: key for key in known}
        found = difflib.get_close_matches(word.rpartition(".")[2], last, n=1, cutoff=0.5)
        near = [last[part] for part in found]
    return f"; did you mean {near[0]}?" if near else ""


def shown(value: object) -> str:
    """A value in a line of text, cut where it is long."""
    text = str(value)
    text = text if text.isprintable() and text.strip() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _short(number: float) -> str:
    """A bound, as 0.5 or 1e9."""
    text = f"{number:.12g}"
    if number >= 10**6 and not number % 10**6:
        text = f"{number:.0e}" if float(f"{number:.0e}") == number else text
    return text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


# Types of fields.

PositiveInt = Annotated[int, Whole(1, COUNT)]
Count = Annotated[int, Whole(0, COUNT)]
Steps = Annotated[int, Whole(1, COUNT, "STEPS")]
Images = Annotated[int, Whole(1, COUNT, "IMAGES")]
Pixels = Annotated[int, Whole(1, 16_384, "PX")]
Bytes = Annotated[int, Whole(1, LARGE, "BYTES")]
Workers = Annotated[int, Whole(0, 1024)]
"""Processes or threads beside this one; with 0 it does the work itself."""
Seed = Annotated[int, Whole(0, 2**31 - 1, "SEED")]

Positive = Annotated[float, Real(0, COUNT, above=True)]
NonNegative = Annotated[float, Real(0, COUNT)]
Share = Annotated[float, Real(0, 1, "SHARE")]
PositiveShare = Annotated[float, Real(0, 1, "SHARE", above=True)]
Seconds = Annotated[float, Real(0, 10**7, "SECONDS")]

FolderName = Annotated[str, Text("NAME", empty=False, folder=True)]
Place = Annotated[str, Text("PATH", empty=False)]
"""Where something lies: a folder, file or URL."""
OptionalPlace = Annotated[str, Text("PATH")]

Folder = Annotated[Path, Located("FOLDER")]
File = Annotated[Path, Located("FILE")]
