"""Measure a run's encoder on held-out scenes, beside honest baselines, and write the run's report.

python tools/evaluate.py runs/demo --scenes data/scenes
python tools/evaluate.py runs/demo --scenes data/scenes --images photos --compare openai/clip-vit-base-patch16
python tools/evaluate.py runs/demo --scenes data/scenes --measures all --seeds 10
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from megaregion.bounds import Choice, Count, Folder, Images, PositiveInt, Seed, Text, Whole, Workers
from megaregion.command_line import Parser, run
from megaregion.errors import UserError
from megaregion.files import write_text
from megaregion.schemas.evaluation import (
    FOOTNOTE,
    MEASURES,
    QUICK,
    markdown,
    text,
    write_board,
    write_evaluation,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tqdm import tqdm

    from megaregion.curation.picture import Pixels
    from megaregion.evaluation.encoders import Encoder

STRIDE = 32
"""Pixels along each side of a place of the curation encoder's map."""


def main() -> None:
    arguments = _parser().parse_args()
    from tqdm import tqdm

    from megaregion.evaluation.network import open_run
    from megaregion.evaluation.pictures import save_pictures, visualise
    from megaregion.evaluation.report import write_report
    from megaregion.evaluation.study import StudyConfig, evaluate

    began = time.perf_counter()
    opened = open_run(arguments.run, arguments.checkpoint)
    device = _device(arguments.device)
    names = {field.name for field in fields(StudyConfig)}
    asked = {name: value for name, value in vars(arguments).items() if name in names}
    asked |= {"device": device, "dataset": arguments.dataset or Path(opened.config.data.path)}
    config = StudyConfig(**asked)
    others = _others(arguments, device, opened.config.model.grid)
    with tqdm(unit="image", disable=None) as bar:
        progress = partial(_show_progress, bar)
        study = evaluate(opened, config, others, progress)
        visuals = visualise(study, arguments.frames, arguments.map_side, progress)
    study.seconds["total"] = time.perf_counter() - began
    suffix = "" if config.split == "test" else f"_{config.split}"
    numbers, tables, page = (
        opened.folder / name.format(suffix)
        for name in ("evaluation{}.json", "evaluation{}.md", "report{}.html")
    )
    evaluation = study.evaluation()
    write_evaluation(numbers, evaluation)
    title = f"# {evaluation.run} after step {evaluation.step:,}, {evaluation.split} split"
    write_text(tables, f"{title}\n\n{markdown(evaluation.tables)}")
    write_board(opened.folder / "tensorboard", opened.step, study.tables)
    save_pictures(visuals, opened.folder / f"pictures{suffix}")
    write_report(study, visuals, opened.folder / "metrics.jsonl", page)
    print(f"{text([study.summary], intervals=False)}\n\n{fill(study.summary.told, 100)}")
    if study.missing:
        print(f"\nnot measured, for the scenes lack masks or words: {', '.join(study.missing)}")
    if study.vocabulary and study.vocabulary.unreadable:
        print(f"\n{study.vocabulary.unreadable:,} samples of the training shards cannot be read")
    if study.tables:
        print(f"\n{text(study.tables)}\n\n{FOOTNOTE}")
    print(f"\n{numbers}\n{tables}\n{page}")


def _others(arguments: argparse.Namespace, device: str, cells: int) -> list[Encoder]:
    """The curation encoder and the models to compare with."""
    from megaregion.curation.engines import load_embedder
    from megaregion.curation.engines.lite0 import Lite0
    from megaregion.curation.picture import resize
    from megaregion.evaluation.encoders import CropEncoder, load_huggingface

    others: list[Encoder] = []
    if arguments.curation != "none":
        embedder, network = load_embedder(arguments.curation), Lite0()
        side = STRIDE * cells

        def see(image: Pixels) -> NDArray[np.float32]:
            return network.maps(resize(image, side, side)).coarse

        others.append(CropEncoder("curation", embedder.embed, max(1, arguments.workers), see))
    for name in arguments.compare:
        model = load_huggingface(name, device)
        others += [model, model.crops()]
    names = [other.name for other in others]
    for name in names:
        if names.count(name) > 1 or name in ("trained", "untrained", "pixels"):
            raise UserError(f"two rows would be called {name}; give the folder of --compare another name")
    return others


def _measures(text: str) -> tuple[str, ...]:
    names = MEASURES if text == "all" else text.split(",")
    chosen = tuple(name for name in names if name not in ("", "none"))
    for name in chosen:
        if name not in MEASURES:
            raise UserError(f"--measures knows {', '.join(MEASURES)}, all and none, got {name!r}")
    return chosen


def _parser() -> Parser:
    parser = Parser(
        description="Measure a run's encoder on scenes with known truth, beside the same network untrained, "
        "raw pixels and the curation encoder. Prints a table; RUN gets evaluation.json, evaluation.md, "
        "TensorBoard scalars and report.html.",
    )
    add = parser.add_flag
    add("run", Folder, None, "the run's folder, with its checkpoints and metrics.jsonl", metavar="RUN")
    add("--scenes", Folder, None, "scene set of tools/make_scenes.py, with its truth", required=True)
    add("--dataset", Folder, None, "shards that the run was trained on; by default the run's data.path")
    add("--split", Choice(("test", "val")), "test", "held-out split to ask about; tune on val only (it "
        "writes evaluation_val.json), never on test")  # fmt: skip
    add("--checkpoint", Count, None, "evaluate this step instead of the newest", metavar="STEP")
    add("--limit", Count, 4000, "training objects in the gallery; 0 takes all")
    add("--batch", Images, 32, "images that go through an encoder at once")
    add("--workers", Workers, 2, "threads that read and crop-embed images", metavar="THREADS")
    add("--device", Text("NAME"), "auto", "where the network computes: auto, cpu, cuda, cuda:1 ...")
    add("--curation", Choice(("lite0", "none")), "lite0", "curation encoder to compare with")
    add("--measures", _measures, ",".join(QUICK),
        f"tables with means over seeds and intervals: {', '.join(MEASURES)}; or all, or none",
        metavar="NAME[,NAME ...]")  # fmt: skip
    add("--seeds", PositiveInt, 5, "galleries, splits and pairs drawn behind a mean")
    add("--images", Folder, None, "also name whole images: FOLDER/CLASS/*.jpg, or FOLDER/train/CLASS and "
        "FOLDER/test/CLASS")  # fmt: skip
    add("--compare", Text("MODEL"), [], "a vision transformer in HuggingFace form, folder or hub id, as "
        "further rows; repeatable", action="append")  # fmt: skip
    add("--frames", Folder, None, "image or folder of frames whose features the report paints; by default "
        "held-out scenes", metavar="PATH")  # fmt: skip
    add("--map-side", Whole(0, 16_384, "PX"), 0,
        "longest side at which frames are read for maps; 0 takes three times the training size")  # fmt: skip
    add("--projected", bool, False, "compare regions by the heads' embeddings, not by features")
    add("--seed", Seed, 0, "draws the gallery and the pictures of the report")
    return parser


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.empty(0, device=name).device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}); use cpu or auto") from None


def _show_progress(bar: tqdm, split: str, done: int, images: int) -> None:
    """Move the bar; a new split starts it anew."""
    if done < bar.n or bar.total != images:
        bar.reset(images)
    bar.set_description(split, refresh=False)
    bar.update(done - bar.n)


if __name__ == "__main__":
    run(main)
