"""What is read of a huge dataset beside its images: lists, manifests, dataset.json, labels."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from benchmark.loader import FAR, RESUME_SECONDS, read_as_trained
from benchmark.measure import Stopwatch, passing_folder
from benchmark.memory import PeakMemory
from benchmark.part import FOLDER, Case, part
from benchmark.scale import compose_tars, cost_of
from megaregion.atlas.groups import count_regions
from megaregion.atlas.settings import AtlasSettings
from megaregion.atlas.source import BATCH, CuratedSource
from megaregion.bounds import COUNT, PositiveInt, Whole, Workers
from megaregion.config import DataConfig
from megaregion.curation.inputs.find import find_images
from megaregion.curation.inputs.source import TARS, Listing, write_listing
from megaregion.curation.pipeline import curate, open_job, record_run
from megaregion.curation.settings import (
    ClusterSettings,
    CurationSettings,
    EmbedSettings,
    ImageSettings,
    OcrSettings,
    PackSettings,
    TokenizerSettings,
)
from megaregion.curation.stages import NAMES, make_stages
from megaregion.curation.stages.cluster import CENTERS
from megaregion.curation.stages.pack import ENTRY
from megaregion.curation.stages.stage import Job, Manifest, Piece, recipes_of
from megaregion.data.loader import RegionLoader
from megaregion.data.shards import ShardedDataset
from megaregion.files import file_sha256, read_json
from megaregion.parallel import topology
from megaregion.training.preflight import open_dataset

LIST_SECONDS, STATUS_SECONDS, OPEN_SECONDS, RANK_BYTES = 600.0, 10.0, 1.0, 200 * 2**20
"""Most that a list, a status, and opening the dataset may take; most memory that a rank spends on it."""
LISTERS = 64
"""Processes that a first list is reckoned for."""
HOST = 8
"""Ranks of a host."""
COUNTED = 20 * BATCH
"""Samples of which the atlas's count is timed."""
PASSES = 2


class Size(NamedTuple):
    """How much is told of."""

    tars: int
    tar_images: int
    clusters: int
    channels: int


