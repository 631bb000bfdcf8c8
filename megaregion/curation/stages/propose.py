"""Stage propose: candidates for object regions in every image, the most object-like first."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import override

from megaregion.curation.engines import lite0, load_proposer
from megaregion.curation.engines.objectness import Objectness
from megaregion.curation.inputs.annotations import read_annotations
from megaregion.curation.inputs.source import ImageFile
from megaregion.curation.picture import Picture
from megaregion.curation.stages.filters import rank
from megaregion.curation.stages.records import ImageRegions, write_regions
from megaregion.curation.stages.stage import Stage, describe, plain
from megaregion.curation.stages.store import Output
from megaregion.curation.types import Proposal, Proposer

CANDIDATES = "candidates.jsonl"


class Propose(Stage):
    """Writes candidates.jsonl; also finds out which images can be used at all.

    Regions that came with an image, as SA-1B's do, are kept: nothing is proposed there.
    """

    name = "propose"
    version = 3

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.propose
        values = plain(settings, self.job.settings.image) | {"objectness": lite0.fingerprint()}
        if settings.proposer == "sam":
            values["sam"] = describe(Path(settings.sam))
        return values

    @override
    def prepare(self) -> None:
        # Once here, or every worker would convert the network for itself.
        lite0.convert()

    @override
    def work(self, number: int, output: Output) -> None:
        with output.file(CANDIDATES) as file:

            def propose(image: ImageFile, picture: Picture | None) -> None:
                if picture is None:
                    write_regions(file, ImageRegions(image.key))
                    return
                kept = self._annotated(image, picture)
                if kept is None:
                    found = self._proposer.propose(picture.pixels)
                    ranked = rank(found, picture.pixels, self._objectness, self.job.settings.propose)
                else:
                    found, dropped = kept
                    ranked = rank(found, picture.pixels, None, self.job.settings.propose)
                    output.counts["images with annotations"] += 1
                    output.counts["proposed"] += dropped.total()
                    output.counts.update({f"dropped: {why}": n for why, n in dropped.items()})
                record = ImageRegions(image.key, picture.width, picture.height, ranked.proposals)
                write_regions(file, record)
                output.counts["images used"] += 1
                output.counts["proposed"] += len(found)
                output.counts.update({f"dropped: {why}": n for why, n in ranked.dropped.items()})

            self.for_each(number, output, propose)

    def _annotated(self, image: ImageFile, picture: Picture) -> tuple[list[Proposal], Counter[str]] | None:
        content = self.job.source.annotation(image)
        return None if content is None else read_annotations(content, picture)

    @cached_property
    def _proposer(self) -> Proposer:
        return load_proposer(self.job.settings.propose)

    @cached_property
    def _objectness(self) -> Objectness:
        return Objectness()
