"""Compare megaregion's parts with honest peers, in one run on this machine."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from megaregion.benchmark.head import HeadSizes, compare
from megaregion.benchmark.measure import Stopwatch, describe_host
from megaregion.benchmark.report import Report
from megaregion.command_line import run
from megaregion.errors import UserError

MIB = 2**20
STANDARD = {
    "million": (
        HeadSizes(1_000_000, 256, 1024, 0.1, 112 * MIB),
        {"step": 3.0, "memory": 8.0, "gemm": 1 / 1.35},
    ),
    "full": (
        HeadSizes(100_000, 512, 2048, 1.0, 16 * MIB),
        {"passes": 1.7, "memory": 10.0, "gemm": 1 / 1.35, "dense": 1.15, "dense_memory": 10.0},
    ),
}
"""The sizes with promised ratios, by name."""


def main() -> int | None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU and none is visible; use --device cpu")
    report = heads(options, device) if options.part == "head" else checkpoints(options, device)
    print(report.table())
    if options.json:
        report.write_json(options.json)
    return 0


def heads(options: argparse.Namespace, device: torch.device) -> Report:
    watch = Stopwatch(device, processor=options.clock == "processor")
    report = Report({**describe_host(device), "clock": options.clock})
    for sizes, goals in chosen(options):
        dense = options.dense or sizes.sample_rate == 1.0
        report.cases += compare(sizes, goals, options.repeats, watch, dense)
    return report


def checkpoints(options: argparse.Namespace, device: torch.device) -> Report:
    from megaregion.benchmark.checkpoint import compare_saves
    from megaregion.parallel import topology

    if options.parameters < 1024 or options.repeats < 1:
        raise UserError("--parameters must be at least 1024 and --repeats at least 1")
    needed, free = 24 * options.parameters, shutil.disk_usage(options.folder).free
    if free < needed:
        raise UserError(f"--folder {options.folder} needs {needed / 1e9:.0f} GB free, has {free / 1e9:.0f}")
    place = topology.join(1)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report({**describe_host(device), "folder": str(options.folder)})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as folder:
        report.cases += compare_saves(options.parameters, Path(folder), place, device, options.repeats)
    topology.leave()
    return report


def chosen(options: argparse.Namespace) -> list[tuple[HeadSizes, dict[str, float]]]:
    if options.classes is None:
        names = list(STANDARD) if options.case == "all" else [options.case]
        return [STANDARD[name] for name in names]
    return [
        (
            HeadSizes(
                options.classes,
                options.dim,
                options.rows,
                options.sample_rate,
                options.chunk_mib * MIB,
                options.loss,
            ),
            {},
        )
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    head = parts.add_parser(
        "head",
        help="the class-sharded head against a PartialFC-style head and a dense softmax",
        description="Ratios are peer / ours: more is better, for times and memory alike.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    head.add_argument("--case", choices=[*STANDARD, "all"], default="all", help="standard sizes with goals")
    head.add_argument("--classes", type=int, help="classes K; given, it replaces the standard sizes")
    head.add_argument("--dim", type=int, default=256, help="embedding width")
    head.add_argument("--rows", type=int, default=1024, help="region features of a step")
    head.add_argument("--sample-rate", type=float, default=0.1, help="share of classes drawn")
    head.add_argument("--chunk-mib", type=int, default=64, help="memory for scores, in MiB")
    head.add_argument("--loss", choices=["softmax", "separated"], default="softmax", help="our loss")
    head.add_argument(
        "--dense", action="store_true", help="run the dense softmax also where rows are sampled"
    )
    head.add_argument("--repeats", type=int, default=3, help="timed steps; the fastest counts")
    head.add_argument("--threads", type=int, help="threads of the processor; all when not given")
    head.add_argument(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor counts only this process's time, for a shared machine; use it with --threads 1",
    )
    head.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    head.add_argument("--json", type=Path, metavar="FILE", help="also write the cases there")
    save = parts.add_parser(
        "checkpoint",
        help="what an asynchronous save takes from training, against a synchronous one",
        description="Ratios are synchronous save / ours; a ratio of 20 is 5 percent of its time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    save.add_argument(
        "--parameters",
        type=lambda text: int(float(text)),
        default=300_000_000,
        help="parameters of the model; the state is 12 bytes for each, and memory and disk hold it twice",
    )
    save.add_argument("--folder", type=Path, default=Path(), help="folder on the disk to measure")
    save.add_argument("--repeats", type=int, default=2, help="saves of each kind; the fastest counts")
    save.add_argument("--threads", type=int, help="threads of the processor; all when not given")
    save.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the state lies")
    save.add_argument("--json", type=Path, metavar="FILE", help="also write the cases there")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
