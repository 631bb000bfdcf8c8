"""Stage embed: chooses the regions worth a label, and embeds their crops.

Shapes: r regions of the piece, in the order of the images and of their regions; C channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from megaregion.curation.engines import Embedder, lite0, load_embedder
from megaregion.curation.picture import Boxes, Proposal, area, as_array, crop, intersection, iou
from megaregion.curation.settings import EmbedSettings
from megaregion.curation.stages.propose import CANDIDATES
from megaregion.curation.stages.stage import Stage, describe, plain
from megaregion.curation.stages.store import Output, read_regions, read_words, write_regions
from megaregion.curation.stages.text import WORDS
from megaregion.data.sample import Box
from megaregion.schemas.curation import DROPPED

REGIONS, FEATURES = "regions.jsonl", "features.npy"

INSIDE_WORD = 0.7
"""A proposal with at least this share of its area inside a word is a piece of text."""


class Embed(Stage):
    """Writes regions.jsonl and features.npy, float16 [r, C]; a row of zeros is a region without label."""

    name = "embed"
    reads = ("propose", "ocr")
    version = 2

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.embed
        values = plain(settings, self.job.settings.image)
        values["min_confidence"] = self.job.settings.tokenizer.min_confidence
        if settings.embedder == "clip":
            values["clip"] = describe(Path(settings.clip))
        else:
            values["lite0"] = lite0.fingerprint()
        return values

    @override
    def prepare(self) -> None:
        if self.job.settings.embed.embedder == "lite0":
            lite0.convert()

    @override
    def work(self, number: int, output: Output) -> None:
        candidates, words = self.needs(number)
        images = read_regions([self.path(candidates, CANDIDATES)])
        texts = read_words([self.path(words, WORDS)])
        confidence = self.job.settings.tokenizer.min_confidence
        features = [np.zeros((0, self._embedder.dim), dtype=np.float16)]
        with output.file(REGIONS) as file:
            for _, picture in self.pictures(number, output):
                found, read = next(images), next(texts)
                boxes = [word.box for word in read.above(confidence)]
                chosen, dropped = choose(found.regions, boxes, self.job.settings.embed)
                write_regions(file, replace(found, regions=chosen))
                output.counts["kept"] += len(chosen)
                output.counts.update({DROPPED + why: n for why, n in dropped.items()})
                if picture is None or not chosen:
                    continue
                vectors = self._embedder.embed([crop(picture.pixels, region.box) for region in chosen])
                lost = ~np.isfinite(vectors).all(axis=1)
                vectors[lost] = 0
                output.counts[DROPPED + "not embedded"] += int(lost.sum())
                output.counts["kept"] -= int(lost.sum())
                features.append(vectors.astype(np.float16))
        output.save(FEATURES, np.concatenate(features))

    @cached_property
    def _embedder(self) -> Embedder:
        settings = self.job.settings.embed
        return load_embedder(settings.embedder, settings.clip or None, settings.crop_side)


def choose(
    candidates: Sequence[Proposal], words: Sequence[Box], settings: EmbedSettings
) -> tuple[list[Proposal], Counter[str]]:
    """Keep the regions of one image that are worth a label, and count the others by reason.

    Candidates come the most object-like first.
    """
    texts = _text(as_array([c.box for c in candidates]), as_array(words), settings.text_overlap)
    kept: list[Proposal] = []
    dropped: Counter[str] = Counter()
    for candidate, text in zip(candidates, texts, strict=True):
        if text:
            dropped["text"] += 1
        elif candidate.score < settings.min_objectness:
            dropped["background"] += 1
        elif len(kept) >= settings.max_regions:
            dropped["beyond the limit"] += 1
        else:
            kept.append(candidate)
    return kept, dropped


def _text(boxes: Boxes, words: Boxes, limit: float) -> list[bool]:
    if not len(words):
        return [False] * len(boxes)
    same = iou(boxes, words).max(axis=1) > limit
    inside = intersection(boxes, words).max(axis=1) >= INSIDE_WORD * area(boxes)
    return list(same | inside)
