"""OCR of regions: how many of a word's tokens an encoder names, and how many words it names exactly.

Token recall is that of ocr.py, among five tokens. A word is exact if its tokens, all of them, are just the
first ones that were named: as many as the word has, so that a longer word is harder and chance is nil.

Shapes: R words, V text classes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation import knn, ocr
from megaregion.evaluation.estimates import Estimate, share
from megaregion.evaluation.measure import Truth
from megaregion.evaluation.recognition import draw_scenes
from megaregion.evaluation.tables import Column, Table

NEIGHBOUR_TOKENS = 32
"""Tokens that a vote of the neighbours may name; no word has as many."""


@dataclass(frozen=True)
class WordFeatures:
    """What one encoder says of the words of both splits."""

    known: NDArray[np.float32]
    """Training words, [R, C]."""
    asked: NDArray[np.float32]
    """Held-out words, [R, C]."""
    embeddings: NDArray[np.float32] | None = None
    """Of the held-out words, [R, E]; None for an encoder without heads."""
    centers: NDArray[np.float32] | None = None
    """Weight of the text head, [V, E]; None without one."""


def reading_table(
    features: Mapping[str, WordFeatures], gallery: Truth, queries: Truth, prior: ocr.Tokens, seeds: int
) -> Table:
    """Measure every encoder.

    Args:
        features: By encoder.
        gallery: Training scenes.
        queries: Held-out scenes.
        prior: The most frequent tokens of the training shards, most frequent first.
        seeds: Galleries drawn for the vote of the neighbours.
    """
    gold = queries.tokens
    always = [prior] * len(gold)
    recall = ocr.recall(always, gold)
    exact = ocr.exact(always, gold)
    columns = (
        Column("head_recall", "tokens, text head", recall),
        Column("head_exact", "exact words, text head", exact),
        Column("knn_recall", f"tokens, {knn.NEIGHBOURS}-NN", recall),
        Column("knn_exact", f"exact words, {knn.NEIGHBOURS}-NN", exact),
    )
    told = (
        f"{len(gold):,} words of held-out scenes: recall of their tokens among five named ones, and the "
        "share of "
        f"words whose tokens are exactly the first ones named; by the text head, and by a vote of the "
        "nearest of "
        f"{len(gallery.words):,} training words (mean over {seeds} galleries)."
    )
    rows = {name: _row(own, gallery, queries, seeds) for name, own in features.items()}
    return Table("ocr", "Reading regions", told, columns, rows, "most frequent tokens")


def _row(own: WordFeatures, gallery: Truth, queries: Truth, seeds: int) -> tuple[Estimate | None, ...]:
    longest = max((len(tokens) for tokens in queries.tokens), default=0)
    by_head: list[list[ocr.Tokens]] = []
    if own.centers is not None and own.embeddings is not None and len(own.asked):
        by_head.append(ocr.head_tokens(own.embeddings, own.centers, max(ocr.TOP, longest)))
    by_words = []
    for seed in range(seeds):
        rows = np.flatnonzero(draw_scenes(gallery.words.scene, seed, seeds))
        tokens = [gallery.tokens[row] for row in rows]
        neighbours = knn.nearest(own.asked, own.known[rows])
        by_words.append(ocr.neighbour_tokens(neighbours, tokens, NEIGHBOUR_TOKENS))
    return (*_verdicts(by_head, queries), *_verdicts(by_words, queries))


def _verdicts(named: Sequence[Sequence[ocr.Tokens]], queries: Truth) -> tuple[Estimate | None, ...]:
    """Token recall and exact words of what was named under each seed."""
    rows = [row for row, tokens in enumerate(queries.tokens) if tokens]
    if not named or not rows:
        return None, None
    gold = [queries.tokens[row] for row in rows]
    words = [queries.words.names[row] for row in rows]
    shares = [
        [ocr.word_recall(each[row], true) for row, true in zip(rows, gold, strict=True)] for each in named
    ]
    exact = [[ocr.is_exact(each[row], true) for row, true in zip(rows, gold, strict=True)] for each in named]
    return share(np.asarray(shares, np.float64), words), share(np.asarray(exact, np.float64), words)
