"""The stages, in the order in which they run."""

from __future__ import annotations

from megaregion.curation.stages.balance import Balance, Duplicates
from megaregion.curation.stages.cluster import Assign, Cluster
from megaregion.curation.stages.pack import Pack, Publish
from megaregion.curation.stages.regions import Embed, Propose
from megaregion.curation.stages.stage import ImageStage, Job, Stage
from megaregion.curation.stages.text import Ocr, Tokenizer

STAGES: tuple[type[Stage], ...] = (
    Propose, Ocr, Embed, Cluster, Assign, Duplicates, Balance, Tokenizer, Pack, Publish,
)  # fmt: skip
"""Each needs only earlier ones."""
NAMES = tuple(stage.name for stage in STAGES)
LOOKING = tuple(stage.name for stage in STAGES if issubclass(stage, ImageStage))
"""Those that look at images; none of others comes between them."""
JOINED = "+".join(LOOKING)
"""All of these, piece by piece."""


def make_stages(job: Job) -> dict[str, Stage]:
    """All stages of a run, by name."""
    return {stage.name: stage(job) for stage in STAGES}
