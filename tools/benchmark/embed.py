"""EfficientNet-Lite0's crops through ONNX Runtime in batches, beside torch and one by one.

Milliseconds a crop; ratios are peer / ours. Crops are true objects of composed scenes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmark.measure import Stopwatch, add_clock, describe_host
from benchmark.report import Case, Report
from benchmark.scenes import compose_scenes
from megaregion.command_line import whole
from megaregion.curation.engines.lite0 import BATCH, Lite0Embedder, load_network
from megaregion.curation.picture import crop, resize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument("--scenes", type=whole(), default=60, help="scenes to cut crops from, about 3 each")
    parser.add_argument(
        "--crop-side",
        type=whole(32, 1024, multiple=32),
        default=128,
        help="pixels to which a crop is resized",
    )
    parser.add_argument("--repeats", type=whole(), default=3, help="timed passes; the fastest counts")
    add_clock(parser)


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Time every way on the same crops, on one thread each, as a worker of curation runs."""
    torch.set_num_threads(1)
    crops = [
        crop(scene.pixels, tuple(item["box"]))
        for scene in compose_scenes(options.scenes, 256)
        for item in scene.truth["objects"]
    ]
    embedder = Lite0Embedder(options.crop_side)
    watch = Stopwatch(torch.device("cpu"), options.clock == "processor")
    network = load_network()
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: _in_torch(network, crops, options.crop_side),
        "crop by crop": lambda: [embedder.embed([one]) for one in crops],
    }

    def fastest(work: Callable[[], Any]) -> float:
        work()
        return 1000 * watch.fastest(work, options.repeats) / len(crops)

    ours = fastest(lambda: embedder.embed(crops))
    report = Report(describe_host(device, clock=options.clock, crops=len(crops)))
    case = f"Lite0, {len(crops)} crops at {options.crop_side} px, batches"
    report.cases += [Case(f"{case} / {name}", ours, fastest(work), 0, "ms") for name, work in ways.items()]
    return report


def _in_torch(network: Any, crops: list[Any], side: int) -> torch.Tensor:
    """The same features from the package's own network."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(crops), BATCH):
            batch = np.stack([resize(one, side, side) for one in crops[start : start + BATCH]])
            pixels = (torch.from_numpy(batch).permute(0, 3, 1, 2).float() - 127) / 128
            found.append(network.extract_features(pixels).mean((2, 3)))
    return torch.cat(found)
