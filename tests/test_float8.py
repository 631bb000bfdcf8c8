"""8-bit products change a run, but little, and say what they lack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import repository, tool
from test_run import command
from torch import nn
from toy import toy_dataset

from megaregion.errors import UserError
from megaregion.models.layers import TORCHAO, Linear, use_float8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_dataset(tmp_path_factory.mktemp("shards"))


def losses(dataset: Path, output: Path, paths: Path | None, *flags: str) -> list[float]:
    words = command(
        dataset, output, "--train.precision=bf16", "--train.steps=6", "--optimizer.lr=0.002", *flags
    )
    if paths is None:
        done = tool(*words[3:])
    else:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(paths), str(repository())])}
        done = subprocess.run(
            words, cwd=repository(), env=environment, capture_output=True, text=True, timeout=600, check=False
        )
    assert done.returncode == 0, done.stderr
    assert ("8 linears multiply in 8-bit floats" in done.stdout + done.stderr) == bool(flags)
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_loss_is_nearly_that_of_bf16(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torchao"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        TORCHAO,
    ]
    subprocess.run(install, check=True, timeout=300)
    exact = losses(dataset, tmp_path / "bf16", None)
    rounded = losses(dataset, tmp_path / "fp8", folder, "--train.fp8=true")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)


def test_what_it_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=f"train.fp8 needs torchao: pip install {TORCHAO}"):
        use_float8(nn.Sequential(Linear(32, 32)), torch.device("cpu"))
