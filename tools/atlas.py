"""Show what curation made: plain files with a map of the clusters, their members, tokens and samples.

python tools/atlas.py data/photos --out runs/atlas      (then open runs/atlas/index.html)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megaregion.atlas.settings import AtlasSettings
from megaregion.bounds import Folder, PositiveInt, Workers
from megaregion.command_line import Parser, chosen_settings, progress, run
from megaregion.errors import UserError
from megaregion.schemas.evaluation import aligned

if TYPE_CHECKING:
    from megaregion.atlas.build import Outcome
    from megaregion.atlas.source import Source


def main() -> None:
    arguments = _parser().parse_args()
    settings, curated = chosen_settings(arguments, AtlasSettings()), arguments.curated
    if (curated is None) == (arguments.synthetic is None):
        raise UserError("name the folder of a curation, or give --synthetic K; one of the two")

    from megaregion.atlas.build import build_atlas
    from megaregion.atlas.source import CuratedSource
    from megaregion.atlas.synthetic import SyntheticSource

    source: Source = SyntheticSource(arguments.synthetic) if curated is None else CuratedSource(curated)
    if not source.knows_closeness:
        print("cosines are not known (no stages/assign beside the shards): pages show random members only")
    out = arguments.out or (Path("data/atlas") if curated is None else curated / "atlas")
    outcome = build_atlas(source, out, settings, progress, arguments.workers)
    print(f"{out} is up to date" if outcome is None else _table(outcome, out))
    print(f"open {(out / 'index.html').resolve().as_uri()}")


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
    return aligned(rows)


def _parser() -> Parser:
    parser = Parser(
        description="Write an HTML atlas of a curation: a folder that opens in any browser, without a server "
        "or the internet. Done before and nothing changed: it stays as it is.",
    )
    add = parser.add_flag
    add("curated", Folder, None, "the --out folder of tools/curate.py, or a folder of shards", nargs="?",
        metavar="CURATED")  # fmt: skip
    add("--synthetic", PositiveInt, None, "instead: K made-up clusters, to see how it scales", metavar="K")
    add("--out", Folder, None, "folder to write; CURATED/atlas if not given")
    add("--workers", Workers, 2, "processes that crop, to the same outcome for any number; 0: this process")
    parser.add_settings_files()
    parser.add_settings(AtlasSettings(), flat=True)
    return parser


if __name__ == "__main__":
    run(main)
