"""Plan a run before it starts.

python tools/plan.py run --config configs/vit_l14_64gpu.yaml --cluster h100x64
python tools/plan.py run --config configs/vit_bigg14_64gpu.yaml --dry-run 5
python tools/plan.py goodput --gpus 64 1024 --save 0.5 --write 20 --detection 45 --restart 120
"""

from __future__ import annotations

import argparse
import json
from typing import Annotated, Any

from megaregion.bounds import LARGE, Count, Positive, PositiveInt, Real, Seconds, Seed, Whole
from megaregion.command_line import (
    Parser,
    add_settings,
    add_settings_files,
    changed_settings,
    flag,
    run,
    run_settings,
)
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.planning import faults
from megaregion.planning.hardware import GIB, Hardware, Ranks, check_hardware, load_hardware

Samples = Annotated[int, Whole(1, LARGE)]
Faults = Annotated[int, Whole(1, 10**7)]
Interval = Annotated[float, Real(0, 10**7, "SECONDS", above=True)]


def main() -> int:
    flags = _parser().parse_args()
    return int(flags.command(flags))


def plan_run(flags: argparse.Namespace) -> int:
    config = run_settings(flags)
    hardware = changed_settings(flags, load_hardware(flags.cluster))
    check_hardware(hardware)
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


def plan_goodput(flags: argparse.Namespace) -> int:
    times = flags.save, flags.write, flags.detection, flags.restart
    rows = [
        faults.goodput(
            faults.Cluster(gpus, flags.faults_per_gpu_day, *times), flags.interval, flags.seed, flags.faults
        )
        for gpus in flags.gpus
    ]
    print(json.dumps(rows, indent=2) if flags.json else faults.table(rows))
    return 0


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="PART", help="what to plan; each has its own --help")
    _add_run(parts.add_parser(
        "run", help="memory, time, traffic, cost, best choices and scaling of a config on a cluster",
        description="What a run will need and take on a cluster. Every setting of a run may be given.",
    ))  # fmt: skip
    _add_goodput(parts.add_parser(
        "goodput", help="share of the wall time that steps get, under faults",
        description="Simulate a run under random faults; times are yours to measure (pretrain.py report).",
    ))  # fmt: skip
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", default="h100x64", help="preset of configs/clusters/, or a YAML file of such fields")
    add("--samples", type=flag(Samples), help="images of the whole run, if not train.steps'")
    add("--classes", type=flag(PositiveInt), help="object classes, if not those of data.path or 1,000,000")
    add("--vocabulary", type=flag(PositiveInt), help="text classes, if not those of data.path or 32,768")
    add("--choices", type=flag(Count), default=5, help="best choices shown; 0 for none")
    add("--scaling", type=flag(Ranks), nargs="*", help="sizes of the weak scaling table, if not 8 to 1,024")
    add("--dry-run", type=flag(Count), metavar="RANK", help="also build this rank; compare it with the plan")
    add("--json", action="store_true", help="print JSON instead of tables")
    add_settings(parser, Hardware(), flat=True, without=("name", "device"))
    add_settings_files(parser)
    add_settings(parser, RunConfig())
    parser.set_defaults(command=plan_run)


def _add_goodput(parser: argparse.ArgumentParser) -> None:
    add, cluster = parser.add_argument, faults.Cluster
    add("--gpus", type=flag(Ranks), nargs="+", default=[64, 1024], help="sizes of the run")
    add("--faults-per-gpu-day", type=flag(Positive), default=faults.LLAMA3_FAULTS,
        help="faults that end the run; the default is Llama 3's 419 in 54 days on 16,384 GPUs")  # fmt: skip
    add(
        "--save",
        type=flag(Seconds),
        default=cluster.save,
        help="seconds that training stands still for a save",
    )
    add("--write", type=flag(Seconds), default=cluster.write, help="seconds until a save is then published")
    add("--detection", type=flag(Seconds), default=cluster.detection,
        help="seconds from a fault to the run's end")  # fmt: skip
    add("--restart", type=flag(Seconds), default=cluster.restart,
        help="seconds from there to the next first step")  # fmt: skip
    add(
        "--interval", type=flag(Interval), help="seconds of training between saves; the best one if not given"
    )
    add("--faults", type=flag(Faults), default=100_000, help="simulated faults")
    add("--seed", type=flag(Seed), default=0, help="seed of the faults' times")
    add("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=plan_goodput)


if __name__ == "__main__":
    run(main)
