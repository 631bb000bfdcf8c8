"""Train a region encoder: python, torchrun or srun alike.

python tools/pretrain.py --config configs/demo.yaml
torchrun --standalone --nproc-per-node 4 tools/pretrain.py --config configs/demo.yaml --parallel.tensor 2
srun python tools/pretrain.py --config configs/vit_l14_64gpu.yaml --resume auto
python tools/pretrain.py report runs/NAME         what the wall time of all starts of a run went into
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaregion.bounds import Choice, Folder, Steps, Text, Whole
from megaregion.checks import fitting_nodes
from megaregion.command_line import Parser, run, run_settings
from megaregion.config import RunConfig
from megaregion.errors import StopRequest, UserError
from megaregion.settings import to_yaml

# Before torch is imported: a signal that comes during the slow imports must not kill the rank.
STOP = StopRequest().install()

NODES = Whole(1, 100_000)
Begin = Callable[[Any], None]
"""Puts weights into a transformer."""


def main() -> int:
    flags = _parser().parse_args()
    return int(flags.command(flags))


def pretrain(flags: argparse.Namespace) -> int:
    config = run_settings(flags)
    if flags.fit_nodes is not None:
        print(fitting_nodes(config, flags.fit_nodes, flags.per_node))
        return 0
    from megaregion.parallel import topology
    from megaregion.training.beside import BackgroundEvaluation
    from megaregion.training.clock import parse_window
    from megaregion.training.metrics import check_installed
    from megaregion.training.preflight import check_machines

    window = parse_window(flags.profile) if flags.profile else None
    evaluation = BackgroundEvaluation(config)
    check_installed(config.metrics.loggers)
    # A collective must not give up before the watchdog has named who is missing from it.
    patience = 30 + int(config.train.watchdog_seconds / 15)
    place = topology.join(config.parallel.tensor, patience, config.train.deterministic)
    if flags.preflight:
        code = check_machines(config, place)
        if code or flags.preflight == "only":
            topology.leave()
            return code
    return train(config, place, flags.resume == "auto", flags.stop_at, window, evaluation)


def train(
    config: RunConfig,
    place: Any,
    resume: bool,
    stop_at: int | None,
    window: tuple[int, int] | None,
    evaluation: Any,
) -> int:
    from megaregion.parallel import topology
    from megaregion.training.beside import Watchdog
    from megaregion.training.clock import Clock
    from megaregion.training.metrics import Trackers, open_log
    from megaregion.training.trainer import Trainer

    folder = Path(config.output) / config.name
    checkpoints = folder / "checkpoints"
    if not resume and any(checkpoints.glob("step-*")):
        raise UserError(f"{checkpoints} holds checkpoints; use --resume auto, or another --name")
    log = open_log(folder / "logs", place.rank)
    clock = Clock.of_run(config, place)
    watchdog = Watchdog(clock, place, folder / "logs", config.train.watchdog_seconds).start()
    after_save = evaluation.after_save if place.rank == 0 else lambda step: None
    try:
        begin = first_weights(config, checkpoints, resume, place.rank == 0)
        trainer = Trainer(config, place, STOP, clock, window, after_save, begin)
    except UserError:
        log.forget()
        raise
    trainer.start(resume)
    trackers = Trackers(config, folder)
    if place.rank == 0:
        # A start that is refused must not change what the run says of itself.
        write_run_files(folder, config, trainer.engine.settings)
        evaluation.begin(trainer.state.step, trackers)
    try:
        code = trainer.run(stop_at, trackers)
    except BaseException:
        watchdog.keep_verdict()
        evaluation.stop()
        trackers.close(early=True)
        raise
    STOP.leave()
    watchdog.stop()
    if code:
        # A preempted run has no time for more; once other ranks are gone, srun ends this one.
        evaluation.stop()
        trackers.close(early=True)
    topology.leave()
    # Only rank 0 has them; the others are gone by then.
    evaluation.finish()
    trackers.close()
    return code


def first_weights(config: RunConfig, checkpoints: Path, resume: bool, verify: bool) -> Begin | None:
    """What puts the weights of --init into the transformer; None without it, or where the run goes on."""
    from megaregion.checkpoint.pretrained import open_pretrained
    from megaregion.checkpoint.reader import usable_folders
    from megaregion.training.metrics import LOG

    if not config.init or (resume and usable_folders(checkpoints)):
        return None
    pretrained = open_pretrained(Path(config.init), verify)
    for notice in pretrained.advice(config) if verify else ():
        LOG.warning("init %s: %s", config.init, notice)
    return pretrained.fill


def report(flags: argparse.Namespace) -> int:
    import json

    from megaregion.schemas.run import measure

    goodput = measure(flags.run)
    print(json.dumps(vars(goodput)) if flags.json else goodput.table())
    return 0


def write_run_files(folder: Path, config: RunConfig, deepspeed: dict[str, object]) -> None:
    import json

    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed, indent=2) + "\n")


def _parser() -> Parser:
    parser = Parser(description="Train a region encoder by region cluster discrimination.")
    parser.set_defaults(command=pretrain)
    add = parser.add_flag
    add("--resume", Choice(("auto", "none")), "none",
        "auto: go on from the newest whole checkpoint of this run, or start if there is none; "
        "none: start, and refuse if the run has checkpoints")  # fmt: skip
    add("--stop-at", Steps, None, "save and leave after this step, for a later --resume auto; schedules "
        "still end at train.steps", metavar="STEP")  # fmt: skip
    add("--profile", Text("STEPS"), None,
        "profile these steps, as 10 (three from there) or 10:20, into the run's folder: profile/ gets "
        "a trace for Chrome or TensorBoard and a memory snapshot of every rank")  # fmt: skip
    add("--preflight", Choice(("only", "first")), None,
        "look at the machines (versions, devices, bandwidth, dataset, teacher, disk, clocks) and leave, or "
        "train if they are fit (first); exit code 88 if a host is unfit, 2 for what a person must mend",
        nargs="?", const="only")  # fmt: skip
    add("--fit-nodes", NODES, None, "only check the settings and print the most nodes, N or fewer, that keep "
        "train.global_batch")  # fmt: skip
    add("--per-node", NODES, 1, "ranks of a node, for --fit-nodes")
    parser.add_settings_files()
    parser.add_settings(RunConfig())
    commands = parser.add_subparsers(title="about a run that is under way or done", metavar="COMMAND")
    told = commands.add_parser("report", help="what the wall time of all starts of a run went into")
    told.set_defaults(command=report)
    told.add_flag("run", Folder, None, "the run's folder, as runs/NAME", metavar="RUN")
    told.add_flag("--json", bool, False, "seconds as JSON instead of a table")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run(main, teardown=False)
