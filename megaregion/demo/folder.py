"""A folder of scenes: written in parallel beside its place, and moved there when it is whole.

OUT/scenes.json  OUT/train/images/KEY.jpg  OUT/train/truth.jsonl  OUT/val/...  OUT/test/...
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megaregion.demo.assets import Library, Part
from megaregion.demo.scenes import SceneMaker, SceneSettings
from megaregion.errors import UserError
from megaregion.files import new_folder, read_json
from megaregion.processes import spread

VERSION = 1
"""Goes up when the same settings would give other scenes than before."""
CHUNK = 16
"""Scenes that a worker makes per task."""


@dataclass
class PartSummary:
    """What the scenes of one part hold."""

    scenes: int = 0
    words: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    """Objects of each class."""
    instances: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)

    def add(self, truth: Mapping[str, Any]) -> None:
        """Count one line of truth.jsonl."""
        self.scenes += 1
        self.words += len(truth["words"])
        self.objects.update(item["class"] for item in truth["objects"])
        self.instances.update(item["instance"] for item in truth["objects"])
        self.texts.update(word["text"].lower() for word in truth["words"])


def identity(library: Library, settings: SceneSettings, counts: Mapping[Part, int]) -> dict[str, Any]:
    """Everything that decides what is in the folder, as scenes.json holds it."""
    return {
        "version": VERSION,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "scenes": dict(counts),
        "assets": library.fingerprint(),
    }


def is_done(out: Path, wanted: Mapping[str, Any], force: bool) -> bool:
    """Whether the folder holds just these scenes already.

    Raises:
        UserError: The folder holds something else: scenes of other settings (unless ``force``
            allows to replace them), or files that are no scenes at all (never replaced).
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = read_json(out / "scenes.json")
    except (OSError, ValueError):
        raise UserError(f"{out} exists and holds no scenes of ours; name another folder with --out") from None
    if found == wanted:
        return not force
    if not force:
        changed = ", ".join(key for key in wanted if found.get(key) != wanted[key]) or "its contents"
        raise UserError(
            f"{out} holds scenes of other settings ({changed}); replace them with --force, or change --out"
        )
    return False


def write_scenes(
    out: Path,
    library: Library,
    settings: SceneSettings,
    counts: Mapping[Part, int],
    workers: int = 2,
    on_progress: Callable[[int], None] = lambda scenes: None,
) -> None:
    """Make all scenes and put the folder in place of what is there, which :func:`is_done` looks at first.

    The scenes are the same for any number of worker processes; 0 and 1 work in this one. `on_progress` gets
    the number of scenes just made.

    Raises:
        UserError: A part has too few files, the disk takes no more, or a worker died.
    """
    # Too few files for a part must show before the first scene is made.
    makers = {part: SceneMaker(library, settings, part) for part in counts}
    tasks = [
        (part, range(start, min(start + CHUNK, count)))
        for part, count in counts.items()
        for start in range(0, count, CHUNK)
    ]
    try:
        with new_folder(out) as folder:
            for part in counts:
                (folder / part / "images").mkdir(parents=True)
                (folder / part / "truth.jsonl").touch()
            made = spread(partial(_write_chunk, makers, folder), tasks, workers)
            for (part, _), truths in zip(tasks, made, strict=True):
                with (folder / part / "truth.jsonl").open("a", encoding="utf-8") as lines:
                    lines.writelines(json.dumps(truth) + "\n" for truth in truths)
                on_progress(len(truths))
            wanted = identity(library, settings, counts)
            (folder / "scenes.json").write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); make room, or name another --out"
        ) from None


def summarise(out: Path) -> dict[Part, PartSummary]:
    """Count what is in a folder of scenes."""
    counts: dict[Part, int] = json.loads((out / "scenes.json").read_text(encoding="utf-8"))["scenes"]
    summaries = {part: PartSummary() for part in counts}
    for part, summary in summaries.items():
        with (out / part / "truth.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                summary.add(json.loads(line))
    return summaries


def _write_chunk(
    makers: Mapping[Part, SceneMaker], folder: Path, task: tuple[Part, range]
) -> list[dict[str, Any]]:
    part, numbers = task
    truths = []
    for number in numbers:
        scene = makers[part].make(number)
        (folder / part / "images" / f"{scene.truth['key']}.jpg").write_bytes(scene.jpeg)
        truths.append(scene.truth)
    return truths
