"""Curate a folder of images: regions, cluster labels, text labels, and the shards to train on.

python tools/curate.py --images data/scenes/train/images --out data
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megaregion.command_line import run
from megaregion.curation.pipeline import curate
from megaregion.curation.settings import setting_groups, settings_from
from megaregion.curation.stages import NAMES
from megaregion.errors import UserError


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.workers < 0:
        raise UserError(f"--workers must be 0 or more, got {arguments.workers}; 0 works in this process")
    summary = curate(
        arguments.images,
        arguments.out,
        settings_from(vars(arguments)),
        _progress,
        arguments.stage,
        arguments.workers,
    )
    print(summary.table())


@contextmanager
def _progress(stage: str, images: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; one line at the end elsewhere."""
    with tqdm(total=images, desc=f"{stage:<9}", unit="image" if images > 1 else "step", disable=None) as bar:

        def tick() -> None:
            bar.update()

        yield tick
    if bar.disable:
        print(f"{stage}: done")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn a folder of images into a dataset of labelled regions, OUT/shards. What is done is "
        "skipped; changed settings or images redo what depends on them. Prints a summary and writes it to "
        "OUT/summary.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--images",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="folder of jpg, png or webp files, searched recursively",
    )
    add(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("data"),
        help="folder of the run; the dataset is OUT/shards",
    )
    add("--stage", choices=("all", *NAMES), default="all", help="do one stage; pack publishes, too")
    add(
        "--workers",
        metavar="N",
        type=int,
        default=2,
        help="processes; the outcome is the same for any number",
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
