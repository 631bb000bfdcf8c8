"""Plan a run before it starts.

python tools/plan.py run --config configs/vit_l14_64gpu.yaml --cluster h100x64
python tools/plan.py run --config configs/vit_bigg14_64gpu.yaml --dry-run 5
python tools/plan.py goodput --gpus 64 1024 --save 0.5 --write 20 --detection 45 --restart 120
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from megaregion.command_line import parse_run, run, run_parser
from megaregion.errors import UserError
from megaregion.planning import faults
from megaregion.planning.hardware import GIB, Hardware, load_hardware

PARTS = {
    "run": "memory, time, traffic, cost, best choices and scaling of a config on a cluster",
    "goodput": "share of the wall time that steps get, under faults",
}


def main() -> int:
    parts = "\n".join(f"  {name:9} {text}" for name, text in PARTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts:\n{parts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(PARTS), help="what to plan; each has its own --help")
    part = parser.parse_args(sys.argv[1:2]).part
    return {"run": plan_run, "goodput": plan_goodput}[part](sys.argv[2:])


def plan_run(arguments: list[str]) -> int:
    parser = run_parser("What a run will need and take on a cluster. Every setting of a run may be given.")
    add = parser.add_argument
    add("--cluster", default="h100x64", help="preset of configs/clusters/, or a YAML file of such fields")
    for item in dataclasses.fields(Hardware):
        if item.name not in ("name", "device"):
            kind = int if item.type == "int" else float
            add(f"--{item.name.replace('_', '-')}", type=kind, help=f"replace the cluster's {item.name}")
    add("--samples", type=lambda text: int(float(text)), help="images of the whole run, if not train.steps'")
    add("--classes", type=int, help="object classes, if not those of data.path or 1,000,000")
    add("--vocabulary", type=int, help="text classes, if not those of data.path or 32,768")
    add("--choices", type=int, default=5, help="best choices shown; 0 for none")
    add("--scaling", type=int, nargs="*", help="sizes of the weak scaling table, if not 8 to 1,024")
    add("--dry-run", type=int, metavar="RANK", help="also build this rank, and compare it with the plan")
    add("--json", action="store_true", help="print JSON instead of tables")
    config, flags = parse_run(parser, arguments)
    changes = {item.name: getattr(flags, item.name, None) for item in dataclasses.fields(Hardware)}
    changes["name"] = None
    hardware = load_hardware(flags.cluster, {k: v for k, v in changes.items() if k != "device"})
    for name in ("samples", "classes", "vocabulary"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(flags, name)}")
    return show_plan(config, hardware, flags)


def show_plan(config: Any, hardware: Hardware, flags: Any) -> int:
    from megaregion.planning.layout import known_labels
    from megaregion.planning.report import choices_text, plan_text, plan_values, scaling_text, stages_text
    from megaregion.planning.scaling import SIZES, weak_scaling
    from megaregion.planning.search import all_plans, best_plans
    from megaregion.planning.stages import fullest, stage_plans

    labels = known_labels(config, flags.classes, flags.vocabulary)
    stages = stage_plans(config, hardware, labels, flags.samples)
    # What follows is about the first resolution, which most samples have.
    plan, worst = stages[0], fullest(stages)
    config, best = plan.layout.config, []
    if flags.choices or not plan.fits:
        best = best_plans(all_plans(config, hardware, labels, plan.samples), max(1, flags.choices))
    sizes = SIZES if flags.scaling is None else flags.scaling
    scaled = weak_scaling(plan, sizes) if sizes else []
    built = None
    if flags.dry_run is not None:
        from megaregion.planning.dry_run import build_rank

        built = build_rank(plan, flags.dry_run)
    if flags.json:
        values = {
            "plan": plan_values(plan),
            "stages": [plan_values(one) for one in stages],
            "choices": [plan_values(one) for one in best],
            "scaling": [plan_values(one) for one in scaled],
            "dry_run": built and built.values(),
        }
        print(json.dumps(values, indent=2))
    else:
        texts = [plan_text(plan)]
        texts += [stages_text(stages)] if len(stages) > 1 else []
        texts += [choices_text(best, plan)] if best else []
        texts += [scaling_text(scaled)] if scaled else []
        texts += [built.text()] if built else []
        print("\n\n".join(texts))
    if built is not None:
        built.check()
    if not worst.fits:
        size = worst.layout.config.model.image_size
        raise UserError(
            f"{config.name} needs {worst.over:.1f} GiB more than a rank of {hardware.name} may use "
            f"at {size} px; "
            + (
                "take one of the choices above"
                if worst is plan
                else "lower its stage's micro_batch, or set "
                f"train.activation_gib {max(1, int(worst.memory.activations / GIB - worst.over))}"
            )
        )
    return 0


def plan_goodput(arguments: list[str]) -> int:
    options = parse_goodput(arguments)
    for name in ("save", "write", "detection", "restart"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} must be 0 seconds or more, got {getattr(options, name)}")
    if min(options.gpus) < 1 or options.faults_per_gpu_day <= 0 or options.faults < 1:
        raise UserError("--gpus, --faults-per-gpu-day and --faults must be positive")
    if options.interval is not None and options.interval <= 0:
        raise UserError(f"--interval must be a positive number of seconds, got {options.interval}")
    times = options.save, options.write, options.detection, options.restart
    rows = [
        faults.goodput(
            faults.Cluster(gpus, options.faults_per_gpu_day, *times),
            options.interval,
            options.seed,
            options.faults,
        )
        for gpus in options.gpus
    ]
    print(json.dumps(rows, indent=2) if options.json else faults.table(rows))
    return 0


def parse_goodput(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plan.py goodput",
        description="Simulate a run under random faults; times are yours to measure (pretrain.py report).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[64, 1024], help="sizes of the run")
    add(
        "--faults-per-gpu-day",
        type=float,
        default=faults.LLAMA3_FAULTS,
        help="faults that end the run; the default is Llama 3's 419 in 54 days on 16,384 GPUs",
    )
    cluster = faults.Cluster
    add("--save", type=float, default=cluster.save, help="seconds that training stands still for a save")
    add("--write", type=float, default=cluster.write, help="seconds until a save is then published")
    add("--detection", type=float, default=cluster.detection, help="seconds from a fault to the run's end")
    add("--restart", type=float, default=cluster.restart, help="seconds from there to the next first step")
    add("--interval", type=float, help="seconds of training between saves; the best one when not given")
    add("--faults", type=int, default=100_000, help="simulated faults")
    add("--seed", type=int, default=0, help="seed of the faults' times")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run(main)