@part(
    ("--tars", Whole(2, COUNT), 45_000, "tars, and as many pieces of each stage and shards"),
    ("--tar-images", PositiveInt, 8_889, "images of each, with five regions"),
    ("--clusters", PositiveInt, 1_000_000, "centers"),
    ("--channels", PositiveInt, 768, "of a center"),
    ("--listed", PositiveInt, 450, "tars of which a first list is timed"),
    ("--ranks", Whole(2, 4096), 64, "ranks that open the dataset together, 8 of a host"),
    ("--workers", Workers, 2, "processes that curate the tar which all others repeat"),
    FOLDER,
)
def metadata(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """List, status, publish, open, first batch and the atlas's count where only the metadata is large.

    One tar is composed and curated; all others are hard links to it, and so are their pieces and shards,
    under manifests of their own. By default 400 million images with 2 billion regions. Ratios are
    limit / ours.
    """
    size = Size(options.tars, options.tar_images, options.clusters, options.channels)
    with passing_folder(options.folder, 4 * size.clusters * size.channels * 2 + 40_000 * size.tars) as folder:
        _curate_one(folder, size, options.workers)
        told = f"{size.tars:,} tars"
        job = _repeat(folder, size)
        listed = min(options.listed, size.tars)
        seconds = _list_first(folder, listed) * size.tars / listed / LISTERS
        yield Case(
            f"list, first, in {LISTERS} processes, at the rate of {listed:,} tars in one, {told}",
            seconds, LIST_SECONDS, "s", 1.0,
        )  # fmt: skip
        yield from _curation_commands(folder, job, told)
        shards = job.shards
        yield from _open_on_ranks(shards, options.ranks)
        seconds, grown = _alone(_first_batch, shards)
        yield Case("open and first batch at position 10^9", seconds, OPEN_SECONDS + RESUME_SECONDS, "s", 1.0)
        yield Case("memory of it", grown / 2**20, RANK_BYTES / 2**20, "MiB", 1.0)
        counted = min(COUNTED, size.tars * size.tar_images)
        seconds, grown = _alone(_count, job.store.root, counted, size.clusters)
        hours = seconds / counted * size.tars * size.tar_images / 3600
        yield Case(f"the atlas's count, at the rate of {counted:,} images", hours, 24.0, "h")
        yield Case("memory of it", grown / 2**20, 2**10, "MiB")


# What is read


def _settings(size: Size, clusters: int) -> CurationSettings:
    return CurationSettings(
        image=ImageSettings(piece_images=size.tar_images),
        embed=EmbedSettings(crop_side=32),
        cluster=ClusterSettings(clusters, PASSES),
        reader=OcrSettings(ocr="none"),
        tokenizer=TokenizerSettings(vocab=384),
        pack=PackSettings(samples_per_shard=size.tar_images),
    )


@contextmanager
def _silent(stage: str, images: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


def _curate_one(folder: Path, size: Size, workers: int) -> None:
    """Compose and curate one tar."""
    compose_tars(folder / "one", size.tar_images, size.tar_images, 0)
    find_images(folder / "one", folder / "scanned", folder / "one-run", size.tar_images)
    settings = _settings(size, min(size.clusters, size.tar_images))
    curate(folder / "one", folder / "one-run", settings, _silent, workers=workers)


def _repeat(folder: Path, size: Size) -> Job:
    """A run over many tars, done up to publish; each is the one that was curated."""
    images, out, settings = folder / "images", folder / "run", _settings(size, size.clusters)
    images.mkdir()
    [tar] = (folder / "one").iterdir()
    for number in range(size.tars):
        os.link(tar, images / f"{number:06d}.tar")
    # A list knows tars by name, size and time, and these are the one that was looked into.
    [row] = Listing(folder / "scanned" / TARS).rows()
    (folder / "scanned").rename(out_stages := _made(out) / "stages")
    write_listing(out_stages / TARS, ({**row, "path": f"{n:06d}.tar"} for n in range(size.tars)))
    find_images(images, out_stages, out, size.tar_images)
    record_run(out, images, settings)
    job = open_job(images, out, settings)
    # Nothing of it has to outlast a power cut.
    with patch("os.fsync"):
        _write_pieces(job, folder / "one-run", size)
    return job


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _write_pieces(job: Job, one: Path, size: Size) -> None:
    """The manifests of all stages but publish, each with its files."""
    done: dict[Piece, str] = {}
    stages = make_stages(job)
    job.shards.mkdir()
    for name in NAMES[:-1]:
        stage, recipes = stages[name], recipes_of(name, stages)
        told = read_json(one / "stages" / name / "00000" / "manifest.json") if stage.pieces() else {}
        for number in range(stage.pieces()):
            piece = Piece(name, number)
            job.store.folder(piece).mkdir(parents=True)
            files = {
                path.relative_to(job.store.root).as_posix(): facts
                for path, facts in _write_files(job, piece, one, told["files"], size)
            }
            key = stage.key(number, [done[need] for need in stage.needs(number)])
            manifest = Manifest(key, files, told["counts"], {}, told["seconds"], recipes)
            job.store.write(piece, manifest)
            done[piece] = manifest.digest


def _write_files(
    job: Job, piece: Piece, one: Path, files: dict[str, Any], size: Size
) -> Iterator[tuple[Path, tuple[int, str]]]:
    """The files of a piece, links but for what tells pieces apart, with their sizes and hashes."""
    for name, (length, sha256) in files.items():
        source, target = one / name, job.store.folder(piece) / Path(name).name
        if source.name == CENTERS:
            shape = (size.clusters, size.channels)
            np.lib.format.open_memmap(target, mode="w+", dtype=np.float32, shape=shape).flush()
            length, sha256 = target.stat().st_size, file_sha256(target)
        elif source.name == ENTRY:
            entry = {**read_json(source), "name": f"shard-{piece.number:05d}"}
            target.write_text(json.dumps(entry))
            length, sha256 = target.stat().st_size, hashlib.sha256(target.read_bytes()).hexdigest()
        else:
            if source.name.startswith("shard-"):
                target = job.shards / source.name.replace("00000", f"{piece.number:05d}")
            os.link(source, target)
        yield target, (length, sha256)


# What is measured


def _list_first(folder: Path, tars: int) -> float:
    """Seconds in which one process lists so many tars that nobody has looked into."""
    some = _made(folder / "some")
    for number in range(tars):
        os.link(folder / "images" / f"{number:06d}.tar", some / f"{number:06d}.tar")
    began = time.perf_counter()
    find_images(some, folder / "listed", folder / "some-run", 10_000)
    return time.perf_counter() - began


def _curation_commands(folder: Path, job: Job, told: str) -> Iterator[Case]:
    tool, out = [sys.executable, str(Path(__file__).parents[1] / "curate.py")], f"--out={job.store.root}"
    flags = [
        f"--images={folder / 'images'}", f"--piece-images={job.settings.image.piece_images}", "--ocr=none",
        "--crop-side=32", f"--clusters={job.settings.cluster.clusters}", f"--cluster-iterations={PASSES}",
        f"--samples-per-shard={job.settings.pack.samples_per_shard}", "--vocab=384",
    ]  # fmt: skip
    for name, words, limit, goal in (
        ("status, the first one", None, STATUS_SECONDS, 1.0),
        ("status", None, STATUS_SECONDS, 1.0),
        ("list, nothing new, and summary", [*flags, "--stage=list"], LIST_SECONDS, 1.0),
        ("publish and summary", [*flags, "--stage=publish", "--piece=0", "--of=1"], LIST_SECONDS, 0.0),
    ):
        cost = cost_of([*tool, *words, out] if words else [*tool, "status", out])
        print(f"{name}: {cost}", file=sys.stderr, flush=True)
        yield Case(f"{name}, {told}", cost.wall, limit, "s", goal)
        yield Case("memory of its process", cost.memory, 2**10, "MiB")


def _alone(work: Callable[..., object], *arguments: object) -> tuple[float, int]:
    """Seconds of a call in a process of its own, and the bytes by which it grows."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, work, *arguments).result()


def _measured(work: Callable[..., object], *arguments: object) -> tuple[float, int]:
    memory = PeakMemory(torch.device("cpu"))
    before = memory.now()
    memory.reset()
    began = time.perf_counter()
    held = work(*arguments)
    found = time.perf_counter() - began, memory.peak() - before
    del held
    return found


def _first_batch(shards: Path) -> object:
    data = DataConfig(path=str(shards), workers=0)
    dataset = ShardedDataset(shards)
    loader = RegionLoader(dataset, *read_as_trained(dataset, data), data)
    return next(loader.batches([range(FAR, FAR + 64)])), loader


def _count(out: Path, samples: int, clusters: int) -> object:
    source = CuratedSource(out)
    source.samples = samples
    return count_regions(source, AtlasSettings(), clusters, lambda samples: None)


def _open_on_ranks(shards: Path, most: int) -> Iterator[Case]:
    """Open the dataset as a run does, on one rank and on many at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmark.metadata"])
    for ranks in (1, most):
        with patch.dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())):
            queue = context.SimpleQueue()
            processes = [
                context.Process(target=_open_on_rank, args=(shards, rank, ranks, queue))
                for rank in range(ranks)
            ]
            for process in processes:
                process.start()
            found = sorted(queue.get() for _ in processes)
            for process in processes:
                process.join()
        seconds, grown = (max(each[place] for each in found) for place in (1, 2))
        yield Case(f"open on {ranks} ranks of this machine", seconds, OPEN_SECONDS, "s", 1.0)
        yield Case("memory of the largest rank", grown / 2**20, RANK_BYTES / 2**20, "MiB", 1.0)
        looking = sum(stats > 0 for _, _, _, stats in found)
        stats = max(stats for _, _, _, stats in found)
        yield Case(
            f"ranks that look at shards, of {ranks} ({stats:,} each)", looking, -(-ranks // HOST), "", 1.0
        )


def _open_on_rank(shards: Path, rank: int, ranks: int, queue: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank % HOST))
    torch.set_num_threads(1)
    place = topology.join(1)
    hosts = [f"host-{number // HOST}" for number in range(ranks)]
    looks = [0]
    look = ShardedDataset._check_size

    def counted(*arguments: Any) -> int:
        looks[0] += 1
        return look(*arguments)

    held: list[object] = []
    with patch.object(ShardedDataset, "_check_size", counted):
        seconds, grown = _measured(
            lambda: held.append(open_dataset(DataConfig(path=str(shards)), place, hosts))
        )
    queue.put((rank, seconds, grown, looks[0]))
    topology.leave()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
