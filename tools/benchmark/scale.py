"""Curation end to end on images that are composed here, with their masks: what a million of them cost."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from PIL import Image

from benchmark.measure import Stopwatch, passing_folder
from benchmark.memory import status_bytes
from benchmark.part import FOLDER, Case, part
from megaregion.bounds import COUNT, PositiveInt, Whole, Workers
from megaregion.curation.pipeline import LIST
from megaregion.curation.stages import NAMES
from megaregion.data.sample import encode_mask
from megaregion.errors import UserError, spread

SIDE, SHAPES = 96, 5
"""Pixels of an image's side, and the masks that come with it."""
WIDTH = 32
"""Channels of the cheap embedder."""
LINEAR, FLAT = 0.9, 1 / 1.1
"""Least ratios of the small run's time of an image, and of its memory, to the large run's."""
BYTES_PER_IMAGE = 40_000
"""Room on the disk for an image, its shard and what the stages keep, with some to spare."""
KILLED = (("embed", "manifest.json"), ("cluster", "passes.npz"), ("pack", "manifest.json"))
"""Where the second run is killed: in the middle of a stage, known by such files of it."""


class Cost(NamedTuple):
    """What a command took with all processes that it started."""

    wall: float
    processor: float
    """Seconds of all cores."""
    memory: float
    """Greatest resident MiB of the process itself."""
    worker: float
    """Greatest resident MiB of one that it started; 0 where it started none."""


