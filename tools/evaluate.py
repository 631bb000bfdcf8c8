"""Measure a run's encoder on held-out scenes, beside honest baselines, and write the run's report.

python tools/evaluate.py runs/demo --scenes data/scenes
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from megaregion.command_line import run
from megaregion.curation.embedder import load_embedder
from megaregion.errors import UserError
from megaregion.evaluation.encoders import CropEncoder
from megaregion.evaluation.network import open_run
from megaregion.evaluation.report import write_report
from megaregion.evaluation.results import table, write_json
from megaregion.evaluation.study import StudyConfig, conduct


def main() -> None:
    arguments = _parser().parse_args()
    began = time.perf_counter()
    opened = open_run(arguments.run, arguments.checkpoint)
    others = []
    if arguments.curation != "none":
        embedder = load_embedder(arguments.curation)
        others.append(CropEncoder("curation", embedder.embed, threads=max(1, arguments.workers)))
    config = StudyConfig(
        scenes=arguments.scenes,
        dataset=arguments.dataset or Path(opened.config.data.path),
        split=arguments.split,
        limit=arguments.limit,
        batch=arguments.batch,
        workers=arguments.workers,
        device=_device(arguments.device),
        projected=arguments.projected,
        seed=arguments.seed,
    )
    study = conduct(opened, config, others, _show_progress)
    study.seconds["total"] = time.perf_counter() - began
    suffix = "" if config.split == "test" else f"_{config.split}"
    numbers, page = opened.folder / f"evaluation{suffix}.json", opened.folder / f"report{suffix}.html"
    write_json(study, numbers)
    write_report(study, opened.folder / "metrics.jsonl", page)
    print(table(study))
    print(f"\n{numbers}\n{page}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure a run's encoder on scenes with known truth, beside the same network untrained, "
        "raw pixels and the curation encoder. Prints a table; RUN gets evaluation.json and report.html.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="the run's folder, with its checkpoints and metrics.jsonl")
    add("--scenes", type=Path, required=True, help="scene set of tools/make_scenes.py, with its truth")
    add("--dataset", type=Path, help="shards that the run was trained on; by default the run's data.path")
    add(
        "--split",
        choices=("test", "val"),
        default="test",
        help="held-out split to ask about; tune on val only (it writes evaluation_val.json), never on test",
    )
    add("--checkpoint", type=int, metavar="STEP", help="evaluate this step instead of the newest")
    add("--limit", type=int, default=4000, metavar="N", help="training objects in the gallery; 0 takes all")
    add("--batch", type=int, default=32, metavar="IMAGES", help="images that go through an encoder at once")
    add("--workers", type=int, default=2, metavar="THREADS", help="threads that read and crop-embed images")
    add("--device", default="auto", help="where the network computes: auto, cpu, cuda, cuda:1 ...")
    add("--curation", choices=("lite0", "none"), default="lite0", help="curation encoder to compare with")
    add("--projected", action="store_true", help="compare regions by the heads' embeddings, not by features")
    add("--seed", type=int, default=0, help="draws the gallery and the pictures of the report")
    return parser


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}); use cpu or auto") from None


def _show_progress(split: str, done: int, images: int) -> None:
    """One line that is rewritten; nothing where stderr is a file."""
    if sys.stderr.isatty():
        end = "\n" if done == images else ""
        print(f"\rencoding {split} scenes {done:>6} / {images}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
