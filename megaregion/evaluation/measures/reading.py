"""OCR of regions: how many of a word's tokens an encoder names, and how many words it names exactly.

Gold tokens are the positives that curation would give the word. Recall is the share of them among five named
tokens; a word of more than five cannot reach 1, which flatters nobody. A word is exact if the first tokens
named, as many as it has, are its own: longer words are harder, chance is nil. Tokens are named by

- the text head: the classes whose centers are most similar to the projected region embedding;
- neighbours: the tokens most often held by the five most similar training words, for any encoder;
- the prior: the five most frequent tokens of the training shards for every word, the honest baseline.

Two more tables part the recall by the length of a word, and by how many training regions hold a token:
whoever names frequent tokens alone is found out by the rare ones.

Shapes: S seeds, R words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megaregion.evaluation.classifiers import NEIGHBOURS, ballots, nearest
from megaregion.evaluation.encoders import Floats
from megaregion.evaluation.encoding import EncodedScenes
from megaregion.evaluation.measures import share
from megaregion.evaluation.measures.recognition import draw_scenes
from megaregion.evaluation.scenes import TOP, Tokens, Truth, Vocabulary
from megaregion.schemas.evaluation import Column, Estimate, Table

Verdict = Callable[[Tokens, Tokens], float]
"""From the tokens named for a word and the gold tokens that are asked for to a share in 0..1."""
Asked = Sequence[tuple[int, Tokens]]
"""Words by their row, and which of their gold tokens are asked for."""
Named = Mapping[str, Mapping[str, Sequence[Sequence[Tokens]]]]
"""By encoder, then by NAMERS: the tokens named for each word, S x R; nothing where it cannot name."""

NAMERS = {"head": "text head", "knn": f"{NEIGHBOURS}-NN"}
LENGTHS = (1, 4, 6, 8)
"""Fewest letters of a word in each column."""
FREQUENCIES = (0, 1, 10, 100, 1_000, 10_000)
"""Fewest training regions that hold a token in each column."""


class Question(NamedTuple):
    """A column under every namer."""

    key: str
    title: str
    verdict: Verdict
    asked: Asked
    unit: str = ""
    """What the title counts."""


def reading_tables(
    known: EncodedScenes, asked: EncodedScenes, vocabulary: Vocabulary | None, seeds: int
) -> tuple[Table, ...]:
    """Measure every encoder, and the prior of the vocabulary; none where a split has no word with tokens."""
    gallery, queries = known.truth, asked.truth
    if vocabulary is None or not any(gallery.tokens) or not any(queries.tokens):
        return ()
    words = _whole_words(queries)
    told = (
        f"{len(queries.tokens):,} words of held-out scenes: recall of their tokens among five named ones, "
        "and the share of words whose tokens are exactly the first ones named; by the text head, and by a "
        f"vote of the nearest of {len(gallery.words):,} training words (mean over {seeds} galleries)."
    )
    by_length = "Recall of a word's tokens among five named ones, by how many letters the word has."
    by_frequency = (
        "Recall of single tokens among the five that are named for their word, by how many text regions of "
        f"{vocabulary.counted:,} training samples hold them."
    )
    named = _named(known, asked, seeds)

    def table(key: str, title: str, told: str, *questions: Question) -> Table:
        columns, rows = [], {encoder: dict[str, Estimate | None]() for encoder in named}
        for by, namer in NAMERS.items():
            for own, head, verdict, part, unit in questions:
                chance = prior_share(vocabulary.prior, queries, verdict, part)
                columns.append(Column(f"{by}_{own}", head, chance, f"{unit}, {namer}" if unit else namer))
                for encoder, each in named.items():
                    rows[encoder][f"{by}_{own}"] = judged(each[by], queries, verdict, part)
        return Table(key, title, told, tuple(columns), rows, "most frequent tokens")

    recall = Question("recall", "tokens", word_recall, words)
    exact = Question("exact", "exact words", is_exact, words)
    return (
        table("ocr", "Reading regions", told, recall, exact),
        table("ocr_length", "Reading by length", by_length, *_by_length(queries, words)),
        table(
            "ocr_frequency", "Reading by frequency", by_frequency, *_by_frequency(words, vocabulary.counts)
        ),
    )


def _named(known: EncodedScenes, asked: EncodedScenes, seeds: int) -> Named:
    gallery = known.truth
    drawn = [np.flatnonzero(draw_scenes(gallery.words.scene, seed, seeds)) for seed in range(seeds)]
    held = [[gallery.tokens[row] for row in rows] for rows in drawn]

    def by_neighbours(encoder: str, words: Floats) -> list[list[Tokens]]:
        own = known.features[encoder].words
        return [ballots(nearest(words, own[rows]), tokens) for rows, tokens in zip(drawn, held, strict=True)]

    return {
        name: {"head": [own.read] if own.read else [], "knn": by_neighbours(name, own.words)}
        for name, own in asked.features.items()
    }


def _by_length(truth: Truth, words: Asked) -> Iterator[Question]:
    yield from _parts(words, [len(truth.words.names[row]) for row, _ in words], LENGTHS, "letters")


def _by_frequency(words: Asked, counts: Mapping[int, int]) -> Iterator[Question]:
    single = [(row, (token,)) for row, tokens in words for token in tokens]
    yield from _parts(single, [counts.get(token, 0) for _, (token,) in single], FREQUENCIES, "regions")


def _parts(asked: Asked, sizes: Sequence[int], least: Sequence[int], unit: str) -> Iterator[Question]:
    """What is asked by the size of each; a part that holds nothing is left out."""
    place = np.searchsorted(least, sizes, side="right") - 1
    for part, low in enumerate(least):
        inside = [own for own, its in zip(asked, place, strict=True) if its == part]
        most = least[part + 1] - 1 if part + 1 < len(least) else None
        size = f"{low:,} or more" if most is None else f"{low:,} to {most:,}" if most > low else f"{low:,}"
        if inside:
            yield Question(f"{unit}_{low}", size, word_recall, inside, unit)


# ---- verdicts --------------------------------------------------------------------------------------


def judged(
    named: Sequence[Sequence[Tokens]], truth: Truth, verdict: Verdict, asked: Asked | None = None
) -> Estimate | None:
    """Mean verdict over what is asked, with equal words as groups, of S x R named tokens.

    By default the words that have tokens are asked, each for all of them. None if nothing was named or asked.
    """
    asked = _whole_words(truth) if asked is None else asked
    if not named or not asked:
        return None
    verdicts = [[verdict(each[row], tokens) for row, tokens in asked] for each in named]
    return share(np.asarray(verdicts, np.float64), [truth.words.names[row] for row, _ in asked])


def prior_share(prior: Tokens, truth: Truth, verdict: Verdict, asked: Asked | None = None) -> float | None:
    """Mean verdict of naming the prior for all that is asked, as in `judged`; None if nothing is."""
    verdicts = [verdict(prior, tokens) for _, tokens in (_whole_words(truth) if asked is None else asked)]
    return float(np.mean(verdicts)) if verdicts else None


def _whole_words(truth: Truth) -> Asked:
    """The words that have tokens, each asked for all of them."""
    return [(row, tokens) for row, tokens in enumerate(truth.tokens) if tokens]


def word_recall(named: Tokens, true: Tokens) -> float:
    """Share of the true tokens among the first five named."""
    return len(set(named[:TOP]) & set(true)) / len(set(true))


def is_exact(named: Tokens, true: Tokens) -> bool:
    """Whether the first tokens named, as many as the word has, are the word's tokens in any order."""
    return set(named[: len(set(true))]) == set(true)
