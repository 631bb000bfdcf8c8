"""The measures by name, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.correspondence import correspondence_table
from megaregion.evaluation.encoders import Encoder
from megaregion.evaluation.encoding import SceneFeatures
from megaregion.evaluation.maps import SceneTruth, encode_maps, read_truth
from megaregion.evaluation.measure import Truth
from megaregion.evaluation.ocr import Tokens
from megaregion.evaluation.reading import WordFeatures, reading_table
from megaregion.evaluation.recognition import Labelled, recognition_table
from megaregion.evaluation.retrieval import retrieval_table
from megaregion.evaluation.scenes import RegionTable, Scene
from megaregion.evaluation.segmentation import Mapped, segmentation_table
from megaregion.evaluation.separation import separation_table
from megaregion.evaluation.tables import Table

MEASURES = ("region", "retrieval", "ocr", "correspondence", "segmentation", "separation")
"""All tables, in the order in which they are shown."""
QUICK = ("region", "retrieval", "ocr", "separation")
"""Tables that cost little beside encoding the regions."""
NEED_MAPS = ("correspondence", "segmentation", "separation")
MAPPED_SCENES = 100
"""Most scenes of each split whose maps are kept: they hold every place, not one feature a region."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Material:
    """Everything that was encoded, and by whom."""

    gallery: Truth
    queries: Truth
    encoders: Mapping[str, Encoder]
    """By the name of the row."""
    known: Mapping[str, SceneFeatures]
    """Of the gallery, by the encoder's own name."""
    asked: Mapping[str, SceneFeatures]
    """Of the queries, by the encoder's own name."""
    centers: Mapping[str, NDArray[np.float32] | None]
    """Weights of text heads, by the name of the row."""
    prior: Tokens
    """Most frequent tokens of the training shards; empty without text."""


def tables_of(
    material: Material,
    measures: Sequence[str],
    seeds: int,
    batch: int,
    seconds: dict[str, float],
    progress: Progress = lambda split, done, images: None,
) -> list[Table]:
    """Measure every encoder by every measure that the scenes allow.

    Args:
        material: What was encoded.
        measures: Names out of MEASURES.
        seeds: Draws behind every mean.
        batch: Images that go through an encoder at once.
        seconds: Time spent on maps is added here.
        progress: Told of images as their maps are made.
    """
    own = {row: encoder.name for row, encoder in material.encoders.items()}
    queries = material.queries
    tables: list[Table | None] = []
    if "region" in measures:
        known, asked = (
            {row: _labelled(features[name].objects, truth.objects) for row, name in own.items()}
            for features, truth in ((material.known, material.gallery), (material.asked, queries))
        )
        tables.append(recognition_table(known, asked, seeds))
    if "retrieval" in measures:
        objects = {row: material.asked[name].objects for row, name in own.items()}
        tables.append(retrieval_table(objects, queries.objects))
    if "ocr" in measures and any(queries.tokens) and any(material.gallery.tokens):
        words = {
            row: WordFeatures(
                material.known[name].words,
                material.asked[name].words,
                material.asked[name].word_embeddings,
                material.centers.get(row),
            )
            for row, name in own.items()
        }
        tables.append(reading_table(words, material.gallery, queries, material.prior, seeds))
    if any(measure in measures for measure in NEED_MAPS):
        tables += _map_tables(material, measures, seeds, batch, seconds, progress)
    return [table for table in tables if table is not None]


def _map_tables(
    material: Material,
    measures: Sequence[str],
    seeds: int,
    batch: int,
    seconds: dict[str, float],
    progress: Progress,
) -> list[Table | None]:
    drawn = [_with_masks(truth.scenes) for truth in (material.gallery, material.queries)]
    if not all(scenes for scenes, _ in drawn):
        return []
    total, done = sum(len(scenes) for scenes, _ in drawn), 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress("maps of", done, total)

    parts = []
    for scenes, truths in drawn:
        maps = encode_maps(scenes, list(material.encoders.values()), batch, seconds, count)
        rows = {row: maps[e.name] for row, e in material.encoders.items() if e.name in maps}
        parts.append(Mapped(scenes, truths, rows))
    known, asked = parts
    tables: list[Table | None] = []
    if "correspondence" in measures:
        regions = _by_scene(material, asked.scenes)
        tables.append(correspondence_table(regions, asked.maps, asked.scenes, asked.truths, seeds))
    if "segmentation" in measures:
        tables.append(segmentation_table(known, asked, seeds))
    if "separation" in measures:
        tables.append(separation_table(known, asked))
    return tables


def _with_masks(scenes: Sequence[Scene]) -> tuple[list[Scene], list[SceneTruth]]:
    """The first scenes whose objects all have masks, and their truths."""
    found = [(scene, read_truth(scene)) for scene in scenes[:MAPPED_SCENES] if scene.objects]
    return [scene for scene, truth in found if truth], [truth for _, truth in found if truth]


def _by_scene(material: Material, scenes: Sequence[Scene]) -> dict[str, list[NDArray[np.float32]]]:
    """Features of each scene's regions, objects first, [objects + words, C], by encoder."""
    place = {scene.key: number for number, scene in enumerate(material.queries.scenes)}
    tables = (material.queries.objects, material.queries.words)
    rows = [[np.flatnonzero(table.scene == place[scene.key]) for table in tables] for scene in scenes]
    found = {}
    for row, encoder in material.encoders.items():
        own = material.asked[encoder.name]
        found[row] = [np.concatenate([own.objects[objects], own.words[words]]) for objects, words in rows]
    return found


def _labelled(features: NDArray[np.float32], table: RegionTable) -> Labelled:
    return Labelled(features, table.names, table.instances, table.scene)
