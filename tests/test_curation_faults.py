"""Curation under fire: any process killed at any moment, and the outcome is the same, byte for byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from curation_scenes import contents, run, scene, workers_of
from drill import Drill
from launch import repository

from megaregion.files import file_sha256, read_json

KILLS = 20
SMALL = {"clusters": 8, "vocab": 384, "piece_images": 2, "samples_per_shard": 4, "crop_side": 96}

pytestmark = pytest.mark.drill


def test_twenty_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(60):
        scene(number).save(images / f"scene-{number:02d}.jpg", quality=92)
    run(images, tmp_path / "undisturbed", **SMALL)
    out, draw = tmp_path / "out", random.Random(4)
    flags = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "tools/curate.py", "--images", images, "--out", out, "--workers", "2", *flags]
    kills = starts = 0
    while True:
        process = subprocess.Popen([*map(str, command)], cwd=repository(), stderr=subprocess.PIPE, text=True)
        starts += 1
        while process.poll() is None and kills < KILLS:
            time.sleep(draw.uniform(0.2, 4.0))
            # One kill in four takes the whole run down, the others a worker that it replaces.
            victims = [process.pid] if draw.random() < 0.25 else workers_of(process.pid)
            if victims and process.poll() is None:
                os.kill(draw.choice(victims), signal.SIGKILL)
                kills += 1
        _, errors = process.communicate(timeout=600)
        if process.returncode == 0:
            assert contents(out / "shards") == contents(tmp_path / "undisturbed" / "shards")
            if kills == KILLS:
                break
            shutil.rmtree(out)  # A fast machine was done before the last kill: once more from the start.
            continue
        assert process.returncode == -signal.SIGKILL or "died (exit code -9" in errors, errors
        assert starts < 3 * KILLS


def test_a_rank_of_k_means_that_is_killed_between_passes_costs_one_pass_and_no_bit(
    drill: Drill, tmp_path: Path
) -> None:
    images, whole = tmp_path / "images", tmp_path / "whole"
    images.mkdir()
    for number in range(8):
        scene(number).save(images / f"scene-{number}.jpg", quality=92)
    many = SMALL | {"clusters": 1000, "cluster_iterations": 40}
    for stage in ("list", "propose+ocr+embed"):
        run(images, whole, stage, **many)
    for number, folder in enumerate(sorted((whole / "stages" / "embed").glob("0*"))):
        rng = np.random.Generator(np.random.Philox(key=number))
        np.save(folder / "features.npy", rng.standard_normal((10_000, 128)).astype(np.float16))
        manifest = read_json(folder / "manifest.json")
        name, path = f"stages/embed/{folder.name}/features.npy", folder / "features.npy"
        manifest["files"][name] = (path.stat().st_size, file_sha256(path))
        (folder / "manifest.json").write_text(json.dumps(manifest))
    killed = Path(shutil.copytree(whole, tmp_path / "killed"))
    flags = [part for key, value in many.items() for part in (f"--{key.replace('_', '-')}", str(value))]

    def submit(out: Path) -> str:
        return drill.cluster.submit(
            "--nodes=2", "--ntasks=2", "--cpus-per-task=1", f"--output={out}.log",
            repository() / "slurm" / "curate.sh", "--job", "cluster", "1",
            "--images", images, "--out", out, *flags,
            environment={
                "MEGAREGION_HOME": str(repository()), "MEGAREGION_PYTHON": sys.executable,
                "PYTHONPATH": str(repository()),
            },
            cwd=tmp_path,
        )  # fmt: skip

    def finish(job: str, out: Path) -> tuple[str, str]:
        return drill.cluster.finish(job, 600), Path(f"{out}.log").read_text()

    state, log = finish(submit(whole), whole)
    assert state == "COMPLETED", log
    job, kept = submit(killed), killed / "stages" / "cluster" / ".00000-passes.npz"
    drill.cluster.until(kept.exists, 300, "the first pass")
    os.kill(drill.cluster.ranks(job, "curate.py", "MASTER_PORT")[1], signal.SIGKILL)
    state, log = finish(job, killed)
    assert state == "FAILED", log
    assert kept.exists(), log
    state, log = finish(submit(killed), killed)
    assert state == "COMPLETED", log
    assert not kept.exists()
    centers = [each / "stages" / "cluster" / "00000" / "centers.npy" for each in (whole, killed)]
    assert centers[0].read_bytes() == centers[1].read_bytes()
