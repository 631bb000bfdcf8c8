"""Train a region encoder: python, torchrun or srun alike.

python tools/pretrain.py --config configs/demo.yaml
torchrun --nproc-per-node 4 tools/pretrain.py --config configs/demo.yaml --parallel.tensor 2
srun python tools/pretrain.py --config configs/vit_l14_64gpu.yaml --resume auto
"""

import os
import sys
from pathlib import Path

from megaregion.command_line import parse_run, run, run_parser
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.training.signals import StopRequest

# Before torch is imported: a signal that comes during the slow imports must not kill the rank.
STOP = StopRequest().install()


def main() -> int:
    parser = run_parser("Train a region encoder by region cluster discrimination.")
    parser.add_argument(
        "--resume",
        default="none",
        help="auto: go on from the newest whole checkpoint of this run, or start if there is none; "
        "none: start, and refuse if the run has checkpoints",
    )
    parser.add_argument(
        "--stop-at",
        type=int,
        help="save and leave after this step, for a later --resume auto; schedules still end at train.steps",
    )
    config, flags = parse_run(parser)
    if flags.resume not in ("auto", "none"):
        raise UserError(f"--resume must be auto or none, got {flags.resume}")
    return train(config, flags.resume == "auto", flags.stop_at)


def train(config: RunConfig, resume: bool, stop_at: int | None) -> int:
    from megaregion.parallel import topology
    from megaregion.training.metrics import LOG, open_log
    from megaregion.training.trainer import Trainer

    place = topology.join(config.parallel.tensor)
    folder = Path(config.output) / config.name
    checkpoints = folder / "checkpoints"
    if not resume and any(checkpoints.glob("step-*")):
        raise UserError(f"{checkpoints} holds checkpoints; use --resume auto, or another --name")
    open_log(folder / "logs", place.rank)
    trainer = Trainer(config, place, STOP)
    if place.rank == 0:
        write_run_files(folder, config, trainer.engine.settings)
        LOG.info(
            "%d ranks: tensor %d x data %d, ZeRO %d, %s, %d samples, %d object and %d text classes",
            place.world_size, place.tensor_size, place.data_size, config.parallel.zero_stage,
            config.train.precision, trainer.dataset.info.samples, trainer.dataset.info.object_classes,
            trainer.dataset.info.text_classes,
        )  # fmt: skip
    if resume and not trainer.state.resume(checkpoints) and place.rank == 0:
        LOG.info("no checkpoint in %s yet: starting", checkpoints)
    code = trainer.run(stop_at)
    topology.leave()
    return code


def write_run_files(folder: Path, config: RunConfig, deepspeed: dict[str, object]) -> None:
    import dataclasses
    import json

    import yaml

    (folder / "config.yaml").write_text(
        yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)
    )
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run(main)
