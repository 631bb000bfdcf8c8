"""OCR of regions: how many of a word's tokens an encoder names, and how many words it names exactly.

Gold tokens are the positives that curation would give the word. Recall is the share of them among five named
tokens; a word of more than five cannot reach 1, which flatters nobody. A word is exact if the first tokens
named, as many as it has, are its own: longer words are harder, chance is nil. Tokens are named by

- the text head: the classes whose centers are most similar to the projected region embedding;
- neighbours: the tokens most often held by the five most similar training words, for any encoder;
- the prior: the five most frequent tokens of the training shards for every word, the honest baseline.

Shapes: S seeds, R words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megaregion.evaluation.classifiers import NEIGHBOURS, ballots, nearest
from megaregion.evaluation.encoding import EncodedScenes
from megaregion.evaluation.measures import share
from megaregion.evaluation.measures.recognition import draw_scenes
from megaregion.evaluation.scenes import TOP, Tokens, Truth
from megaregion.schemas.evaluation import Column, Estimate, Table

Verdict = Callable[[Tokens, Tokens], float]
"""From the tokens named for a word and its gold tokens to a share in 0..1."""


def reading_table(known: EncodedScenes, asked: EncodedScenes, prior: Tokens, seeds: int) -> Table | None:
    """Measure every encoder, and ``prior``; None where a split has no word with tokens."""
    gallery, queries = known.truth, asked.truth
    if not any(gallery.tokens) or not any(queries.tokens):
        return None
    told = (
        f"{len(queries.tokens):,} words of held-out scenes: recall of their tokens among five named ones, "
        "and the share of words whose tokens are exactly the first ones named; by the text head, and by a "
        f"vote of the nearest of {len(gallery.words):,} training words (mean over {seeds} galleries)."
    )
    namers = (("head", "text head"), ("knn", f"{NEIGHBOURS}-NN"))
    verdicts = (("recall", "tokens", word_recall), ("exact", "exact words", is_exact))
    columns = tuple(
        Column(f"{by}_{key}", f"{title}, {namer}", prior_share(prior, queries, verdict))
        for by, namer in namers
        for key, title, verdict in verdicts
    )
    rows = {}
    for name, own in asked.features.items():
        named: dict[str, list[Sequence[Tokens]]] = {"head": [own.read] if own.read else [], "knn": []}
        for seed in range(seeds):
            drawn = np.flatnonzero(draw_scenes(gallery.words.scene, seed, seeds))
            neighbours = nearest(own.words, known.features[name].words[drawn])
            named["knn"].append(ballots(neighbours, [gallery.tokens[row] for row in drawn]))
        rows[name] = {
            f"{by}_{key}": judged(named[by], queries, verdict)
            for by, _ in namers
            for key, _, verdict in verdicts
        }
    return Table("ocr", "Reading regions", told, columns, rows, "most frequent tokens")


def judged(named: Sequence[Sequence[Tokens]], truth: Truth, verdict: Verdict) -> Estimate | None:
    """Mean verdict over the words that have tokens, with equal words as groups, of S x R named tokens.

    None if nothing was named, or no word has tokens.
    """
    rows = [row for row, tokens in enumerate(truth.tokens) if tokens]
    if not named or not rows:
        return None
    verdicts = [[verdict(each[row], truth.tokens[row]) for row in rows] for each in named]
    return share(np.asarray(verdicts, np.float64), [truth.words.names[row] for row in rows])


def prior_share(prior: Tokens, truth: Truth, verdict: Verdict) -> float | None:
    """Mean verdict of naming the prior for every word; None if no word has tokens."""
    verdicts = [verdict(prior, tokens) for tokens in truth.tokens if tokens]
    return float(np.mean(verdicts)) if verdicts else None


def word_recall(named: Tokens, true: Tokens) -> float:
    """Share of a word's tokens among the first five named."""
    return len(set(named[:TOP]) & set(true)) / len(set(true))


def is_exact(named: Tokens, true: Tokens) -> bool:
    """Whether the first tokens named, as many as the word has, are the word's tokens in any order."""
    return set(named[: len(set(true))]) == set(true)
