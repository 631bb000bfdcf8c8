"""Compare megaregion's parts with honest peers, in one run on this machine."""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmark import parts
from megaregion.bounds import Choice, File, Whole
from megaregion.command_line import Parser, run
from megaregion.errors import UserError


def main() -> int:
    if "--fake" in sys.argv[1:]:
        # Torch asks who answers for CUDA when it is imported.
        from megaregion.planning.cuda_guard import load_guard

        load_guard()
    options = parse()
    import torch

    from megaregion.parallel.topology import launched_as

    rank, _, _ = launched_as()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU and none is visible; use --device cpu")
    report = options.part.measure(options, device, options.json if rank == 0 else None)
    if rank == 0:
        print(report.table())
    return 1 if any(case.failure for case in report.cases) else 0


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(metavar="PART", required=True)
    for name, module, told in sorted(parts()):
        command = commands.add_parser(name, help=told.partition("\n")[0].rstrip("."), description=told)
        # Only the part that is asked for is imported: they bring torch, Faiss and OpenCV with them.
        if sys.argv[1:2] == [name]:
            part = getattr(importlib.import_module(f"benchmark.{module}"), name)
            part.add_flags(command)
            command.set_defaults(part=part)
        add = command.add_flag
        add("--threads", Whole(1, 1024), None, "threads of the processor; all when not given")
        add("--device", Choice(("cpu", "cuda")), "cpu", "where to run")
        add("--json", File, None, "also write the cases there")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
