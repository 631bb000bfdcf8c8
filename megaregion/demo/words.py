"""The words that scenes show: ordinary English, and numbers as signs carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaregion.demo.split import Part, split_names
from megaregion.errors import UserError

WORD_FILE = Path(__file__).with_name("words.txt")

NUMBER_SHARE = 0.1
"""Share of the words of a scene that are numbers."""


@dataclass(frozen=True)
class Vocabulary:
    """The words and numbers that one part's scenes may show; words are in lower case."""

    words: tuple[str, ...]
    numbers: tuple[str, ...]

    def draw(self, rng: np.random.Generator) -> str:
        """A random word in the case in which a sign would have it, or a number."""
        if self.numbers and rng.random() < NUMBER_SHARE:
            return self.numbers[int(rng.integers(len(self.numbers)))]
        word = self.words[int(rng.integers(len(self.words)))]
        return (word.upper(), word.capitalize(), word)[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]


def load_vocabulary(part: Part, path: Path = WORD_FILE) -> Vocabulary:
    """The words of one part; no word, in whatever case, is in two parts.

    Args:
        part: Part of the demo.
        path: Text file of words between white space; lines that start with # are comments.

    Raises:
        UserError: The file has too few words to give every part some.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    words = {word.lower() for line in lines if not line.startswith("#") for word in line.split()}
    chosen = _of_part(sorted(words), part)
    if not chosen:
        raise UserError(f"{path} has too few words for the part {part!r}; give it at least 3")
    return Vocabulary(words=chosen, numbers=_of_part(_numbers(), part))


def _of_part(names: Sequence[str], part: Part) -> tuple[str, ...]:
    parts = split_names(names)
    return tuple(name for name in names if parts[name] == part)


def _numbers() -> list[str]:
    """Numbers as they stand on signs: house numbers, years, discounts and times."""
    plain = [str(number) for number in (*range(10, 100), *range(100, 1000, 50), *range(1950, 2030, 5))]
    percents = [f"{number}%" for number in range(10, 100, 5)]
    times = [f"{hour}:{minute:02d}" for hour in range(7, 23) for minute in (15, 30, 45)]
    return plain + percents + times
