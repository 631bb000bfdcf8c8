"""OCR token recall@5: does an encoder's feature of a word tell which tokens the word is made of?

The gold tokens of a word are the positives that curation would give it (megaregion.data.info). Five
tokens are predicted; recall = |predicted and gold| / |gold|, averaged over words. A word of more than five
tokens cannot reach 1: the plain definition, kept because it flatters nobody. Three predictors:

- the text head: the five text classes whose centers are most similar to the projected region embedding;
- neighbours: the five tokens most often held by the five most similar training words, for any encoder;
- the prior: the five most frequent tokens of the training shards for every word, the honest baseline.

Shapes: R words, E embedding width, V text classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.knn import Neighbours, largest

TOP = 5
"""Tokens that a predictor may name."""

Tokens = tuple[int, ...]


def recall(predicted: Sequence[Tokens], gold: Sequence[Tokens]) -> float | None:
    """Mean share of the gold tokens that were predicted.

    Args:
        predicted: Tokens named for each word, R of them.
        gold: True tokens of each word; a word without any is left out.

    Returns:
        Recall in [0, 1]; None when no word has gold tokens.
    """
    shares = [word_recall(named, true) for named, true in zip(predicted, gold, strict=True) if true]
    return float(np.mean(shares)) if shares else None


def word_recall(named: Tokens, true: Tokens) -> float:
    """Share of a word's tokens among the first five named."""
    return len(set(named[:TOP]) & set(true)) / len(set(true))


def exact(predicted: Sequence[Tokens], gold: Sequence[Tokens]) -> float | None:
    """Share of words that were named exactly; arguments and None as in :func:`recall`."""
    verdicts = [is_exact(named, true) for named, true in zip(predicted, gold, strict=True) if true]
    return float(np.mean(verdicts)) if verdicts else None


def is_exact(named: Tokens, true: Tokens) -> bool:
    """Whether the first tokens named, as many as the word has, are the word's tokens in any order."""
    return set(named[: len(set(true))]) == set(true)


def head_tokens(
    embeddings: NDArray[np.float32], centers: NDArray[np.float32], count: int = TOP
) -> list[Tokens]:
    """Name the tokens whose class centers are most similar to each embedding.

    Args:
        embeddings: Projected region embeddings, [R, E].
        centers: Weight of the text head, [V, E].
        count: Tokens named.

    Returns:
        That many tokens of each word, most similar first.
    """
    # The embeddings' own norms do not change which centers are nearest.
    unit = centers / np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-12)
    return [tuple(row) for row in largest(embeddings @ unit.T, count).tolist()]


def neighbour_tokens(neighbours: Neighbours, gallery: Sequence[Tokens], count: int = TOP) -> list[Tokens]:
    """Name the tokens that most of a word's nearest training words hold; ties go to the more similar.

    Args:
        neighbours: Nearest training words of R words.
        gallery: True tokens of each training word.
        count: Most tokens named.

    Returns:
        At most that many tokens of each word, most votes first.
    """
    named = []
    for row, similarity in zip(neighbours.index, neighbours.similarity, strict=True):
        votes: dict[int, tuple[int, float]] = {}
        for i, cosine in zip(row, similarity, strict=True):
            for token in gallery[i] if i >= 0 else ():
                votes_so_far, total = votes.get(token, (0, 0.0))
                votes[token] = (votes_so_far + 1, total + float(cosine))
        named.append(tuple(sorted(votes, key=lambda token: votes[token], reverse=True)[:count]))
    return named


def frequent_tokens(regions: Iterable[Tokens]) -> Tokens:
    """The five tokens that most training regions hold; of equally frequent ones, the smaller ids.

    Args:
        regions: Distinct tokens of each training text region.
    """
    counts = Counter(token for tokens in regions for token in tokens)
    return tuple(sorted(counts, key=lambda token: (-counts[token], token))[:TOP])
