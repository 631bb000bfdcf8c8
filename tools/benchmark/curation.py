"""Curation on composed scenes: memory of its stages, time of its engines, words that are read."""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmark.measure import Stopwatch, passing_folder
from benchmark.memory import PeakMemory
from benchmark.part import CLOCK, FOLDER, Case, part
from benchmark.scenes import CROP_SIDE, ComposedScene, compose
from megaregion.bounds import COUNT, PositiveInt, Text, Whole
from megaregion.curation.costs import networks
from megaregion.curation.engines.lite0 import BATCH, Lite0Embedder, load_network
from megaregion.curation.engines.ocr import RapidReader
from megaregion.curation.engines.pretrained import CLIP_STATISTICS, PretrainedEmbedder, normaliser
from megaregion.curation.picture import Pixels, crop, resize
from megaregion.curation.pipeline import LIST, Pipeline, Share, curate, curate_share, open_job
from megaregion.curation.report import READABLE
from megaregion.curation.settings import (
    ClusterSettings,
    CurationSettings,
    ImageSettings,
    PackSettings,
    TokenizerSettings,
)
from megaregion.curation.stages import LOOKING, NAMES
from megaregion.demo.assets import load_library
from megaregion.demo.folder import write_scenes
from megaregion.demo.scenes import SceneSettings
from megaregion.errors import UserError

FLAT = 1 / 1.1
"""Least ratio of the peaks of a small and a large input."""
INDEXED = 20
"""Least MB of an annotation file that are indexed in a second."""
PARSED = 20
"""MB of it that json.loads is timed on: it needs ten times that in memory."""
RATE_SIDE = {"cpu": 1024, "cuda": 16_384}
"""Of matrices that are large enough for the full rate."""
TOLD = {"crop": "crops for the encoder", "image": "images for the mask generator"}
SHARES = {"crop": 0.45, "image": 0.25}
"""Least shares of the matrix rate: what ``plan.py curate`` reckons with."""
MISREAD = 0.1
"""Greatest share of the readable words that may be misread."""


