"""Compare megaregion's parts with honest peers, in one run on this machine."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from pathlib import Path

from megaregion.command_line import Parser, path, run, whole
from megaregion.errors import UserError

PARTS = (
    "assign", "atlas", "checkpoint", "convert", "curation", "embed", "guards", "head", "kmeans", "loader",
    "model", "ocr", "plan", "step",
)  # fmt: skip
"""Modules of the package `benchmark` beside this file; Python finds a package before a module."""


def main() -> int:
    options = parse()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU and none is visible; use --device cpu")
    folder = getattr(options, "folder", None)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--folder {folder} is no folder; make it first, on the disk to measure")
    report = importlib.import_module(f"benchmark.{options.part}").measure(options, device)
    print(report.table())
    if options.json:
        report.write_json(options.json)
    return 0


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="part", required=True)
    for name in PARTS:
        file = Path(__file__).with_suffix("") / f"{name}.py"
        told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        command = commands.add_parser(name, help=told.partition("\n")[0].rstrip("."), description=told)
        # Only the part that is asked for is imported: they bring torch, Faiss and OpenCV with them.
        if sys.argv[1:2] == [name]:
            importlib.import_module(f"benchmark.{name}").add_arguments(command)
        command.add_argument(
            "--threads", type=whole(1, 1024), help="threads of the processor; all when not given"
        )
        command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
        command.add_argument("--json", type=path, metavar="FILE", help="also write the cases there")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
