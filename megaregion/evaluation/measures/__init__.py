"""The measures by name: each makes a table of what encoders say of the scenes, judged by their truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.encoders import Encoder
from megaregion.evaluation.encoding import EncodedScenes, MappedScenes, Progress, counter, encode_maps
from megaregion.evaluation.measures.correspondence import correspondence_table
from megaregion.evaluation.measures.reading import reading_table
from megaregion.evaluation.measures.recognition import recognition_table
from megaregion.evaluation.measures.retrieval import retrieval_table
from megaregion.evaluation.measures.segmentation import segmentation_table
from megaregion.evaluation.measures.separation import separation_table
from megaregion.evaluation.scenes import Scene, TruthMap, truth_map
from megaregion.evaluation.vocabulary import Tokens
from megaregion.schemas.evaluation import Table

MAPPED_SCENES = 100
"""Most scenes of each split whose maps are kept: they hold every place, not one feature a region."""


@dataclass(frozen=True)
class Evidence:
    """Everything that a measure may look at."""

    known: EncodedScenes
    """Training scenes, by every encoder."""
    asked: EncodedScenes
    """Held-out scenes, by every encoder."""
    encoders: Sequence[Encoder]
    prior: Tokens
    """Most frequent tokens of the training shards; empty without text."""
    seeds: int
    """Draws behind every mean."""
    batch: int = 32
    """Images that go through an encoder at once."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent on maps is added here."""
    progress: Progress = lambda split, done, images: None
    """Told of images as their maps are made."""

    @cached_property
    def maps(self) -> tuple[MappedScenes, MappedScenes] | None:
        """Maps of training and held-out scenes, made when first asked for; None where scenes lack masks."""
        drawn = [_with_masks(part.truth.scenes) for part in (self.known, self.asked)]
        if not all(scenes for scenes, _ in drawn):
            return None
        count = counter(self.progress, "maps of", sum(len(scenes) for scenes, _ in drawn))
        known, asked = (
            MappedScenes(scenes, truths, encode_maps(scenes, self.encoders, self.batch, self.seconds, count))
            for scenes, truths in drawn
        )
        return known, asked


Measure = Callable[[Evidence], Table | None]
"""Measures every encoder; None where the scenes do not allow it."""


def _retrieval(evidence: Evidence) -> Table:
    features = {name: own.objects for name, own in evidence.asked.features.items()}
    return retrieval_table(features, evidence.asked.truth.objects)


def _correspondence(evidence: Evidence) -> Table | None:
    if evidence.maps is None:
        return None
    asked = evidence.maps[1]
    return correspondence_table(_by_scene(evidence.asked, asked.scenes), asked, evidence.seeds)


MEASURES: Mapping[str, Measure] = {
    "region": lambda evidence: recognition_table(evidence.known, evidence.asked, evidence.seeds),
    "retrieval": _retrieval,
    "ocr": lambda evidence: reading_table(evidence.known, evidence.asked, evidence.prior, evidence.seeds),
    "correspondence": _correspondence,
    "segmentation": lambda evidence: evidence.maps and segmentation_table(*evidence.maps, evidence.seeds),
    "separation": lambda evidence: evidence.maps and separation_table(*evidence.maps),
}
"""All measures, in the order in which they are shown."""
QUICK = ("region", "retrieval", "ocr", "separation")
"""Measures that cost little beside encoding the regions."""


def measure(evidence: Evidence, names: Sequence[str]) -> list[Table]:
    """Measure every encoder by each of the named measures that the scenes allow."""
    tables = [make(evidence) for name, make in MEASURES.items() if name in names]
    return [table for table in tables if table is not None]


def _with_masks(scenes: Sequence[Scene]) -> tuple[list[Scene], list[TruthMap]]:
    """The first scenes whose objects all have masks, and their truths."""
    found = [(scene, truth_map(scene)) for scene in scenes[:MAPPED_SCENES] if scene.objects]
    return [scene for scene, truth in found if truth], [truth for _, truth in found if truth]


def _by_scene(asked: EncodedScenes, scenes: Sequence[Scene]) -> dict[str, list[NDArray[np.float32]]]:
    """Features of each scene's regions, objects first, [objects + words, C], by encoder."""
    truth = asked.truth
    place = {scene.key: number for number, scene in enumerate(truth.scenes)}
    rows = [
        [np.flatnonzero(table.scene == place[scene.key]) for table in (truth.objects, truth.words)]
        for scene in scenes
    ]
    return {
        name: [np.concatenate([own.objects[objects], own.words[words]]) for objects, words in rows]
        for name, own in asked.features.items()
    }
