"""Show runs on one page that opens without a network: as they are, or with --watch again and again.

python tools/report.py runs/demo runs/other --out comparison.html   side by side, and tables on the terminal
python tools/report.py --watch runs/demo                            runs/demo/watch.html, written every 10 s

Reads what tools/pretrain.py and tools/evaluate.py left in the runs' folders, and computes nothing anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megaregion.bounds import File, Folder, Real
from megaregion.command_line import Parser, run
from megaregion.errors import UserError, say


def main() -> None:
    arguments = _parser().parse_args()

    from megaregion.evaluation.runs import follow, open_runs, state_table, tables, write_runs
    from megaregion.schemas.evaluation import FOOTNOTE, text

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    out = arguments.out
    if out is None:
        alone = arguments.watch and len(arguments.runs) == 1
        out = arguments.runs[0] / "watch.html" if alone else Path("comparison.html")
    elif not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    runs = open_runs(arguments.runs)
    if arguments.watch and not arguments.once:
        print(f"{out.absolute().as_uri()} loads itself again while this command goes on")
        follow(runs, out, arguments.every)
        return
    for one in runs:
        if not (one.folder / "config.yaml").is_file():
            told = "is no run: it holds no config.yaml; name a folder of tools/pretrain.py"
            raise UserError(f"{one.folder} {told}")
        if one.read().broken:
            say(f"{one.folder}: {one.broken} lines cannot be read; the page goes without them")
    write_runs(runs, out)
    print(state_table(runs))
    if found := tables(runs):
        print(f"\n{text(found)}\n\n{FOOTNOTE}")
    print(f"\n{out}")


def _parser() -> Parser:
    parser = Parser(description="Show runs on one page: state, curves, events, measures, settings.")
    add = parser.add_flag
    add("runs", Folder, None, "folder of a run of tools/pretrain.py", metavar="RUN", nargs="+")
    told = "the page (default: comparison.html; of one run that is watched, watch.html in its folder)"
    add("--out", File, None, told)
    add("--watch", bool, False, "write the page again and again until the runs are finished")
    add("--once", bool, False, "with --watch: only once, with tables on the terminal")
    add("--every", Real(1, 10**6, "SECONDS"), 10.0, "with --watch: time between two looks")
    return parser


if __name__ == "__main__":
    run(main)
