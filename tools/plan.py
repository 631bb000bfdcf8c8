"""Plan a run before it starts.

python tools/plan.py goodput --gpus 64 1024 --save 0.5 --write 20 --detection 45 --restart 120
"""

from __future__ import annotations

import argparse
import json

from megaregion.command_line import run
from megaregion.errors import UserError
from megaregion.planning.faults import (
    LLAMA3_FAULTS,
    Cluster,
    best_interval,
    expected,
    simulate,
    young,
)


def main() -> int:
    options = parse()
    for name in ("save", "write", "detection", "restart"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} must be 0 seconds or more, got {getattr(options, name)}")
    if min(options.gpus) < 1 or options.faults_per_gpu_day <= 0 or options.faults < 1:
        raise UserError("--gpus, --faults-per-gpu-day and --faults must be positive")
    if options.interval is not None and options.interval <= 0:
        raise UserError(f"--interval must be a positive number of seconds, got {options.interval}")
    rows = [plan(gpus, options) for gpus in options.gpus]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'GPUs':>7}{'h between faults':>18}{'interval s':>12}{'goodput':>10}{'closed form':>13}", end="")
    print(f"{'best interval s':>17}{'goodput':>10}{'Young s':>9}")
    for row in rows:
        print(
            f"{row['gpus']:>7}{row['hours_between_faults']:>18.1f}{row['interval']:>12.0f}"
            f"{row['goodput']:>10.2%}{row['closed_form']:>13.2%}{row['best_interval']:>17.0f}"
            f"{row['best_goodput']:>10.2%}{row['young']:>9.0f}"
        )
    return 0


def plan(gpus: int, options: argparse.Namespace) -> dict[str, float]:
    cluster = Cluster(
        gpus,
        options.faults_per_gpu_day,
        options.save,
        options.write,
        options.detection,
        options.restart,
    )
    best = best_interval(cluster, options.seed, options.faults)
    interval = options.interval or best
    return {
        "gpus": gpus,
        "hours_between_faults": cluster.between_faults / 3600,
        "interval": interval,
        "goodput": simulate(cluster, interval, options.seed, options.faults),
        "closed_form": expected(cluster, interval),
        "best_interval": best,
        "best_goodput": simulate(cluster, best, options.seed, options.faults),
        "young": young(cluster),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    goodput = parts.add_parser(
        "goodput",
        help="share of the wall time that steps get, under faults",
        description="Simulate a run under random faults; times are yours to measure (pretrain.py report).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = goodput.add_argument
    add("--gpus", type=int, nargs="+", default=[64, 1024], help="sizes of the run")
    add(
        "--faults-per-gpu-day",
        type=float,
        default=LLAMA3_FAULTS,
        help="faults that end the run; the default is Llama 3's 419 in 54 days on 16,384 GPUs",
    )
    add("--save", type=float, default=Cluster.save, help="seconds that training stands still for a save")
    add("--write", type=float, default=Cluster.write, help="seconds until a save is then published")
    add("--detection", type=float, default=Cluster.detection, help="seconds from a fault to the run's end")
    add("--restart", type=float, default=Cluster.restart, help="seconds from there to the next first step")
    add("--interval", type=float, help="seconds of training between saves; the best one when not given")
    add("--faults", type=int, default=100_000, help="simulated faults")
    add("--seed", type=int, default=0, help="seed of the faults' times")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
