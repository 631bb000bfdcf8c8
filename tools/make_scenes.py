"""Compose the demo's scenes: cut-outs and words on photo backgrounds, with everything in them known.

python tools/make_scenes.py --out data/scenes --train 3000 --test 400
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megaregion.bounds import Count, Folder, Seed, Workers, kind_of
from megaregion.command_line import Parser, progress, run
from megaregion.errors import UserError

if TYPE_CHECKING:
    from megaregion.demo.assets import Part


def main() -> None:
    arguments = _parser().parse_args()

    import time

    from megaregion.demo.assets import load_library
    from megaregion.demo.folder import identity, is_done, summary, write_scenes
    from megaregion.demo.scenes import SceneSettings

    counts: dict[Part, int] = {"train": arguments.train, "val": arguments.val, "test": arguments.test}
    counts = {part: count for part, count in counts.items() if count}
    if not counts:
        raise UserError("--train, --val and --test are all 0; ask for at least one scene")
    objects, words = tuple(arguments.train_objects), tuple(arguments.train_words)
    settings = SceneSettings(arguments.seed, tuple(arguments.size), objects, words)
    library = load_library(arguments.cutouts, arguments.backgrounds)
    for file, reason in list(library.left_out.items())[:5]:
        print(f"left out: {file} {reason}", file=sys.stderr)
    if len(library.left_out) > 5:
        print(f"left out: {len(library.left_out) - 5} more files", file=sys.stderr)
    if is_done(arguments.out, identity(library, settings, counts), arguments.force):
        print(f"{arguments.out} holds these scenes already")
    else:
        began = time.perf_counter()
        with progress("scenes", sum(counts.values())) as tick:
            write_scenes(arguments.out, library, settings, counts, arguments.workers, tick)
        seconds = time.perf_counter() - began
        print(f"{arguments.out}: {sum(counts.values())} scenes in {seconds:.1f} s")
    print(summary(arguments.out))


def _parser() -> Parser:
    parser = Parser(
        description="Compose scenes with known truth. The parts share no cut-out instance, no background and "
        "no word. OUT gets train/, val/ and test/ with images/ and truth.jsonl; only the evaluation "
        "may read the truth.",
    )
    add = parser.add_flag
    add("--out", Folder, Path("data/scenes"), "folder to make")
    add("--train", Count, 3000, "scenes to train on")
    add("--val", Count, 0, "scenes to tune on, of files that no other part shows")
    add("--test", Count, 400, "scenes to measure on")
    add("--size", _size, [(256, 256)], "pixels, as 256 or 256x320; each scene draws one of them", nargs="+")
    add("--train-objects", Count, [2, 4], "fewest and most cut-outs of a training scene", nargs=2)
    add("--train-words", Count, [0, 3], "fewest and most words of a training scene", nargs=2)
    add("--seed", Seed, 0, "other scenes of the same files; the parts of the files stay the same")
    add("--workers", Workers, 2, "processes; the scenes are the same for any number")
    add("--cutouts", Folder, None, "your own: one folder per class, pictures with transparency")
    add("--backgrounds", Folder, None, "your own background pictures")
    add("--force", bool, False, "replace scenes of other settings in OUT")
    return parser


def _size(text: str) -> tuple[int, int]:
    """Width and height from WIDTHxHEIGHT, or from the side of a square."""
    from megaregion.demo.scenes import Side

    width, _, height = text.partition("x")
    side = kind_of(Side).fit
    return side(width), side(height or width)


if __name__ == "__main__":
    run(main)
