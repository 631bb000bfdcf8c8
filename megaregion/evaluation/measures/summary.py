"""The summary: every encoder on held-out regions beside training regions, with all of the gallery.

Two numbers stand side by side:

- held out: regions of scenes never trained on, whose cut-outs no gallery holds;
- train: the gallery's regions against the gallery itself, each without the regions of its own scene. The
  same cut-out stands in other training scenes and stays in: a network that has merely memorised its cut-outs
  scores high here and low on the test. The gap between the two is the memorising.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megaregion.evaluation.classifiers import Neighbours, nearest, vote
from megaregion.evaluation.encoders import PIXELS
from megaregion.evaluation.encoding import EncodedScenes, SceneFeatures
from megaregion.evaluation.estimates import share
from megaregion.evaluation.measures.reading import judged, neighbour_tokens, prior_share, word_recall
from megaregion.evaluation.measures.recognition import majority_share
from megaregion.evaluation.scenes import RegionTable, Truth
from megaregion.evaluation.vocabulary import TOP, Tokens
from megaregion.schemas.evaluation import SUMMARY, Estimate, Table, summary_columns


@dataclass(frozen=True)
class Answers:
    """What one encoder answers about each held-out region."""

    neighbours: Neighbours
    """Of the held-out objects, rows of the gallery's objects."""
    named: list[str]
    """Class given to each held-out object by its neighbours."""
    read: list[Tokens] | None
    """The five tokens that the text head names for each held-out word; None without a text head."""


def answer(known: SceneFeatures, asked: SceneFeatures, gallery: Truth) -> Answers:
    """Ask one encoder about each held-out region."""
    neighbours = nearest(asked.objects, known.objects)
    read = None if asked.read is None else [tokens[:TOP] for tokens in asked.read]
    return Answers(neighbours, vote(neighbours, gallery.objects.names), read)


def summary_table(
    known: EncodedScenes,
    asked: EncodedScenes,
    answers: Mapping[str, Answers],
    prior: Tokens,
    split: str,
    notes: Mapping[str, str],
) -> Table:
    """Measure every encoder that has answered.

    Args:
        known: Training scenes.
        asked: Held-out scenes.
        answers: By encoder.
        prior: The most frequent tokens of the training shards.
        split: Name of the held-out split.
        notes: Further words on an encoder's row.
    """
    gallery, queries = known.truth, asked.truth
    columns = summary_columns(
        split,
        majority_share(gallery.objects.names, queries.objects.names),
        prior_share(prior, queries, word_recall),
    )
    rows = {
        name: _row(own, known.features[name], asked.features[name], gallery, queries)
        for name, own in answers.items()
    }
    told = (
        f"{len(queries.objects):,} objects and {len(queries.words):,} words of {len(queries.scenes):,} "
        f"{split} scenes against {len(gallery.objects):,} objects and {len(gallery.words):,} words of "
        f"{len(gallery.scenes):,} training scenes. Train: the gallery against itself without the own scene; "
        "the same cut-outs stand in other scenes."
    )
    if PIXELS in rows:
        told += f" {PIXELS.capitalize()}: the better of two forms ({notes[PIXELS]})."
    return Table(
        SUMMARY,
        "Test beside train",
        told,
        columns,
        rows,
        "most frequent",
        {name: notes[name] for name in rows if name in notes},
    )


def _row(
    answers: Answers, known: SceneFeatures, asked: SceneFeatures, gallery: Truth, queries: Truth
) -> dict[str, Estimate | None]:
    own, met = gallery.objects.scene, gallery.words.scene
    within = vote(nearest(known.objects, known.objects, own, own), gallery.objects.names)
    by_words = neighbour_tokens(nearest(asked.words, known.words), gallery.tokens)
    words_within = neighbour_tokens(nearest(known.words, known.words, met, met), gallery.tokens)
    read = {
        "ocr_recall_at_5": (asked.read, queries),
        "ocr_train_recall_at_5": (known.read, gallery),
        "ocr_knn_recall_at_5": (by_words, queries),
        "ocr_knn_train_recall_at_5": (words_within, gallery),
    }
    return {
        "region_knn": named_right(answers.named, queries.objects),
        "region_knn_train": named_right(within, gallery.objects),
        **{key: judged([own] if own else [], truth, word_recall) for key, (own, truth) in read.items()},
    }


def named_right(named: Sequence[str], objects: RegionTable) -> Estimate | None:
    """Accuracy of the names given to objects, with the cut-outs as groups."""
    return share(np.asarray(named) == np.asarray(objects.names), objects.instances)
