"""Show what curation made: plain files with a map of the clusters, their members, tokens and samples.

python tools/atlas.py data/photos --out runs/atlas      (then open runs/atlas/index.html)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megaregion.atlas.settings import AtlasSettings
from megaregion.bounds import PositiveInt, Workers
from megaregion.command_line import Parser, add_settings, add_settings_files, chosen_settings, flag, path, run
from megaregion.errors import UserError

if TYPE_CHECKING:
    from megaregion.atlas.build import Outcome
    from megaregion.atlas.source import Source


def main() -> None:
    arguments = _parser().parse_args()
    settings = chosen_settings(arguments, AtlasSettings())
    if (arguments.curated is None) == (arguments.synthetic is None):
        raise UserError("name the folder of a curation, or give --synthetic K; one of the two")

    from megaregion.atlas.build import build_atlas

    source = _source(arguments)
    if not source.knows_closeness:
        print("cosines are not known (no stages/assign beside the shards): pages show random members only")
    out = arguments.out or (Path("data/atlas") if arguments.curated is None else arguments.curated / "atlas")
    outcome = build_atlas(source, out, settings, _progress, arguments.workers)
    print(f"{out} is up to date" if outcome is None else _table(outcome, out))
    print(f"open {(out / 'index.html').resolve().as_uri()}")


def _source(arguments: argparse.Namespace) -> Source:
    from megaregion.atlas.curated import CuratedSource
    from megaregion.atlas.synthetic import SyntheticSource

    if arguments.synthetic is None:
        return CuratedSource(arguments.curated)
    return SyntheticSource(arguments.synthetic)


@contextmanager
def _progress(step: str, count: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; one line at the end elsewhere."""
    from tqdm import tqdm

    with tqdm(total=count, desc=f"{step:<10}", unit_scale=True, disable=None) as bar:
        yield bar.update
    if bar.disable:
        print(f"{step}: done")


def _table(outcome: Outcome, out: Path) -> str:
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    rows = (
        ("clusters", f"{outcome.clusters:,}"),
        ("regions", f"{outcome.regions:,}"),
        ("tokens", f"{outcome.tokens:,}"),
        ("samples to browse", f"{outcome.browsed:,}"),
        ("samples unreadable", f"{outcome.damaged:,}"),
        ("files", f"{len(sizes):,}"),
        ("size", f"{sum(sizes) / 1e6:,.1f} MB"),
        ("time", f"{outcome.seconds:.1f} s"),
    )
    return "\n".join(f"{name:<20}{value:>16}" for name, value in rows)


def _parser() -> Parser:
    parser = Parser(
        description="Write an HTML atlas of a curation: a folder that opens in any browser, without a server "
        "or the internet. Done before and nothing changed: it stays as it is.",
    )
    add = parser.add_argument
    add("curated", type=path, nargs="?", help="the --out folder of tools/curate.py, or a folder of shards")
    add("--synthetic", type=flag(PositiveInt), metavar="K",
        help="instead: K made-up clusters, to see how it scales")  # fmt: skip
    add("--out", type=path, metavar="FOLDER", help="folder to write; CURATED/atlas if not given")
    add("--workers", type=flag(Workers), default=2, metavar="N",
        help="processes that crop; the outcome is the same for any number; 0: this process")  # fmt: skip
    add_settings_files(parser)
    add_settings(parser, AtlasSettings(), flat=True)
    return parser


if __name__ == "__main__":
    run(main)
