"""The whole path on one machine: scenes, curation, training on several ranks, evaluation, export, reload.

    make demo          (or: .venv/bin/python tools/demo.py)

Each step is one of the project's own commands, printed before it runs. What is done is skipped, so an
interrupted demo goes on where it was. The run ends with the evaluation's table and leaves
runs/demo/report.html, runs/demo/evaluation.json and the exported encoder in runs/demo/hf.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmark.memory import peak_until_end
from megaregion.bounds import Folder, PositiveInt, Real, Steps, Text
from megaregion.command_line import Parser, run
from megaregion.errors import UserError
from megaregion.schemas.evaluation import EVALUATION, SUMMARY, read_evaluation, write_evaluation


def main() -> int:
    arguments = _parser().parse_args()
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    shutil.rmtree(arguments.run / "hf", ignore_errors=True)
    peak = 0
    for name, command in steps(arguments):
        print(f"\n== {name} ==\n$ {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        with subprocess.Popen([sys.executable, *command]) as process:
            peak = max(peak, peak_until_end(process))
        if process.returncode:
            raise UserError(f"the demo stopped in step '{name}' (exit code {process.returncode}); see above")
        seconds[name] = round(time.perf_counter() - started, 1)
    seconds["total"] = round(time.perf_counter() - began, 1)
    return conclude(arguments.run, seconds, peak, arguments.gate)


def steps(arguments: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Name and command of every step, in order."""
    scenes, curated, goal = arguments.data / "scenes", arguments.data / "curated", arguments.run
    counts = ["--train", str(arguments.train_scenes), "--test", str(arguments.test_scenes)]
    # What curation costs goes by the image, what is learned by what it shows.
    counts += ["--train-objects", "3", "6", "--train-words", "2", "5"]
    # Many regions, though a scene has three to six objects: parts and scenery teach what one looks like, too.
    keep = ["--max-regions", "28", "--min-objectness", "0.05", "--proposal-sides", "192", "128"]
    # Few scenes have few regions.
    clusters = str(min(1536, 8 * arguments.train_scenes))
    keep += ["--vocab", "384", "--clusters", clusters, "--labels-per-region", "8", "--crop-side", "112"]
    train = [
        "tools/pretrain.py", "--config", arguments.config, "--data.path", str(curated / "shards"),
        "--output", str(goal.parent), "--name", goal.name, "--resume", "auto",
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [
        ("scenes", ["tools/make_scenes.py", "--out", str(scenes), *counts]),
        (
            "curate",
            ["tools/curate.py", "--images", str(scenes / "train" / "images"), "--out", str(curated), *keep],
        ),
        (
            "train, 2 tensor x 2 data ranks",
            [*torchrun, "4", *train, "--parallel.tensor", "2", "--stop-at", str(arguments.first_steps)],
        ),
        ("train, resumed on 2 data ranks", [*torchrun, "2", *train, "--parallel.tensor", "1"]),
        ("evaluate", ["tools/evaluate.py", str(goal), "--scenes", str(scenes), "--limit", "2000"]),
        ("export", ["tools/convert_checkpoint.py", "to-hf", str(goal), str(goal / "hf"), "--check"]),
        ("load with transformers", ["-c", LOAD, str(goal / "hf"), str(scenes / "test" / "images")]),
    ]


LOAD = """
import sys, pathlib, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
folder, images = sys.argv[1], sorted(pathlib.Path(sys.argv[2]).iterdir())[:4]
processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
with torch.inference_mode():
    out = model(**processor([Image.open(i) for i in images], return_tensors="pt"))
shapes = {name: tuple(out[name].shape) for name in ("last_hidden_state", "pooler_output")}
print(type(model).__name__, shapes)
"""


def conclude(goal: Path, seconds: dict[str, float], memory: int, gate: float) -> int:
    """Add the demo's times and peak memory to evaluation.json, say what was reached, and judge the gate."""
    file = goal / EVALUATION
    evaluation = read_evaluation(file)
    evaluation = replace(
        evaluation,
        seconds={**evaluation.seconds, **{f"demo: {step}": value for step, value in seconds.items()}},
        demo_peak_memory_bytes=memory,
    )
    write_evaluation(file, evaluation)
    summary = evaluation.table(SUMMARY)
    found = {encoder: summary.rows[encoder]["region_knn"] for encoder in summary.rows}
    knn = {encoder: share.mean for encoder, share in found.items() if share is not None}
    print("\n== done ==")
    for name, value in seconds.items():
        print(f"{name:<34}{value:>8.1f} s")
    print(f"{'peak memory of all processes':<34}{memory / 1e9:>8.1f} GB")
    print(f"\nreport    {goal / 'report.html'}\nnumbers   {file}\nencoder   {goal / 'hf'}")
    print("region 5-NN: " + ", ".join(f"{name} {value:.1%}" for name, value in knn.items()))
    gain = knn["trained"] - knn["untrained"]
    met = "met" if gain >= gate else "missed"
    print(f"at least {gate:.0%} above untrained: {met} ({gain:+.1%})")
    return 0


def _parser() -> Parser:
    parser = Parser(description="Images in, a HuggingFace encoder out.")
    add = parser.add_flag
    add("--data", Folder, Path("data/demo"), "folder of scenes and shards")
    add("--run", Folder, Path("runs/demo"), "folder of the run")
    add("--config", Text("FILE"), "configs/demo.yaml", "settings of the training run")
    add("--train-scenes", PositiveInt, 3000, "scenes to curate and train on")
    add("--test-scenes", PositiveInt, 300, "held-out scenes of unseen cut-outs")
    add("--first-steps", Steps, 30, "steps on 4 ranks (2 tensor x 2 data), before those on 2 data ranks")
    # Below 0 any outcome is welcome.
    add("--gate", Real(-1, 1, "SHARE"), 0.10, "least gain in region 5-NN over the untrained encoder")
    return parser


if __name__ == "__main__":
    run(main)
