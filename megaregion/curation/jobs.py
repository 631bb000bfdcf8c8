"""The stages as jobs of a cluster: which are cut into shares, and which wait for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from megaregion.curation.settings import CurationSettings
from megaregion.curation.source import Source
from megaregion.curation.stage import Job, stages_before
from megaregion.curation.stages import make_stages
from megaregion.curation.store import Store


def job_lines(settings: CurationSettings) -> Sequence[str]:
    """A line for each job, in an order in which they can be submitted.

    Returns:
        ``STAGE many|one EARLIER,EARLIER``: whether pieces can be shared, and the stages to wait for, or
        ``list`` where there is none.
    """
    stages = make_stages(Job(settings, cast("Source", _OneImage()), Store(Path())))
    lines = []
    for name, stage in stages.items():
        if stage.pieces():
            earlier = [other for other in stages if other in stages_before(stage)]
            lines.append(f"{name} {'one' if stage.whole else 'many'} {','.join(earlier) or 'list'}")
    return lines


class _OneImage:
    """As much of a source as the order of stages depends on: one slice of one image."""

    slices = 1

    def __len__(self) -> int:
        return 1

    def overlapping(self, first: int, last: int) -> range:
        return range(1)
