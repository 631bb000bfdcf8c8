"""Stage embed: chooses the regions worth a label, and embeds their crops.

Shapes: r regions of the piece, in the order of the images and of their regions; C channels.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from megaregion.curation.engines import lite0, load_embedder
from megaregion.curation.inputs.source import ImageFile
from megaregion.curation.picture import Picture, crop
from megaregion.curation.stages.filters import choose
from megaregion.curation.stages.propose import CANDIDATES
from megaregion.curation.stages.records import ImageRegions, read_regions, read_words, write_regions
from megaregion.curation.stages.stage import Stage, describe, plain
from megaregion.curation.stages.store import Output, Piece
from megaregion.curation.stages.text import WORDS
from megaregion.curation.types import Embedder

REGIONS, FEATURES = "regions.jsonl", "features.npy"


class Embed(Stage):
    """Writes regions.jsonl and features.npy, float16 [r, C]; a row of zeros is a region without label."""

    name = "embed"
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
    def needs(self, number: int) -> list[Piece]:
        return [Piece("propose", number), Piece("ocr", number)]

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

            def embed(image: ImageFile, picture: Picture | None) -> None:
                found, read = next(images), next(texts)
                boxes = [word.box for word in read.above(confidence)]
                chosen = choose(found.regions, boxes, self.job.settings.embed)
                record = ImageRegions(found.key, found.width, found.height, chosen.proposals)
                write_regions(file, record)
                output.counts["kept"] += len(chosen.proposals)
                output.counts.update({f"dropped: {why}": n for why, n in chosen.dropped.items()})
                if picture is None or not chosen.proposals:
                    return
                crops = [crop(picture.pixels, region.box) for region in chosen.proposals]
                vectors = self._embedder.embed(crops)
                lost = ~np.isfinite(vectors).all(axis=1)
                vectors[lost] = 0
                output.counts["dropped: not embedded"] += int(lost.sum())
                output.counts["kept"] -= int(lost.sum())
                features.append(vectors.astype(np.float16))

            self.for_each(number, output, embed)
        with output.file(FEATURES) as file:
            np.save(file, np.concatenate(features), allow_pickle=False)

    @cached_property
    def _embedder(self) -> Embedder:
        settings = self.job.settings.embed
        return load_embedder(settings.embedder, settings.clip or None, settings.crop_side)
