"""From features to numbers: each encoder's k-NN accuracy and OCR recall, train beside test.

Shapes: as in encoding.py; V text classes, E embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megaregion.errors import UserError
from megaregion.evaluation import knn, ocr
from megaregion.evaluation.encoding import SceneFeatures
from megaregion.evaluation.scenes import RegionTable, Scene, object_table, word_table


@dataclass(frozen=True)
class Truth:
    """What is known of the scenes of one split, and the gold tokens of its words."""

    scenes: Sequence[Scene]
    tokens: tuple[ocr.Tokens, ...]
    """Gold tokens of each word, in the order of ``words``; all empty without a tokenizer."""

    @cached_property
    def objects(self) -> RegionTable:
        """All objects, n rows."""
        return object_table(self.scenes)

    @cached_property
    def words(self) -> RegionTable:
        """All words, m rows."""
        return word_table(self.scenes)


@dataclass(frozen=True)
class Row:
    """One line of the table; shares in 0..1, None where an encoder cannot say or there is no text."""

    encoder: str
    region_knn: float
    """5-NN accuracy of the held-out objects."""
    region_knn_interval: tuple[float, float]
    """Its 95% interval over other held-out cut-outs."""
    region_knn_train: float
    """5-NN accuracy of the gallery's objects, each without its own scene."""
    ocr_recall_at_5: float | None
    """Token recall of the text head on held-out words."""
    ocr_train_recall_at_5: float | None
    """Token recall of the text head on training words."""
    ocr_knn_recall_at_5: float | None
    """Token recall of a vote of the nearest training words, on held-out words."""
    ocr_knn_train_recall_at_5: float | None
    """The same on training words, each without its own scene."""
    ocr_prior: float | None
    """Token recall of the five most frequent training tokens, on held-out words."""
    variant: str | None = None
    """Which form of the baseline was the best, and so stands here."""


@dataclass(frozen=True)
class Judgement:
    """One encoder's row, and what it is made of."""

    row: Row
    neighbours: knn.Neighbours
    """Of the held-out objects, rows of the gallery's objects."""
    predicted: list[str]
    """Class given to each held-out object."""
    read: list[ocr.Tokens] | None
    """Tokens that the text head named for each held-out word."""


def judge(
    name: str,
    gallery: Truth,
    queries: Truth,
    features: tuple[SceneFeatures, SceneFeatures],
    prior: ocr.Tokens,
    centers: NDArray[np.float32] | None = None,
) -> Judgement:
    """Measure one encoder.

    Args:
        name: Name of the row.
        gallery: Training scenes.
        queries: Held-out scenes.
        features: The encoder's features of gallery and queries.
        prior: The five most frequent tokens of the training shards.
        centers: Weight of the encoder's text head, [V, E]; None without one.

    Raises:
        UserError: A feature is not finite.
    """
    known, asked = features
    for part in (known.objects, known.words, asked.objects, asked.words):
        if not np.isfinite(part).all():
            raise UserError(f"encoder {name} gives features that are not finite; the run has diverged")
    own, met = gallery.objects.scene, gallery.words.scene
    neighbours = knn.nearest(asked.objects, known.objects)
    predicted = knn.vote(neighbours, gallery.objects.names)
    within = knn.vote(knn.nearest(known.objects, known.objects, own, own), gallery.objects.names)
    by_words = ocr.neighbour_tokens(knn.nearest(asked.words, known.words), gallery.tokens)
    words_within = ocr.neighbour_tokens(knn.nearest(known.words, known.words, met, met), gallery.tokens)
    read = _read(asked, centers)
    read_train = _read(known, centers)
    row = Row(
        encoder=name,
        region_knn=knn.accuracy(predicted, queries.objects.names),
        region_knn_interval=knn.interval(predicted, queries.objects.names, queries.objects.instances),
        region_knn_train=knn.accuracy(within, gallery.objects.names),
        ocr_recall_at_5=ocr.recall(read, queries.tokens) if read else None,
        ocr_train_recall_at_5=ocr.recall(read_train, gallery.tokens) if read_train else None,
        ocr_knn_recall_at_5=ocr.recall(by_words, queries.tokens),
        ocr_knn_train_recall_at_5=ocr.recall(words_within, gallery.tokens),
        ocr_prior=ocr.recall([prior] * len(queries.tokens), queries.tokens),
    )
    return Judgement(row, neighbours, predicted, read)


def majority_share(gallery: RegionTable, queries: RegionTable) -> float:
    """Accuracy of always naming the gallery's most frequent class: what k-NN must beat to say anything."""
    common = Counter(gallery.names).most_common(1)[0][0]
    return knn.accuracy([common] * len(queries), queries.names)


def _read(features: SceneFeatures, centers: NDArray[np.float32] | None) -> list[ocr.Tokens] | None:
    if centers is None or features.word_embeddings is None or not len(features.words):
        return None
    return ocr.head_tokens(features.word_embeddings, centers)
