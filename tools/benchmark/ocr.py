"""OCR of composed scenes at our settings, beside the engine's defaults: time, and words read exactly.

For times the ratio is peer / ours; for misread words likewise, and the goal is 10 percent.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import torch

from benchmark.measure import Stopwatch, add_clock, describe_host
from benchmark.report import Case, Report
from benchmark.scenes import ComposedScene, compose_scenes
from megaregion.command_line import whole
from megaregion.curation.engines.ocr import RapidReader, to_words
from megaregion.curation.report import READABLE

MISREAD = 0.1
"""Greatest share of the readable words that may be misread."""

Read = Callable[[Any], Sequence[Any]]
"""Pixels to words."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument("--scenes", type=whole(), default=40, help="scenes to read")
    parser.add_argument("--side", type=whole(96, 4096), default=256, help="side of a scene, in pixels")
    parser.add_argument("--ocr-side", type=whole(32, 8192), default=384, help="as of tools/curate.py")
    add_clock(parser)


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Read the same scenes both ways."""
    scenes = compose_scenes(options.scenes, options.side)
    watch = Stopwatch(torch.device("cpu"), options.clock == "processor")
    needed = [
        [word["text"] for word in scene.truth["words"] if word["box"][3] - word["box"][1] >= READABLE]
        for scene in scenes
    ]
    ours, misread = _read_all(RapidReader(options.ocr_side).read, scenes, needed, watch)
    theirs, their_misread = _read_all(_default_reader(), scenes, needed, watch)
    words = max(1, sum(map(len, needed)))
    share, their_share = (max(count, 0.5) / words for count in (misread, their_misread))
    case, of_words = f"{len(scenes)} scenes of {options.side} px", f"misread words of {READABLE:g} px"
    return Report(
        describe_host(device, clock=options.clock, words=words),
        [
            Case(f"{case}, an image / engine's defaults", 1000 * ours, 1000 * theirs, 0, "ms"),
            Case(f"{of_words} / engine's defaults", share, their_share, 0, ""),
            Case(f"{of_words} / goal", share, MISREAD, 1.0, ""),
        ],
    )


def _read_all(
    read: Read, scenes: Sequence[ComposedScene], needed: list[list[str]], watch: Stopwatch
) -> tuple[float, int]:
    """Seconds an image, and the number of needed words that are not found."""
    found: list[list[str]] = []
    # What comes first pays for what is made once.
    read(scenes[0].pixels)
    seconds = watch.seconds(
        lambda: found.extend([word.text for word in read(scene.pixels)] for scene in scenes)
    )
    missed = sum(text not in have for have, need in zip(found, needed, strict=True) for text in need)
    return seconds / len(scenes), missed


def _default_reader() -> Read:
    """Rapidocr as it comes, but for one thread, and all confidences as ours."""
    from rapidocr import RapidOCR

    threads = "EngineConfig.onnxruntime"
    engine: Any = RapidOCR(
        params={
            "Global.log_level": "critical",
            f"{threads}.intra_op_num_threads": 1,
            f"{threads}.inter_op_num_threads": 1,
        }
    )

    def read(pixels: Any) -> Sequence[Any]:
        result = engine(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        if result.boxes is None or result.txts is None:
            return []
        return to_words(result.boxes, result.txts, result.scores, pixels)

    return read
