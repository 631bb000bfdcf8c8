"""Compose the demo's scenes: cut-outs and words on photo backgrounds, with everything in them known.

python tools/make_scenes.py --out data/scenes --train 3000 --test 400
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megaregion.bounds import Count, Seed, Workers
from megaregion.command_line import Parser, flag, path, run
from megaregion.errors import UserError

if TYPE_CHECKING:
    from megaregion.demo.assets import Part
    from megaregion.demo.folder import PartSummary


def main() -> None:
    arguments = _parser().parse_args()

    import time

    from tqdm import tqdm

    from megaregion.demo.assets import load_library
    from megaregion.demo.folder import identity, is_done, summarise, write_scenes
    from megaregion.demo.scenes import SceneSettings

    counts: dict[Part, int] = {"train": arguments.train, "val": arguments.val, "test": arguments.test}
    counts = {part: count for part, count in counts.items() if count}
    if not counts:
        raise UserError("--train, --val and --test are all 0; ask for at least one scene")
    settings = SceneSettings(arguments.seed, tuple(arguments.size))
    library = load_library(arguments.cutouts, arguments.backgrounds)
    for file, reason in list(library.left_out.items())[:5]:
        print(f"left out: {file} {reason}", file=sys.stderr)
    if len(library.left_out) > 5:
        print(f"left out: {len(library.left_out) - 5} more files", file=sys.stderr)
    if is_done(arguments.out, identity(library, settings, counts), arguments.force):
        print(f"{arguments.out} holds these scenes already")
    else:
        began = time.perf_counter()
        with tqdm(total=sum(counts.values()), unit="scene", disable=not sys.stderr.isatty()) as bar:
            write_scenes(arguments.out, library, settings, counts, arguments.workers, bar.update)
        seconds = time.perf_counter() - began
        print(f"{arguments.out}: {sum(counts.values())} scenes in {seconds:.1f} s")
    print(_table(summarise(arguments.out)))


def _table(summaries: dict[Part, PartSummary]) -> str:
    classes = sorted({name for summary in summaries.values() for name in summary.objects})
    rows = [("", *summaries)]
    rows += [("scenes", *(str(summary.scenes) for summary in summaries.values()))]
    rows += [("objects", *(str(summary.objects.total()) for summary in summaries.values()))]
    rows += [
        ("  " + name, *(str(summary.objects[name]) for summary in summaries.values())) for name in classes
    ]
    rows += [("instances", *(str(len(summary.instances)) for summary in summaries.values()))]
    rows += [("words", *(str(summary.words) for summary in summaries.values()))]
    rows += [("  different", *(str(len(summary.texts)) for summary in summaries.values()))]
    width = max(len(row[0]) for row in rows)
    return "\n".join(row[0].ljust(width) + "".join(cell.rjust(9) for cell in row[1:]) for row in rows)


def _parser() -> Parser:
    parser = Parser(
        description="Compose scenes with known truth. The parts share no cut-out instance, no background and "
        "no word. OUT gets train/, val/ and test/ with images/ and truth.jsonl; only the evaluation "
        "may read the truth.",
    )
    add = parser.add_argument
    add("--out", metavar="FOLDER", type=path, default=Path("data/scenes"), help="folder to make")
    add("--train", type=flag(Count), default=3000, metavar="N", help="scenes to train on")
    add("--val", type=flag(Count), default=0, metavar="N",
        help="scenes to tune on, of files that no other part shows")  # fmt: skip
    add("--test", type=flag(Count), default=400, metavar="N", help="scenes to measure on")
    add("--size", metavar="SIZE", type=_size, nargs="+", default=[(256, 256)],
        help="pixels, as 256 or 256x320; each scene draws one of those given")  # fmt: skip
    add("--seed", metavar="SEED", type=flag(Seed), default=0,
        help="other scenes of the same files; the parts of the files stay the same")  # fmt: skip
    add("--workers", metavar="N", type=flag(Workers), default=2,
        help="processes; the scenes are the same for any number")  # fmt: skip
    add("--cutouts", type=path, metavar="DIR",
        help="your own: one folder per class, pictures with transparency")  # fmt: skip
    add("--backgrounds", type=path, metavar="DIR", help="your own background pictures")
    add("--force", action="store_true", help="replace scenes of other settings in OUT")
    return parser


def _size(text: str) -> tuple[int, int]:
    """Width and height from WIDTHxHEIGHT, or from the side of a square."""
    from megaregion.demo.scenes import Side

    width, _, height = text.partition("x")
    return flag(Side)(width), flag(Side)(height or width)


if __name__ == "__main__":
    run(main)
