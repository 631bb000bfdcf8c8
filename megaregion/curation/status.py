"""What there is to tell of a run: how far its stages are, and what they found, kept and dropped.

Read from the run's folder alone, on any machine that sees it; nothing is locked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

import numpy as np

from megaregion.curation.stages import make_stages
from megaregion.curation.stages.cluster import cluster_sizes
from megaregion.curation.stages.stage import Job, Manifest, Piece, Stage, hash_of, recipes_of
from megaregion.curation.workers import read_note
from megaregion.files import write_bytes
from megaregion.schemas.curation import SUMMARY, ClusterSizes, Summary
from megaregion.schemas.evaluation import aligned

NAMED, WRITTEN = 10, 1000
"""Failed pieces that the table names, and unusable images that summary.json names; all count."""


@dataclass
class Progress:
    """One stage's state."""

    stage: str
    pieces: int
    counts_images: bool
    """Whether the pieces are slices of the images; else one piece is one step."""
    done: int = 0
    running: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    """Pieces whose last try ended without an outcome, and why."""
    images: int = 0
    """Images of all pieces."""
    images_done: int = 0
    """Images of pieces that are done, and of those that are running so far."""
    seconds: float = 0.0
    """Work that these took, summed over workers."""

    @property
    def speed(self) -> float | None:
        """Images a second of one worker."""
        return self.images_done / self.seconds if self.images_done and self.seconds else None

    @property
    def left(self) -> float | None:
        """Seconds until the stage is done with the workers that it has now, or with one if it has none."""
        if self.done == self.pieces:
            return 0.0
        if self.speed is None:
            return None
        return (self.images - self.images_done) / self.speed / max(1, self.running)


def read_progress(job: Job, now: float) -> list[Progress]:
    """State of every stage that has pieces, at a time in seconds since 1970."""
    stages = make_stages(job)
    found = [_progress(job, stage, recipes_of(stage.name, stages), now) for stage in stages.values()]
    return [progress for progress in found if progress.pieces]


def table(stages: Sequence[Progress]) -> str:
    """The state as aligned lines, failed pieces below."""
    head = ("stage", "pieces", "done", "running", "failed", "images", "img/s a worker", "time left")
    failed = [f"failed: {s.stage} {number}: {why}" for s in stages for number, why in s.failed.items()]
    if len(failed) > NAMED:
        failed[NAMED:] = [f"failed: {len(failed) - NAMED} more"]
    return "\n".join([aligned([head, *map(_cells, stages)]), *failed])


def _progress(job: Job, stage: Stage, recipes: dict[str, str], now: float) -> Progress:
    pieces, wanted = stage.pieces(), hash_of(recipes)
    progress = Progress(stage.name, pieces, not stage.whole)
    for number, found in enumerate(job.store.glances(stage.name, pieces)):
        size = stage.count(number)
        progress.images += size
        if found is not None and found.recipes == wanted:
            progress.done += 1
            progress.images_done += size
            progress.seconds += found.seconds
            continue
        note = read_note(job.store.folder(Piece(stage.name, number)).parent, number)
        if note is not None and note.failure:
            progress.failed[number] = note.failure
        elif note is not None:
            progress.running += 1
            progress.images_done += min(note.images, size)
            progress.seconds += max(0.0, now - note.began)
    return progress


def _cells(stage: Progress) -> tuple[str, ...]:
    images = f"{stage.images_done}/{stage.images}" if stage.counts_images else ""
    speed = f"{stage.speed:.3g}" if stage.speed is not None and stage.counts_images else ""
    numbers = (stage.pieces, stage.done, stage.running, len(stage.failed))
    return (stage.stage, *map(str, numbers), images, speed, _time(stage.left))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds == 0:
        return "done"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def summarise(job: Job, finished: Iterable[tuple[str, Iterable[Manifest]]]) -> Summary:
    """Add up what the finished stages counted, and leave it as summary.json in the run's folder."""
    counts: Counter[str] = Counter()
    unusable: Counter[str] = Counter()
    bad, seconds = dict(job.source.left_out["bad"]), {}
    for name, manifests in finished:
        seconds[name] = 0.0
        # Stages that look at images say the same of each; the first one that is done is believed. What pack
        # says of others is new.
        first = not unusable or name == "pack"
        for manifest in manifests:
            counts.update(manifest.counts)
            seconds[name] += manifest.seconds
            if first:
                unusable.update(manifest.bad.values())
                bad.update(islice(manifest.bad.items(), max(0, WRITTEN - len(bad))))
    summary = Summary(
        files=job.source.files,
        unusable=dict(sorted(unusable.items())),
        counts=dict(sorted(counts.items())),
        clusters=_cluster_sizes(job) if "assign" in seconds else None,
        left_out={kind: count for kind, (count, _) in sorted(job.source.kinds.items())},
        seconds={name: round(total, 1) for name, total in seconds.items()},
        **{**job.source.left_out, "bad": dict(sorted(bad.items()))},
    )
    write_bytes(job.store.root / SUMMARY, json.dumps(asdict(summary), indent=1).encode())
    return summary


def _cluster_sizes(job: Job) -> ClusterSizes:
    sizes = cluster_sizes(job)
    return ClusterSizes(
        len(sizes), int(sizes.min()), float(np.median(sizes)), int(sizes.max()), int((sizes == 0).sum())
    )