@part(
    ("--images", Whole(8, COUNT), 40, "images of the small input"),
    ("--factor", Whole(2, COUNT), 10, "how many times larger the large one is"),
    ("--clusters", PositiveInt, 32, "object classes of both"),
)
def curation(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Peak memory of every stage of curation when the input grows.

    Ratios are peak for the small input / peak for the large one; flat within 10 percent is 0.91.
    """
    sizes = (options.images, options.images * options.factor)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        small, large = (_peaks(Path(folder) / str(count), count, options.clusters) for count in sizes)
    for stage, peak in small.items():
        case = f"{stage}, {sizes[1]} images / {sizes[0]}"
        yield Case(case, large[stage] / 2**20, peak / 2**20, "MiB", FLAT)


def _peaks(folder: Path, count: int, clusters: int) -> dict[str, int]:
    """Peak resident memory of each stage, in a process of its own, in bytes."""
    write_scenes(folder / "scenes", load_library(), SceneSettings(), {"train": count}, workers=1)
    settings = CurationSettings(
        image=ImageSettings(piece_images=8),
        cluster=ClusterSettings(clusters),
        tokenizer=TokenizerSettings(vocab=384),
        pack=PackSettings(samples_per_shard=32),
    )
    peaks = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for stage in (LIST, *NAMES):
            try:
                peaks[stage] = pool.submit(_peak, folder, settings, stage).result()
            except BrokenProcessPool:
                raise UserError(f"the process of stage {stage} died, most likely of memory") from None
    return peaks


def _peak(folder: Path, settings: CurationSettings, stage: str) -> int:
    """Do one stage as a job of a cluster does it."""
    where = folder / "scenes" / "train" / "images", folder / "curated", settings
    if stage == LIST:
        curate(*where, _silent, stage, workers=0)
    else:
        curate_share(*where, _silent, stage, Share(0, 1), workers=0)
    return PeakMemory(torch.device("cpu")).peak()


@part(
    ("--images", PositiveInt, 24, "images"),
    ("--side", Whole(96, 8192), 1024, "of an image, in pixels"),
    ("--repeats", PositiveInt, 2, "timed runs of each; the fastest counts"),
    CLOCK,
    FOLDER,
)
def joined(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Propose, ocr and embed piece by piece, each image decoded once, beside stage by stage.

    Seconds of one core for a thousand composed scenes; ratios are peer / ours.
    """
    settings = CurationSettings(ImageSettings(piece_images=options.images))
    with passing_folder(options.folder) as folder:
        scenes = SceneSettings(sizes=((options.side, options.side),))
        write_scenes(folder, load_library(), scenes, {"train": options.images}, workers=1)
        where = folder / "train" / "images", folder / "out", settings
        curate(*where, _silent, LIST, workers=0)

        def run(*groups: Sequence[str]) -> None:
            for stage in LOOKING:
                shutil.rmtree(folder / "out" / "stages" / stage, ignore_errors=True)
            with closing(Pipeline(open_job(*where), _silent, 0)) as pipeline:
                for group in groups:
                    pipeline.run(*group)

        works = {"joined": lambda: run(LOOKING), "apart": lambda: run(*zip(LOOKING))}
        seconds = watch.fastest(works, options.repeats)
    ours, peer = (1000 * seconds[name] / options.images for name in ("joined", "apart"))
    case = f"{options.images} images of {options.side} px, joined / stage by stage"
    yield Case(case, ours, peer, "s")


@part(
    ("--megabytes", Whole(2, COUNT), 50, "size of each file"),
    ("--factor", Whole(2, COUNT), 10, "how many times smaller the file is that memory is compared with"),
    CLOCK,
    FOLDER,
)
def index(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Stage list on a COCO file of polygons, and on one of boxes alone, whose images all lie in a tar.

    Seconds beside json.loads of the bytes, which any reader in Python has to pay, and beside the goal; peak
    MiB beside a smaller file.
    """
    with passing_folder(options.folder, 6 * 10**6 * options.megabytes) as folder:
        for name, corners in (("polygons", 24), ("boxes", 0)):
            sizes = (options.megabytes, max(1, options.megabytes // options.factor))
            clock = time.process_time if options.clock == "processor" else time.perf_counter
            (seconds, peak), (_, small) = (
                _index(folder / f"{name}{size}", size, corners, clock) for size in sizes
            )
            file = _compose_coco(folder / f"{name}-parsed", min(PARSED, options.megabytes), corners)
            content = file.read_bytes()
            parse = partial(json.loads, content)
            floor = watch.seconds(parse) * sizes[0] / (len(content) / 1e6)
            told = f"{sizes[0]} MB of {name}"
            yield Case(f"{told} / json.loads", seconds, floor, "s")
            yield Case(f"{told} / {INDEXED} MB/s", seconds, sizes[0] / INDEXED, "s", 1.0)
            yield Case(f"{told} / {sizes[1]} MB", peak / 2**20, small / 2**20, "MiB", FLAT)


def _index(folder: Path, megabytes: int, corners: int, clock: Callable[[], float]) -> tuple[float, int]:
    """Seconds and peak bytes of stage list, in a process of its own."""
    _compose_coco(folder, megabytes, corners)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_list, folder, clock).result()


def _list(folder: Path, clock: Callable[[], float]) -> tuple[float, int]:
    began = clock()
    curate(folder, folder / "curated", CurationSettings(), _silent, LIST, workers=0)
    return clock() - began, PeakMemory(torch.device("cpu")).peak()


def _compose_coco(folder: Path, megabytes: int, corners: int) -> Path:
    """A file of about so many MB, seven rows an image in any order, and a tar of empty images."""
    folder.mkdir()
    rng = np.random.Generator(np.random.Philox(key=1))
    row = {
        "segmentation": [rng.uniform(0, 640, 2 * corners).round(2).tolist()] if corners else [],
        "area": 702.1, "iscrowd": 0, "image_id": 1000000, "bbox": [473.07, 395.93, 38.65, 28.67],
        "category_id": 18, "id": 1768,
    }  # fmt: skip
    before, after = json.dumps(row).split("1000000")
    count = max(1, megabytes * 10**6 // (7 * (len(before) + len(after) + 9) + 100))
    images = [{"id": n, "file_name": f"{n:09d}.jpg", "width": 640, "height": 480} for n in range(count)]
    with tarfile.open(folder / "images.tar", "w") as tar, (folder / "coco.json").open("w") as file:
        file.write(f'{{"images": {json.dumps(images)}, "annotations": [')
        for number in range(7 * count):
            # No two neighbours are rows of one image, as in COCO.
            file.write(f"{', ' * bool(number)}{before}{number * 7919 % count}{after}")
        file.write('], "categories": [{"id": 18, "name": "dog"}]}')
        for image in images:
            tar.addfile(tarfile.TarInfo(str(image["file_name"])), io.BytesIO())
    return folder / "coco.json"


@contextmanager
def _silent(stage: str, images: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


@part(
    ("--scenes", PositiveInt, 60, "scenes to cut crops from, about 3 each"),
    ("--crop-side", Whole(32, 1024, multiple=16), CROP_SIDE, "pixels to which a crop is resized"),
    ("--repeats", PositiveInt, 3, "timed passes; the fastest counts"),
    CLOCK,
)
def embed(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """EfficientNet-Lite0's crops through ONNX Runtime in batches, beside torch and one by one.

    Milliseconds a crop, on one thread as in a worker of curation; ratios are peer / ours. Crops are true
    objects of composed scenes.
    """
    torch.set_num_threads(1)
    scenes, side = compose(options.scenes, 256), options.crop_side
    crops = [crop(scene.pixels, tuple(item["box"])) for scene in scenes for item in scene.truth["objects"]]
    embedder, network = Lite0Embedder(side), load_network()
    seconds = watch.fastest(
        {
            "batches": lambda: embedder.embed(crops),
            "torch": lambda: _in_torch(network, crops, side),
            "crop by crop": lambda: [embedder.embed([one]) for one in crops],
        },
        options.repeats,
    )
    each = {name: 1000 * taken / len(crops) for name, taken in seconds.items()}
    for peer in ("torch", "crop by crop"):
        case = f"Lite0, {len(crops)} crops at {side} px, batches / {peer}"
        yield Case(case, each["batches"], each[peer], "ms")


@part(
    ("--scenes", PositiveInt, 60, "scenes to cut crops from, about 3 each"),
    (
        "--width",
        Whole(64, 4096, multiple=64),
        384,
        "of a CLIP tower of 12 blocks with random weights, 224 px",
    ),
    ("--repeats", PositiveInt, 2, "timed passes; the fastest counts"),
    CLOCK,
)
def encoder(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """CLIP's crops in batches of one shape over many images, beside image by image.

    Milliseconds a crop, on one thread as in a worker without a GPU; the ratio is peer / ours. A GPU, with
    --device cuda, is where it counts: there a batch is as large as memory allows, in bf16.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.set_num_threads(1)
    where = watch.device
    size = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "patch_size": 32}
    model = CLIPVisionModel(CLIPVisionConfig(**size, num_attention_heads=options.width // 64, image_size=224))
    model = model.eval().to(where, torch.bfloat16 if where.type == "cuda" else torch.float32)
    embedder = PretrainedEmbedder(model, where, CLIP_STATISTICS, 224)
    images = [
        [resize(crop(scene.pixels, tuple(item["box"])), 224, 224) for item in scene.truth["objects"]]
        for scene in compose(options.scenes, 256)
    ]
    normalise = normaliser(CLIP_STATISTICS, where, model.dtype)

    def alone(crops: Sequence[Pixels]) -> torch.Tensor:
        with torch.inference_mode():
            pixels = normalise(torch.from_numpy(np.stack(crops)).to(where))
            return model(pixel_values=pixels).pooler_output.float().cpu()

    seconds = watch.fastest(
        {
            "batches": lambda: list(embedder.stream(enumerate(images))),
            "image by image": lambda: [alone(crops) for crops in images if crops],
        },
        options.repeats,
    )
    count = sum(map(len, images))
    each = {name: 1000 * taken / count for name, taken in seconds.items()}
    case = (
        f"CLIP of width {options.width}, {count} crops, batches of {embedder.batches.rows} / image by image"
    )
    yield Case(case, each["batches"], each["image by image"], "ms")


@part(
    ("--encoder", Text("FOLDER"), "", "with the config.json of a vision encoder, if not CLIP ViT-L/14's"),
    ("--sam", Text("FOLDER"), "", "with the config.json of a mask generator, if not SAM ViT-B's"),
    ("--grid", PositiveInt, 16, "points along each side of an image"),
    ("--repeats", PositiveInt, 3, "timed batches; the fastest counts"),
)
def engines(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Batches of CLIP and SAM as curation sends them, random weights in bf16, beside their bare operations.

    A batch has 256 crops, or 4 images. The peer multiplies large matrices with as many operations.
    """
    side = RATE_SIDE[watch.device.type]
    left, right = (torch.randn(side, side, device=watch.device, dtype=torch.bfloat16) for _ in range(2))
    batches = networks(options.encoder, options.sam, options.grid, watch.device)
    works = {"product": lambda: left @ right, **{name: run for name, (_, run) in batches.items()}}
    seconds = watch.fastest(works, options.repeats)
    # What enlarges masks multiplies nothing.
    for name, told in TOLD.items():
        rows, run = batches[name]
        with FlopCounterMode(display=False) as counter:
            run()
        floor = seconds["product"] * counter.get_total_flops() / (2 * side**3)
        case = f"{told}, a batch of {rows}: its operations at the matrix rate"
        yield Case(case, seconds[name], floor, "s", SHARES[name])


def _in_torch(network: Any, crops: Sequence[Pixels], side: int) -> torch.Tensor:
    """The same features from the package's own network."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(crops), BATCH):
            batch = np.stack([resize(one, side, side) for one in crops[start : start + BATCH]])
            pixels = (torch.from_numpy(batch).permute(0, 3, 1, 2).float() - 127) / 128
            found.append(network.extract_features(pixels).mean((2, 3)))
    return torch.cat(found)


@part(
    ("--scenes", PositiveInt, 40, "scenes to read"),
    ("--side", Whole(96, 4096), 256, "side of a scene, in pixels"),
    ("--ocr-side", Whole(32, 8192), 384, "as of tools/curate.py"),
    CLOCK,
)
def ocr(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """OCR of composed scenes at our settings, beside the engine's defaults: time, and words read exactly.

    For times the ratio is peer / ours; for misread words likewise, and the goal is 10 percent.
    """
    scenes = list(compose(options.scenes, options.side))
    (ours, misread), (theirs, their_misread) = (
        _read_all(reader, scenes, watch) for reader in (RapidReader(options.ocr_side), _DefaultReader())
    )
    words = max(1, sum(len(_needed(scene)) for scene in scenes))
    # One that misreads nothing still has a ratio.
    share, their_share = (max(count, 0.5) / words for count in (misread, their_misread))
    case, of_words = (
        f"{len(scenes)} scenes of {options.side} px",
        f"misread of {words} words of {READABLE:g} px",
    )
    yield Case(f"{case}, an image / engine's defaults", ours, theirs, "ms")
    yield Case(f"{of_words} / engine's defaults", share, their_share, "")
    yield Case(f"{of_words} / goal", share, MISREAD, "", 1.0)


def _needed(scene: ComposedScene) -> list[str]:
    return [word["text"] for word in scene.truth["words"] if word["box"][3] - word["box"][1] >= READABLE]


def _read_all(reader: RapidReader, scenes: Sequence[ComposedScene], watch: Stopwatch) -> tuple[float, int]:
    """Milliseconds an image, and the number of needed words that are not found."""
    # What comes first pays for what is made once.
    reader.read(scenes[0].pixels)
    found, seconds = watch.timed(lambda: [[word.text for word in reader.read(s.pixels)] for s in scenes])
    missed = sum(text not in have for have, s in zip(found, scenes, strict=True) for text in _needed(s))
    return 1000 * seconds / len(scenes), missed


class _DefaultReader(RapidReader):
    """Rapidocr as it comes, but for one thread."""

    def __init__(self) -> None:
        from rapidocr import RapidOCR

        threads = ("intra_op_num_threads", "inter_op_num_threads")
        params = {f"EngineConfig.onnxruntime.{name}": 1 for name in threads}
        self._engine = RapidOCR(params={"Global.log_level": "critical", **params})
