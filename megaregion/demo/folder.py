"""A folder of scenes: written in parallel beside its place, and moved there when it is whole.

OUT/scenes.json  OUT/train/images/KEY.jpg  OUT/train/truth.jsonl  OUT/val/...  OUT/test/...
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megaregion.demo.assets import Library, Part
from megaregion.demo.scenes import SceneMaker, SceneSettings
from megaregion.errors import UserError, spread
from megaregion.files import new_folder, read_json
from megaregion.schemas.evaluation import aligned

VERSION = 2
"""Goes up when the same settings would give other scenes than before."""
CHUNK = 16
"""Scenes that a worker makes per task."""


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
        if not isinstance(found, dict):
            raise ValueError
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


def summary(out: Path) -> str:
    """What a folder of scenes holds, as aligned lines with a column for each part."""
    found = {}
    for part in read_json(out / "scenes.json")["scenes"]:
        scenes, objects, words = 0, [], []
        with (out / part / "truth.jsonl").open(encoding="utf-8") as lines:
            for truth in map(json.loads, lines):
                scenes += 1
                objects += [(item["class"], item["instance"]) for item in truth["objects"]]
                words += [word["text"].lower() for word in truth["words"]]
        found[part] = scenes, objects, words
    classes = sorted({name for _, objects, _ in found.values() for name, _ in objects})
    columns = [
        ["", "scenes", "objects", *(f"  {name}" for name in classes), "instances", "words", "  different"]
    ]
    for part, (scenes, objects, words) in found.items():
        each = Counter(name for name, _ in objects)
        numbers = (scenes, len(objects), *(each[name] for name in classes), len(set(objects)), len(words))
        columns.append([part, *map(str, numbers), str(len(set(words)))])
    return aligned(list(zip(*columns, strict=True)))


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