@part(
    ("--images", Whole(2, COUNT), 1_000_000, "images of the large run"),
    ("--factor", Whole(2, COUNT), 5, "how many times smaller the run is that it is compared with"),
    ("--tar-images", PositiveInt, 10_000, "images of a tar"),
    ("--piece-images", PositiveInt, 1000, "images of a piece"),
    ("--clusters", PositiveInt, 65_536, "object classes of both runs"),
    ("--passes", PositiveInt, 3, "passes of k-means, at most"),
    ("--workers", Workers, 2, "processes of each stage"),
    FOLDER,
)
def scale(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """What each stage of curation costs for a million images, and whether a larger run costs more an image.

    Ours is the large run, the peer a smaller one in the same minutes: seconds for a million images by the
    wall clock and of all cores, and the peak memory of the command and of its workers. Ratios are small /
    large, so 1 is linear, and flat memory within 10 percent is 0.91. Images come in tars with five masks
    each; a tiny random CLIP embeds them. The small input runs once more, killed by SIGKILL in the middle of
    three stages and started again: its shards have the same bytes.
    """
    sizes = {"small": max(1, options.images // options.factor), "large": options.images}
    # Some of a shape's regions are dropped, as near-duplicates of another one's.
    if options.clusters > (most := sizes["small"] * SHAPES * 4 // 5):
        raise UserError(
            f"--clusters must be at most {most:,} for {sizes['small']:,} images, got {options.clusters:,}"
        )
    with passing_folder(options.folder, BYTES_PER_IMAGE * options.images) as folder:
        encoder = save_tiny_encoder(folder / "encoder")
        costs: dict[str, dict[str, Cost]] = {}
        for name, images in sizes.items():
            compose_tars(folder / name, images, options.tar_images, options.workers)
            command = curation_command(folder / name, folder / f"{name}-run", encoder, options)
            commands = {stage: _stage_command(command, stage) for stage in (LIST, *NAMES)}
            commands["status"] = [*command[:2], "status", f"--out={folder / name}-run"]
            costs[name] = {}
            for stage, words in commands.items():
                costs[name][stage] = cost_of(words)
                print(f"{images:,} images, {stage}: {costs[name][stage]}", file=sys.stderr, flush=True)
        yield from _compare_costs(costs, sizes)
        command = curation_command(folder / "small", folder / "killed-run", encoder, options)
        kills = run_with_kills(command, folder / "killed-run")
        same = digests(folder / "small-run" / "shards") == digests(folder / "killed-run" / "shards")
        told = f"{sizes['small']:,} images: shards after {kills} kills as without"
        yield Case(told, 1.0, float(same), "", 1.0, failure="" if same else "other bytes")


def _compare_costs(costs: Mapping[str, Mapping[str, Cost]], sizes: Mapping[str, int]) -> Iterator[Case]:
    """A row for each stage and figure."""
    told = f"{sizes['large']:,} images / {sizes['small']:,}"
    for stage, cost in costs["large"].items():
        large, small = cost._asdict(), costs["small"][stage]._asdict()
        for figure, unit, goal in (
            ("wall", "s/M", 0.0), ("processor", "s/M", LINEAR),
            ("memory", "MiB", FLAT), ("worker", "MiB", FLAT),
        ):  # fmt: skip
            ours, peer = large[figure], small[figure]
            if unit == "s/M":
                ours, peer = ours * 1e6 / sizes["large"], peer * 1e6 / sizes["small"]
            if ours:
                yield Case(f"{stage}, {figure}, {told}", ours, peer, unit, goal)


def cost_of(command: Sequence[str]) -> Cost:
    """Run a command to its end.

    Raises:
        UserError: It fails.
    """
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    memory = worker = 0
    while process.poll() is None:
        with suppress(psutil.Error, OSError, ValueError):
            memory = max(memory, status_bytes("VmHWM", process.pid))
            for child in psutil.Process(process.pid).children(recursive=True):
                worker = max(worker, status_bytes("VmHWM", child.pid))
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    said = process.communicate()[1]
    if process.returncode:
        last = (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(f"{' '.join(command[1:4])} failed: {last}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, seconds, memory / 2**20, worker / 2**20)


def curation_command(images: Path, out: Path, encoder: Path, options: argparse.Namespace) -> list[str]:
    """A run of tools/curate.py over composed tars."""
    return [
        sys.executable, str(Path(__file__).parents[1] / "curate.py"), f"--images={images}", f"--out={out}",
        f"--workers={options.workers}", f"--piece-images={options.piece_images}", "--ocr=none",
        f"--samples-per-shard={options.tar_images}", f"--clusters={options.clusters}", "--embedder=clip",
        f"--clip={encoder}", f"--cluster-iterations={options.passes}", "--vocab=384", "--chunk-memory=128",
    ]  # fmt: skip


def _stage_command(command: Sequence[str], stage: str) -> list[str]:
    """A stage as a job of a cluster does it."""
    return [*command, f"--stage={stage}", *([] if stage == LIST else ["--piece=0", "--of=1"])]


def run_with_kills(command: Sequence[str], out: Path) -> int:
    """Run to the end, killed with all its workers in the middle of some stages; gives the kills."""
    kills = 0
    for stage, name in KILLED:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and not any((out / "stages" / stage).rglob(f"*{name}")):
            time.sleep(0.02)
        if process.poll() is None:
            kills += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    cost_of(command)
    return kills


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


# What is curated


def compose_tars(folder: Path, images: int, tar_images: int, workers: int) -> None:
    """Write images with their masks, as SA-1B lays them out, into tars."""
    folder.mkdir()
    spans = [range(first, min(first + tar_images, images)) for first in range(0, images, tar_images)]
    for _ in spread(partial(_write_tar, folder), spans, workers):
        pass


def _write_tar(folder: Path, numbers: range) -> None:
    with tarfile.open(folder / f"sa_{numbers.start:09d}.tar", "w") as tar:
        for number in numbers:
            for ending, content in zip(("jpg", "json"), compose(number), strict=True):
                header = tarfile.TarInfo(f"sa_{number}.{ending}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def compose(number: int) -> tuple[bytes, bytes]:
    """An image of discs and boxes as JPEG, and the JSON of their masks; a function of its number."""
    rng = np.random.Generator(np.random.Philox(key=number))
    pixels = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (SIDE, SIDE, 3)).copy()
    rows, columns = np.ogrid[:SIDE, :SIDE]
    annotations = []
    for half, disc in zip(rng.integers(8, 22, SHAPES).tolist(), rng.random(SHAPES) < 0.5, strict=True):
        y, x = rng.integers(half, SIDE - half, 2).tolist()
        far_y, far_x = abs(rows - y), abs(columns - x)
        mask = far_y**2 + far_x**2 < half**2 if disc else np.maximum(far_y, far_x) < half
        pixels[mask] = rng.integers(0, 256, 3, dtype=np.uint8)
        runs = encode_mask(mask)
        annotations.append(
            {
                "segmentation": {"size": list(runs.size), "counts": list(runs.counts)},
                "bbox": [x - half + 1, y - half + 1, 2 * half - 1, 2 * half - 1],
                "predicted_iou": 0.9,
            }
        )
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=80)
    record = {"image": {"width": SIDE, "height": SIDE}, "annotations": annotations}
    return stream.getvalue(), json.dumps(record).encode()


def save_tiny_encoder(folder: Path) -> Path:
    """Random weights of a CLIP of one narrow block, 32 x 32 pixels."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    CLIPVisionModel(CLIPVisionConfig(**size, image_size=32, patch_size=16)).save_pretrained(folder)
    return folder
