"""Show runs side by side in one page that opens without a network: measures, curves, maps, settings.

python tools/report.py runs/demo runs/other --out comparison.html

Reads what tools/pretrain.py and tools/evaluate.py left in the runs' folders, and computes nothing anew.
"""

from __future__ import annotations

from pathlib import Path

from megaregion.bounds import File, Folder
from megaregion.command_line import Parser, run
from megaregion.errors import UserError


def main() -> None:
    arguments = _parser().parse_args()

    from megaregion.evaluation.report import joined_tables, read_runs, write_comparison
    from megaregion.schemas.evaluation import FOOTNOTE, text

    if not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist")
    runs = read_runs(arguments.runs)
    write_comparison(runs, arguments.out)
    tables = joined_tables(runs)
    if tables:
        print(f"{text(tables)}\n\n{FOOTNOTE}")
    print(f"\n{arguments.out}")


def _parser() -> Parser:
    parser = Parser(description="Show runs side by side: a table a measure on the terminal, and one page.")
    told = "folder of a run that tools/evaluate.py has measured"
    parser.add_flag("runs", Folder, None, told, metavar="RUN", nargs="+")
    parser.add_flag("--out", File, Path("comparison.html"), "the page")
    return parser


if __name__ == "__main__":
    run(main)
