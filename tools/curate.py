"""Curate images: regions, cluster labels, text labels, and the shards to train on.

python tools/curate.py check --images data/scenes/train/images
python tools/curate.py --images data/scenes/train/images --out data
python tools/curate.py status --out data
python tools/curate.py report --out data --truth data/scenes/train
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megaregion.bounds import Choice, Count, File, Folder, PositiveInt, Text, Workers
from megaregion.command_line import Parser, changed_settings, chosen_settings, progress, run
from megaregion.curation.settings import AnnotationSettings, CurationSettings, ImageSettings, check_settings
from megaregion.errors import UserError

if TYPE_CHECKING:
    from megaregion.curation.pipeline import Share
    from megaregion.parallel.topology import Topology

OUT = ("--out", Folder, Path("data"), "folder of the run; the dataset is OUT/shards")


def main() -> None:
    arguments = _parser().parse_args()
    arguments.command(arguments)


def _curate(arguments: argparse.Namespace) -> None:
    from megaregion.curation.pipeline import JOINED, Share, curate, curate_share, job_lines

    settings, share = chosen_settings(arguments, CurationSettings()), _share(arguments.piece, arguments.of)
    check_settings(settings)
    where = _images(arguments), arguments.out, settings
    place = _join() if arguments.stage == "cluster" and not arguments.jobs else None
    if arguments.jobs:
        print("\n".join(job_lines(settings, arguments.stage == JOINED)))
    elif share is None and place is None:
        print(curate(*where, progress, arguments.stage, arguments.workers).table())
    else:
        share = share or Share(0, 1)
        pieces, done = curate_share(*where, progress, arguments.stage, share, arguments.workers)
        if place:
            from megaregion.parallel.topology import leave

            leave()
            if place.rank:
                return
        span = f"pieces {pieces[0]} to {pieces[-1]}" if pieces else "no piece"
        print(f"{arguments.stage} {share.number} of {share.of}: {span}, {done} done now")


def _images(arguments: argparse.Namespace) -> Path:
    """The folder of the images; a dataset of the hub comes to OUT-hub when a run lists it or checks it."""
    if not arguments.images:
        wrong = "FOLDER is missing" if arguments.images is None else "must not be empty"
        raise UserError(f"--images {wrong}; name the folder of the images")
    if "://" not in arguments.images:
        return Path(arguments.images)
    from megaregion.curation.inputs.columnar import copy_of_hub
    from megaregion.curation.pipeline import LIST

    lists = arguments.command is _check or (arguments.stage in ("all", LIST) and not arguments.jobs)
    return copy_of_hub(arguments.images, arguments.out.with_name(f"{arguments.out.name}-hub"), lists)


def _join() -> Topology | None:
    """This rank's place if torchrun or srun has started several; one process needs none."""
    from megaregion.parallel.topology import join, launched_as

    _, ranks, _ = launched_as()
    return join(1) if ranks > 1 else None


def _share(piece: int | None, of: int | None) -> Share | None:
    from megaregion.curation.pipeline import Share

    if piece is None and of is None:
        return None
    if piece is None or of is None or piece >= of:
        raise UserError(f"--piece and --of go together, 0 <= piece < of; got --piece {piece} --of {of}")
    return Share(piece, of)


def _check(arguments: argparse.Namespace) -> None:
    from megaregion.curation.inputs.check import check_images
    from megaregion.files import write_text

    image, annotation = (changed_settings(arguments, one()) for one in (ImageSettings, AnnotationSettings))
    found = check_images(_images(arguments), arguments.out, image, annotation, progress, arguments.workers)
    print(found.table())
    if arguments.json:
        write_text(arguments.json, found.to_json())
    if (error := found.no_use()) is not None:
        raise error


def _status(arguments: argparse.Namespace) -> None:
    import time

    from megaregion.curation.pipeline import open_job, recorded_run
    from megaregion.curation.status import read_progress, table

    images, settings = recorded_run(arguments.out)
    print(table(read_progress(open_job(images, arguments.out, settings), time.time())))


def _report(arguments: argparse.Namespace) -> None:
    from megaregion.curation.pipeline import Pipeline, open_job, recorded_run
    from megaregion.curation.report import report
    from megaregion.evaluation.scenes import read_scenes

    images, settings = recorded_run(arguments.out)
    job = open_job(images, arguments.out, settings)
    truth = {scene.key: scene for scene in read_scenes(arguments.truth)} if arguments.truth else None
    print(report(job, Pipeline(job, progress, 0), truth).table())


def _parser() -> Parser:
    from megaregion.curation.pipeline import LIST
    from megaregion.curation.stages import JOINED, NAMES

    parser = Parser(
        description="Turn images into a dataset of labelled regions, OUT/shards. What is done is "
        "skipped; changed settings or images redo what depends on them. Prints a summary and writes it to "
        "OUT/summary.json."
    )
    parser.set_defaults(command=_curate)
    add = parser.add_flag
    add("--images", Text("FOLDER"), None,
        "folder of images, WebDataset tars, or Parquet and Arrow files with a column of images, searched "
        "recursively; annotations that come with them are kept. Or a dataset of HuggingFace's hub, "
        "hf://datasets/OWNER/NAME[@REVISION][/FOLDER], which is copied to OUT-hub")  # fmt: skip
    add(*OUT)
    add("--stage", Choice(("all", LIST, *NAMES, JOINED)), "all",
        f"do one stage; list only finds the images, pack publishes, too, without --piece, and {JOINED} "
        "decodes each image once where all three run on cores")  # fmt: skip
    add("--workers", Workers, 2,
        "processes; the outcome is the same for any number, 0 works in this process")  # fmt: skip
    group = parser.add_argument_group("A share of one stage, beside others on any machine")
    add("--piece", Count, None, "do share I, from 0, of its pieces", group, metavar="I")
    add("--of", PositiveInt, None, "number of shares", group)
    add("--jobs", bool, False, "check the settings, print the jobs of a cluster run and end", group)
    parser.add_settings_files()
    parser.add_settings(CurationSettings(), flat=True)
    commands = parser.add_subparsers(
        title="about the images, and about a run that is under way or done", metavar="COMMAND"
    )
    check = commands.add_parser("check",
        help="read all images, change nothing, print what would be used and why not the rest")  # fmt: skip
    check.add_flag("--images", Text("FOLDER"), None, "folder of the images")
    check.add_flag(*OUT)
    check.add_flag("--json", File, None, "write the table to this file, too")
    check.add_flag("--workers", Workers, 2, "processes; 0 works in this one")
    check.add_settings(ImageSettings(), flat=True)
    check.add_settings(AnnotationSettings(), flat=True)
    check.set_defaults(command=_check)
    status = commands.add_parser("status", help="print what is done, running and failed")
    status.add_flag(*OUT)
    status.set_defaults(command=_status)
    report = commands.add_parser("report", help="print how good the labels are, and write OUT/report.json")
    report.add_flag(*OUT)
    report.add_flag("--truth", Folder, None,
        "folder with truth.jsonl of the curated scenes, as tools/make_scenes.py writes it")  # fmt: skip
    report.set_defaults(command=_report)
    return parser


if __name__ == "__main__":
    run(main)
