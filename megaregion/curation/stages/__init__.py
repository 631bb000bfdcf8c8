"""The stages, in the order in which they run."""

from __future__ import annotations

from megaregion.curation.stage import Job, Stage
from megaregion.curation.stages.assign import Assign
from megaregion.curation.stages.balance import Balance
from megaregion.curation.stages.cluster import Cluster
from megaregion.curation.stages.coarse import Coarse, Route
from megaregion.curation.stages.embed import Embed
from megaregion.curation.stages.ocr import Ocr
from megaregion.curation.stages.pack import Pack
from megaregion.curation.stages.propose import Propose
from megaregion.curation.stages.publish import Publish
from megaregion.curation.stages.refine import PASSES
from megaregion.curation.stages.split import Split
from megaregion.curation.stages.tokenizer import Tokenizer

STAGES: tuple[type[Stage], ...] = (
    Propose, Ocr, Embed, Coarse, Route, Split, *PASSES, Cluster, Assign, Balance, Tokenizer, Pack, Publish,
)  # fmt: skip
"""Each needs only earlier ones. Coarse, route, split and the passes have no pieces where k-means is flat."""

NAMES = tuple(stage.name for stage in STAGES)


def make_stages(job: Job) -> dict[str, Stage]:
    """All stages of a run, by name."""
    return {stage.name: stage(job) for stage in STAGES}
