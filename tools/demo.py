"""The whole path on one machine: scenes, curation, training on several ranks, evaluation, export, reload.

    make demo          (or: .venv/bin/python tools/demo.py)

Each step is one of the project's own commands, printed before it runs. What is done is skipped, so an
interrupted demo goes on where it was. The run ends with the evaluation's table and leaves
runs/demo/report.html, runs/demo/evaluation.json and the exported encoder in runs/demo/hf.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megaregion.command_line import run
from megaregion.errors import UserError

DATA, RUN = Path("data/demo"), Path("runs/demo")
CONFIG = "configs/demo.yaml"
FIRST_STEPS = 60
"""Steps on 4 ranks (2 tensor x 2 data) before the run goes on with 2 data ranks."""
GATE = 0.10
"""Region 5-NN of the trained encoder must be better than that of the untrained one by this much."""


def main() -> int:
    arguments = _parser().parse_args()
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    shutil.rmtree(RUN / "hf", ignore_errors=True)
    for name, command in steps(arguments.train_scenes, arguments.test_scenes):
        print(f"\n== {name} ==\n$ {shlex.join(command)}", flush=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *command], check=False)
        if done.returncode:
            raise UserError(f"the demo stopped in step '{name}' (exit code {done.returncode}); see above")
        seconds[name] = round(time.perf_counter() - started, 1)
    seconds["total"] = round(time.perf_counter() - began, 1)
    return conclude(seconds)


def steps(train_scenes: int, test_scenes: int) -> list[tuple[str, list[str]]]:
    """Name and command of every step, in order."""
    scenes, curated = DATA / "scenes", DATA / "curated"
    counts = ["--train", str(train_scenes), "--test", str(test_scenes)]
    train = [
        "tools/pretrain.py", "--config", CONFIG, "--data.path", str(curated / "shards"),
        "--output", str(RUN.parent), "--name", RUN.name, "--resume", "auto",
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [
        ("scenes", ["tools/make_scenes.py", "--out", str(scenes), *counts]),
        ("curate", ["tools/curate.py", "--images", str(scenes / "train" / "images"), "--out", str(curated)]),
        (
            "train, 2 tensor x 2 data ranks",
            [*torchrun, "4", *train, "--parallel.tensor", "2", "--stop-at", str(FIRST_STEPS)],
        ),
        ("train, resumed on 2 data ranks", [*torchrun, "2", *train, "--parallel.tensor", "1"]),
        ("evaluate", ["tools/evaluate.py", str(RUN), "--scenes", str(scenes)]),
        ("export", ["tools/convert_checkpoint.py", "to-hf", str(RUN), str(RUN / "hf"), "--check"]),
        ("load with transformers", ["-c", LOAD, str(RUN / "hf"), str(scenes / "test" / "images")]),
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


def conclude(seconds: dict[str, float]) -> int:
    """Add the demo's times to evaluation.json, say what was reached, and judge the gate."""
    file = RUN / "evaluation.json"
    result = json.loads(file.read_text())
    result["seconds"] = {**result.get("seconds", {}), **{f"demo: {k}": v for k, v in seconds.items()}}
    file.write_text(json.dumps(result, indent=1) + "\n")
    knn = {row["encoder"]: row["region_knn"] for row in result["rows"]}
    print("\n== done ==")
    for name, value in seconds.items():
        print(f"{name:<34}{value:>8.1f} s")
    print(f"\nreport    {RUN / 'report.html'}\nnumbers   {file}\nencoder   {RUN / 'hf'}")
    print("region 5-NN: " + ", ".join(f"{name} {value:.1%}" for name, value in knn.items()))
    gain = knn["trained"] - knn["untrained"]
    if gain < GATE:
        print(f"the trained encoder should be {GATE:.0%} above the untrained one; it is {gain:.1%} above")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Images in, a HuggingFace encoder out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--train-scenes", type=int, default=2400, help="scenes to curate and train on")
    parser.add_argument("--test-scenes", type=int, default=300, help="held-out scenes of unseen cut-outs")
    return parser


if __name__ == "__main__":
    run(main)
