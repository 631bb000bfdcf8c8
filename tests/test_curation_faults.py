"""Curation under fire: any process killed at any moment, and the dataset is the same, byte for byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from curation_scenes import contents, run, scene, workers_of
from launch import repository

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
