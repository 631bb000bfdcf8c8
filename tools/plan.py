"""Plan a run before it starts.

python tools/plan.py run --config configs/vit_l14_64gpu.yaml --cluster h100x64
python tools/plan.py run --config configs/vit_bigg14_64gpu.yaml --dry-run 5
python tools/plan.py curate --images 400000000 --regions 5 --cluster h100x64
python tools/plan.py goodput --gpus 64 1024 --save 0.5 --write 20 --detection 45 --restart 120
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from megaregion.bounds import LARGE, Choice, Count, PositiveInt, Real, Seed, Text, Whole
from megaregion.command_line import Parser, changed_settings, run, run_settings
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.planning import faults
from megaregion.planning.faults import FaultModel
from megaregion.planning.hardware import GIB, Hardware, Load, Ranks, check_hardware, load_hardware

if TYPE_CHECKING:
    from megaregion.planning.plan import Plan


def main() -> int:
    flags = _parser().parse_args()
    return int(flags.command(flags))


def plan_run(flags: argparse.Namespace) -> int:
    if flags.device:
        if flags.dry_run is None:
            raise UserError("--device cuda counts a step of one rank; name it by --dry-run RANK")
        # Torch asks who answers for CUDA when it is imported.
        from megaregion.planning.cuda_guard import load_guard

        load_guard()
    from megaregion.planning import plan as planner
    from megaregion.planning import report
    from megaregion.planning.layout import known_labels

    config = run_settings(flags)
    hardware = changed_settings(flags, load_hardware(flags.cluster))
    check_hardware(hardware)
    labels = known_labels(config, flags.classes, flags.vocabulary)
    stages = planner.stage_plans(config, hardware, labels, flags.samples)
    # What follows is about the first resolution, which most samples have.
    plan, best, ran = stages[0], [], None
    if flags.choices or not plan.fits:
        plans = planner.all_plans(plan.layout.config, hardware, labels, plan.samples)
        best = planner.best_plans(plans, max(1, flags.choices))
    scaled = planner.weak_scaling(plan, planner.SIZES if flags.scaling is None else flags.scaling)
    if flags.dry_run is not None:
        from megaregion.planning.dry_run import dry_run

        ran = dry_run(plan, flags.dry_run, gpu=flags.device is not None)
    if flags.json:
        counted = ran.values() if ran else {"dry_run": None, "gpu_step": None}
        print(json.dumps(report.values(stages, best, scaled) | counted, indent=2))
    else:
        print(report.text(stages, best, scaled) + (f"\n\n{ran.text()}" if ran else ""))
    if ran is not None:
        ran.check()
    _check_memory(planner.fullest(stages), plan)
    return 0


def _check_memory(worst: Plan, first: Plan) -> None:
    """Refuse a run of which a resolution does not fit; the choices are about the first."""
    if worst.fits:
        return
    config, way_out = worst.layout.config, "take one of the choices above"
    if worst is not first:
        budget = max(1, int(worst.memory.activations / GIB - worst.over))
        way_out = f"lower its stage's micro_batch, or set train.activation_gib {budget}"
    raise UserError(
        f"{config.name} needs {worst.over:.1f} GiB more than a rank of {worst.hardware.name} may use at "
        f"{config.model.image_size} px; {way_out}"
    )


def plan_curate(flags: argparse.Namespace) -> int:
    # Torch asks who answers for CUDA when it is imported.
    from megaregion.planning.cuda_guard import load_guard

    load_guard()
    from megaregion.curation import costs
    from megaregion.planning import curation

    load = changed_settings(flags, Load())
    hardware = changed_settings(flags, load_hardware(flags.cluster))
    check_hardware(hardware)
    counts = curation.count(lambda device: costs.networks(load.encoder, load.sam, load.grid, device))
    host = costs.measure()
    plans = curation.plan_stages(load, hardware, counts, host)
    if flags.json:
        print(json.dumps(curation.values(plans, counts, host), indent=2))
    else:
        print(curation.text(load, hardware, plans, host))
    return 0


def plan_goodput(flags: argparse.Namespace) -> int:
    model = changed_settings(flags, FaultModel())
    rows = [
        faults.goodput(dataclasses.replace(model, gpus=gpus), flags.interval, flags.seed, flags.faults)
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
    _add_curate(parts.add_parser(
        "curate", help="hours of curation's stages on a cluster",
        description="Hours of each stage of curation on a cluster. Networks are counted on fake CUDA "
        "tensors, which needs g++; what processors do is measured here, about 5 s.",
    ))  # fmt: skip
    _add_goodput(parts.add_parser(
        "goodput", help="share of the wall time that steps get, under faults",
        description="Simulate a run under random faults; times are yours to measure (pretrain.py report).",
    ))  # fmt: skip
    return parser


def _add_run(parser: Parser) -> None:
    add = parser.add_flag
    add("--cluster", Text("NAME"), "h100x64", "preset of configs/clusters/, or a YAML file of such fields")
    add("--samples", Whole(1, LARGE), None, "images of the whole run, if not train.steps'")
    add("--classes", PositiveInt, None, "object classes, if not those of data.path or 1,000,000")
    add("--vocabulary", PositiveInt, None, "text classes, if not those of data.path or 32,768")
    add("--choices", Count, 5, "best choices shown; 0 for none")
    add("--scaling", Ranks, None, "sizes of the weak scaling table, if not 8 to 1,024", nargs="*")
    add("--dry-run", Count, None, "also build this rank; compare it with the plan", metavar="RANK")
    add("--device", Choice(("cuda",)), None, "count a step of --dry-run's rank on fake CUDA tensors instead")
    add("--json", bool, False, "print JSON instead of tables")
    parser.add_settings(Hardware(), flat=True, without=("name", "device"))
    parser.add_settings_files()
    parser.add_settings(RunConfig())
    parser.set_defaults(command=plan_run)


def _add_curate(parser: Parser) -> None:
    add = parser.add_flag
    add("--cluster", Text("NAME"), "h100x64", "preset of configs/clusters/, or a YAML file of such fields")
    add("--json", bool, False, "print JSON instead of a table")
    parser.add_settings(Hardware(), flat=True, without=("name", "device"))
    parser.add_settings(Load(), flat=True)
    parser.set_defaults(command=plan_curate)


def _add_goodput(parser: Parser) -> None:
    add = parser.add_flag
    add("--gpus", Ranks, [64, 1024], "sizes of the run", nargs="+")
    parser.add_settings(FaultModel(), flat=True, without=("gpus",))
    add("--interval", Real(0, 10**7, "SECONDS", above=True), None,
        "training between two saves; the best one if not given")  # fmt: skip
    add("--faults", Whole(1, 10**7), 100_000, "simulated faults")
    add("--seed", Seed, 0, "seed of the faults' times")
    add("--json", bool, False, "print JSON instead of a table")
    parser.set_defaults(command=plan_goodput)


if __name__ == "__main__":
    run(main)
