"""Show what curation made: plain files with a map of the clusters, their members, tokens and samples.

python tools/atlas.py data/photos --out runs/atlas      (then open runs/atlas/index.html)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megaregion.atlas.build import Outcome, build_atlas
from megaregion.atlas.curated import CuratedSource
from megaregion.atlas.settings import AtlasSettings, check_settings
from megaregion.atlas.source import Source
from megaregion.atlas.synthetic import SyntheticSource
from megaregion.command_line import run
from megaregion.errors import UserError


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.workers < 0:
        raise UserError(f"--workers must be 0 or more, got {arguments.workers}; 0 crops in this process")
    settings = AtlasSettings(
        members=arguments.members,
        tile=arguments.tile,
        sheets=arguments.sheets,
        samples=arguments.samples,
        neighbours=arguments.neighbours,
        projection=arguments.map,
        seed=arguments.seed,
    )
    check_settings(settings)
    source = _source(arguments)
    if not source.knows_closeness:
        print("cosines are not known (no stages/assign beside the shards): pages show random members only")
    out = arguments.out or (Path("data/atlas") if arguments.curated is None else arguments.curated / "atlas")
    outcome = build_atlas(source, out, settings, _progress, arguments.workers)
    if outcome is None:
        print(f"{out} is up to date")
    else:
        print(_table(outcome, out))
    print(f"open {(out / 'index.html').resolve().as_uri()}")


def _source(arguments: argparse.Namespace) -> Source:
    if (arguments.curated is None) == (arguments.synthetic is None):
        raise UserError("name the folder of a curation, or give --synthetic K; one of the two")
    if arguments.synthetic is None:
        return CuratedSource(arguments.curated)
    if arguments.synthetic < 1:
        raise UserError(f"--synthetic must be 1 or more clusters, got {arguments.synthetic}")
    return SyntheticSource(arguments.synthetic)


@contextmanager
def _progress(step: str, count: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; one line at the end elsewhere."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write an HTML atlas of a curation: a folder that opens in any browser, without a server "
        "or the internet. Done before and nothing changed: it stays as it is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = AtlasSettings()
    add = parser.add_argument
    add("curated", type=Path, nargs="?", help="the --out folder of tools/curate.py, or a folder of shards")
    add("--synthetic", type=int, metavar="K", help="instead: K made-up clusters, to see how it scales")
    add("--out", type=Path, metavar="FOLDER", help="folder to write; CURATED/atlas if not given")
    add("--members", type=int, default=defaults.members, metavar="N",
        help="nearest members that a cluster's page shows, and as many random ones")  # fmt: skip
    add("--tile", type=int, default=defaults.tile, metavar="PX", help="side of a crop, in pixels")
    add("--sheets", type=int, default=defaults.sheets, metavar="N",
        help="clusters, the largest, whose members are cropped (about 0.1 MB each); 0 crops all")  # fmt: skip
    add("--samples", type=int, default=defaults.samples, metavar="N",
        help="samples to browse, drawn at random (about 0.1 MB each); 0 takes all")  # fmt: skip
    add("--neighbours", type=int, default=defaults.neighbours, metavar="N", help="neighbours of a cluster")
    add("--map", choices=("pca", "umap"), default=defaults.projection, help="how centers become a map")
    add("--seed", type=int, default=defaults.seed, help="seed of what is drawn at random")
    add("--workers", type=int, default=2, metavar="N", help="processes that crop; the outcome is the same")
    return parser


if __name__ == "__main__":
    run(main)
