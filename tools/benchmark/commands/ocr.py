"""``benchmark.py ocr``: the reader at its setting beside the engine as it comes, in time and in words."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmark.measure import Stopwatch, describe_host
from benchmark.report import Case, Report
from megaregion.errors import UserError

HELP = "OCR of composed scenes: time, and words read exactly, against the engine's defaults"
DESCRIPTION = "For times the ratio is peer / ours; for misread words likewise, and the goal is 10 percent."
MISREAD = 0.1
"""Greatest share of the readable words that may be misread."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument("--scenes", type=int, default=40, help="scenes to read")
    parser.add_argument("--side", type=int, default=256, help="side of a scene, in pixels")
    parser.add_argument("--ocr-side", type=int, default=384, help="as of tools/curate.py")
    parser.add_argument(
        "--clock", choices=["wall", "processor"], default="wall", help="processor: this process's time only"
    )


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Read the same scenes both ways.

    Raises:
        UserError: A flag is out of range.
    """
    from benchmark.scenes import compose_scenes
    from megaregion.curation.engines.ocr import RapidReader
    from megaregion.curation.quality.truth import READABLE

    if options.scenes < 1 or options.ocr_side < 32:
        raise UserError("--scenes must be at least 1 and --ocr-side at least 32")
    scenes = compose_scenes(options.scenes, options.side)
    watch = Stopwatch(torch.device("cpu"), processor=options.clock == "processor")
    ways = {"ours": RapidReader(options.ocr_side).read, "defaults": _engine()}
    seconds: dict[str, float] = {}
    missed: dict[str, int] = {}
    wanted = [
        [word["text"] for word in scene.truth["words"] if word["box"][3] - word["box"][1] >= READABLE]
        for scene in scenes
    ]
    for name, read in ways.items():
        read(scenes[0].pixels)
        found: list[Sequence[Any]] = []
        seconds[name] = watch.seconds(_all(read, scenes, found))
        texts = [[word.text for word in words] for words in found]
        missed[name] = sum(
            text not in have for have, need in zip(texts, wanted, strict=True) for text in need
        )
    words = max(1, sum(map(len, wanted)))
    case = f"{len(scenes)} scenes of {options.side} px"
    report = Report({**describe_host(device), "clock": options.clock, "words": words})
    each = {name: 1000 * value / len(scenes) for name, value in seconds.items()}
    report.cases.append(
        Case(f"{case}, an image / engine's defaults", each["ours"], each["defaults"], 0, "ms")
    )
    shares = {name: max(count, 0.5) / words for name, count in missed.items()}
    report.cases += [
        Case(
            f"misread words of {READABLE:g} px / engine's defaults", shares["ours"], shares["defaults"], 0, ""
        ),
        Case(f"misread words of {READABLE:g} px / goal", shares["ours"], MISREAD, 1.0, ""),
    ]
    return report


def _all(read: Callable[[Any], Sequence[Any]], scenes: Sequence[Any], found: list[Sequence[Any]]) -> Any:
    def work() -> None:
        found.extend(read(scene.pixels) for scene in scenes)

    return work


def _engine() -> Callable[[Any], Sequence[Any]]:
    """Rapidocr as it comes, but for one thread, and all confidences as ours."""
    import cv2
    from rapidocr import RapidOCR

    from megaregion.curation.types import to_words

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
