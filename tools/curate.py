"""Curate images: regions, cluster labels, text labels, and the shards to train on.

python tools/curate.py --images data/scenes/train/images --out data
python tools/curate.py status --out data
python tools/curate.py report --out data --truth data/scenes/train
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megaregion.command_line import run
from megaregion.curation.quality.report import report
from megaregion.curation.quality.truth import TrueImage
from megaregion.curation.runner.pipeline import (
    LIST,
    Pipeline,
    Share,
    curate,
    curate_share,
    job_lines,
    open_job,
    recorded_run,
)
from megaregion.curation.runner.status import read_progress, table
from megaregion.curation.settings import setting_groups, settings_from
from megaregion.curation.stages import NAMES
from megaregion.errors import UserError
from megaregion.evaluation.scenes import Scene, read_scenes


def main() -> None:
    commands = {"status": _status, "report": _report}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        commands[sys.argv[1]](sys.argv[2:])
    else:
        _curate(_parser().parse_args())


def _curate(arguments: argparse.Namespace) -> None:
    if arguments.workers < 0:
        raise UserError(f"--workers must be 0 or more, got {arguments.workers}; 0 works in this process")
    settings, share = settings_from(vars(arguments)), _share(arguments.piece, arguments.of)
    where = arguments.images, arguments.out, settings
    if arguments.jobs:
        print("\n".join(job_lines(settings)))
    elif share is None:
        print(curate(*where, _progress, arguments.stage, arguments.workers).table())
    else:
        pieces, done = curate_share(*where, _progress, arguments.stage, share, arguments.workers)
        span = f"pieces {pieces[0]} to {pieces[-1]}" if pieces else "no piece"
        print(f"{arguments.stage} {share.number} of {share.of}: {span}, {done} done now")


def _share(piece: int | None, of: int | None) -> Share | None:
    if piece is None and of is None:
        return None
    if piece is None or of is None or not 0 <= piece < of:
        raise UserError(f"--piece and --of go together, 0 <= piece < of; got --piece {piece} --of {of}")
    return Share(piece, of)


def _status(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="curate.py status", description="Print what is done, running and failed of a run."
    )
    _add_out(parser)
    out = parser.parse_args(arguments).out
    images, settings = recorded_run(out)
    print(table(read_progress(open_job(images, out, settings), time.time())))


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="curate.py report",
        description="Print how good a run's labels are, and write it to OUT/report.json.",
    )
    _add_out(parser)
    parser.add_argument(
        "--truth",
        metavar="FOLDER",
        type=Path,
        help="folder with truth.jsonl of the curated scenes, as tools/make_scenes.py writes it",
    )
    options = parser.parse_args(arguments)
    images, settings = recorded_run(options.out)
    job = open_job(images, options.out, settings)
    scenes = read_scenes(options.truth) if options.truth else None
    truth = None if scenes is None else {scene.key: _truth(scene) for scene in scenes}
    print(report(job, Pipeline(job, _progress, 0), truth).table())


def _truth(scene: Scene) -> TrueImage:
    objects, words = scene.objects, scene.words
    return TrueImage(
        [item.name for item in objects], [item.box for item in objects],
        [item.text for item in words], [item.box for item in words],
    )  # fmt: skip


@contextmanager
def _progress(stage: str, images: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; one line at the end elsewhere."""
    with tqdm(total=images, desc=f"{stage:<9}", unit="image" if images > 1 else "step", disable=None) as bar:

        def tick() -> None:
            bar.update()

        yield tick
    if bar.disable:
        print(f"{stage}: done")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("data"),
        help="folder of the run; the dataset is OUT/shards",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn images into a dataset of labelled regions, OUT/shards. What is done is "
        "skipped; changed settings or images redo what depends on them. Prints a summary and writes it to "
        "OUT/summary.json. `curate.py status --out OUT` tells how far a run is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--images",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="folder of jpg, png or webp files or of WebDataset tars, searched recursively; "
        "SA-1B's JSON masks beside images are kept",
    )
    _add_out(parser)
    add(
        "--stage",
        choices=("all", LIST, *NAMES),
        default="all",
        help="do one stage; list only finds the images, pack publishes, too, without --piece",
    )
    add(
        "--workers",
        metavar="N",
        type=int,
        default=2,
        help="processes; the outcome is the same for any number",
    )
    group = parser.add_argument_group("A share of one stage, beside others on any machine")
    group.add_argument("--piece", metavar="I", type=int, help="do share I, from 0, of the stage's pieces")
    group.add_argument("--of", metavar="N", type=int, help="number of shares")
    group.add_argument(
        "--jobs", action="store_true", help="check the settings, print the jobs of a cluster run and end"
    )
    for _, title, settings in setting_groups():
        group = parser.add_argument_group(title.rstrip("."))
        for setting in settings:
            several = isinstance(setting.default, tuple)
            group.add_argument(
                "--" + setting.name.replace("_", "-"),
                type=type(setting.default[0] if several else setting.default),
                nargs="+" if several else None,
                # An empty default has nothing to show; settings_from fills it in.
                default=argparse.SUPPRESS if setting.default == "" else setting.default,
                choices=setting.metadata["choices"] or None,
                metavar=setting.metadata["unit"] or None,
                help=setting.metadata["help"],
            )
    return parser


if __name__ == "__main__":
    run(main)
