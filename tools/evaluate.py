"""Measure a run's encoder on held-out scenes, beside honest baselines, and write the run's report.

python tools/evaluate.py runs/demo --scenes data/scenes
python tools/evaluate.py runs/demo --scenes data/scenes --images photos --compare openai/clip-vit-base-patch16
python tools/evaluate.py runs/demo --scenes data/scenes --measures all --seeds 10
python tools/evaluate.py facebook/dinov2-base --annotations instances_val2017.json --images val2017
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from megaregion.bounds import (
    Choice,
    Count,
    Folder,
    Images,
    Located,
    PositiveInt,
    Seed,
    Text,
    Weighted,
    Whole,
    Workers,
)
from megaregion.command_line import Parser, run
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.files import write_text
from megaregion.schemas.evaluation import (
    ANNOTATED,
    EVALUATION,
    FOOTNOTE,
    MEASURES,
    QUICK,
    Evaluation,
    Table,
    markdown,
    text,
    with_other_data,
    write_evaluation,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tqdm import tqdm

    from megaregion.curation.picture import Pixels
    from megaregion.evaluation.annotated import Annotated
    from megaregion.evaluation.encoders import Encoder
    from megaregion.evaluation.encoding import Batches

SCENE_OBJECTS = 4000
"""Objects of scenes in the gallery, where nobody asks for another number."""
STRIDE = 32
"""Pixels along each side of a place of the curation encoder's map."""


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.scenes:
        _evaluate_on_scenes(arguments)
    else:
        _evaluate_on_images(arguments)


def _evaluate_on_scenes(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from megaregion.evaluation.network import open_run
    from megaregion.evaluation.pictures import save_pictures, visualise
    from megaregion.evaluation.report import write_report
    from megaregion.evaluation.study import StudyConfig, evaluate
    from megaregion.training.metrics import Shown, Trackers

    if arguments.annotations:
        raise UserError(
            "--scenes and --annotations are two evaluations; evaluate twice, both sets of tables stay"
        )
    began = time.perf_counter()
    opened = open_run(Path(arguments.run), arguments.checkpoint)
    device = _device(arguments.device)
    names = {field.name for field in fields(StudyConfig)}
    asked = {name: value for name, value in vars(arguments).items() if name in names}
    asked |= {"device": device, "images": arguments.folder_dataset or arguments.images}
    asked |= {"limit": SCENE_OBJECTS if arguments.limit is None else arguments.limit}
    asked |= {"measures": _chosen(arguments.measures or ",".join(QUICK), MEASURES)}
    config = StudyConfig(**asked)
    others = _others(arguments, device, opened.config.model.grid)
    with tqdm(unit="image", disable=None) as bar:
        progress = partial(_show_progress, bar)
        study = evaluate(opened, config, others, progress)
        visuals = visualise(study, arguments.frames, arguments.map_side, progress)
    study.seconds["total"] = time.perf_counter() - began
    out, suffix = arguments.out or opened.folder, "" if config.split == "test" else f"_{config.split}"
    evaluation = with_other_data(study.evaluation(), out / f"evaluation{suffix}.json")
    files = _write(evaluation, out, suffix)
    save_pictures(visuals, out / f"pictures{suffix}")
    pictures = sorted((out / f"pictures{suffix}").iterdir())
    # In another folder than the run's, TensorBoard alone.
    with closing(Trackers(opened.config if out == opened.folder else RunConfig(), out)) as trackers:
        trackers.show(Shown(opened.step, {}, study.tables, pictures))
    page = out / f"report{suffix}.html"
    write_report(study, visuals, opened.folder, page, evaluation.tables[1:])
    print(f"{text([study.summary], intervals=False)}\n\n{fill(study.summary.told, 100)}")
    if study.missing:
        print(f"\nnot measured, for the scenes lack masks or words: {', '.join(study.missing)}")
    if study.vocabulary and study.vocabulary.unreadable:
        print(f"\n{study.vocabulary.unreadable:,} samples of the training shards cannot be read")
    if study.tables:
        print(f"\n{text(study.tables)}\n\n{FOOTNOTE}")
    print("", *files, page, sep="\n")


def _write(evaluation: Evaluation, out: Path, suffix: str = "") -> list[Path]:
    """Write the numbers, and all tables as Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    numbers, tables = (out / f"evaluation{suffix}.{ending}" for ending in ("json", "md"))
    write_evaluation(numbers, evaluation)
    when = f" after step {evaluation.step:,}" if evaluation.step else ""
    write_text(tables, f"# {evaluation.run}{when}, {evaluation.split} split\n\n{markdown(evaluation.tables)}")
    return [numbers, tables]


# ---- images of people ------------------------------------------------------------------------------


def _evaluate_on_images(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from megaregion.evaluation.annotated import read_annotated
    from megaregion.evaluation.encoding import Batches
    from megaregion.evaluation.harness import score_regions
    from megaregion.evaluation.measures.images import image_table, read_image_folder
    from megaregion.evaluation.report import write_tables
    from megaregion.training.metrics import Shown, Trackers

    began = time.perf_counter()
    measures = _chosen(arguments.measures or "all", ANNOTATED)
    folder, data = arguments.folder_dataset, None
    if arguments.annotations:
        if arguments.images is None:
            raise UserError("--annotations needs the folder of its images; name it with --images")
        data = read_annotated(
            arguments.annotations, arguments.images, arguments.train_annotations, arguments.train_images,
            arguments.limit or 0, arguments.seed,
        )  # fmt: skip
    else:
        folder = folder or arguments.images
    if data is None and folder is None:
        raise UserError(
            "nothing to evaluate on; name --scenes, --annotations with --images, or --folder-dataset"
        )
    photos = read_image_folder(folder) if folder else None
    name, step, out, encoders = _encoders(arguments)
    out, tables = arguments.out or out, list[Table]()
    with tqdm(unit="image", disable=None) as bar:
        batches = Batches(arguments.batch, arguments.workers, progress=partial(_show_progress, bar))
        if data is not None:
            tables += score_regions(encoders, data, measures, batches)
            if "proposals" in measures:
                tables.append(_proposals(data, batches))
        if photos is not None:
            table = image_table(
                photos, [own for own in encoders if hasattr(own, "images")], arguments.seeds, batches
            )
            tables.append(replace(table, key=f"{folder.name}/image", title=f"{table.title}, {folder.name}"))
    batches.seconds["total"] = time.perf_counter() - began
    known, asked = (data.known.objects, data.asked.objects) if data else ((), ())
    evaluation = Evaluation(
        run=name, step=step, split="test", tables=tuple(tables), test_regions=len(asked), test_words=0,
        gallery_regions=len(known), gallery_words=0, gallery_scenes=len(data.known.scenes) if data else 0,
        classes=len(set(data.known.objects.names)) if data else 0, seconds=batches.seconds,
    )  # fmt: skip
    page = out / f"report_{data.name if data else folder.name}.html"
    files = _write(with_other_data(evaluation, out / EVALUATION), out)
    write_tables(evaluation, page)
    with closing(Trackers(RunConfig(), out)) as trackers:
        trackers.show(Shown(step, {}, tables))
    for table in tables:
        print(f"{text([table])}\n\n{fill(table.told, 100)}\n")
    made = {table.key.rpartition("/")[2] for table in tables}
    if data and (missing := [own for own in measures if own not in made]):
        reason = "for the annotations lack classes, masks or frequencies, or no encoder has maps"
        print(f"not measured, {reason}: {', '.join(missing)}\n")
    print(f"{FOOTNOTE}\n", *files, page, sep="\n")


def _encoders(arguments: argparse.Namespace) -> tuple[str, int, Path, list[Any]]:
    """Name, step and folder of what is evaluated, and all encoders, it first."""
    from megaregion.checkpoint.format import MANIFEST
    from megaregion.evaluation.encoders import (
        PIXELS,
        CropEncoder,
        HuggingFaceEncoder,
        crops_of,
        load_huggingface,
        raw_pixels,
    )
    from megaregion.evaluation.network import open_run

    device, path = _device(arguments.device), Path(arguments.run)
    pixels = CropEncoder(PIXELS, raw_pixels)
    if (path / "checkpoints").is_dir() or (path / MANIFEST).is_file():
        opened = open_run(path, arguments.checkpoint)
        trained = opened.trained(device, arguments.projected)
        crops = crops_of(trained.name, trained.images)
        own = [trained, trained.pooled(), crops, opened.untrained(device, arguments.projected), pixels]
        others = _others(arguments, device, opened.config.model.grid)
        found = opened.config.name, opened.step, opened.folder
    else:
        model = load_huggingface(arguments.run, device, arguments.trust_remote_code)
        own = [model, model.crops(), pixels]
        others = _others(arguments, device, 1)
        found = model.name, 0, path if path.is_dir() else Path(f"evaluation-{model.name}")
    models = [own for own in (*own, *others) if isinstance(own, HuggingFaceEncoder)]
    encoders = [*own, *others, *(tokens for model in models if (tokens := model.tokens()))]
    _check_apart([encoder.name for encoder in encoders])
    if arguments.without_crops:
        encoders = [encoder for encoder in encoders if not encoder.name.endswith(("/crops", "/masked"))]
    return *found, encoders


def _proposals(data: Annotated, batches: Batches) -> Table:
    import numpy as np

    from megaregion.curation.engines import load_view
    from megaregion.curation.settings import ProposeSettings
    from megaregion.evaluation.measures.proposals import proposals_table

    search = load_view(ProposeSettings())

    def propose(image: Pixels) -> NDArray[np.float64]:
        return np.asarray([found.box for found in search(image)], np.float64)

    return proposals_table(data, "selective search", propose, batches)


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
        model = load_huggingface(name, device, arguments.trust_remote_code)
        others += [model, model.crops()]
    _check_apart([*(other.name for other in others), "trained", "untrained", "pixels"])
    return others


def _check_apart(names: list[str]) -> None:
    if same := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two rows would be called {same[0]}; give the folder of a model another name")


def _chosen(text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = known if text == "all" else text.split(",")
    chosen = tuple(name for name in names if name not in ("", "none"))
    for name in chosen:
        if name not in known:
            raise UserError(f"--measures knows {', '.join(known)}, all and none, got {name!r}")
    return chosen


def _parser() -> Parser:
    parser = Parser(
        description="Measure an encoder on scenes with known truth, on annotated images or on folders of "
        "classes, beside the same network untrained, raw pixels and the curation encoder. Prints tables; "
        "RUN gets evaluation.json, evaluation.md, TensorBoard scalars and a page."
    )
    add = parser.add_flag
    add("run", Text("RUN_OR_MODEL"), None, "a run's folder, with its checkpoints and metrics.jsonl; without "
        "--scenes also a vision encoder in HuggingFace form, folder or hub id")  # fmt: skip
    add("--scenes", Folder, None, "scene set of tools/make_scenes.py, with its truth")
    place = Located("FILE_OR_FOLDER")
    add("--annotations", place, None, "score boxes and masks of images: a JSON of COCO, LVIS or Objects365, "
        "Open Images' CSV, metadata.jsonl, a folder of YOLO's, VOC's or SA-1B's label files")  # fmt: skip
    add("--train-annotations", place, None, "those of other images to learn from; by default a hash of "
        "the image ids halves the one set")  # fmt: skip
    add("--train-images", Folder, None, "folder of those images; by default that of --images")
    add("--folder-dataset", Folder, None, "name whole images: FOLDER/CLASS/*.jpg, or FOLDER/train/CLASS and "
        "FOLDER/val/CLASS")  # fmt: skip
    add("--out", Folder, None, "where the results go; by default the run's or the model's folder")
    add("--dataset", Weighted(), None, "shards that the run was trained on, as data.path names them; by "
        "default the run's data.path")  # fmt: skip
    add("--split", Choice(("test", "val")), "test", "held-out split to ask about; tune on val only (it "
        "writes evaluation_val.json), never on test")  # fmt: skip
    add("--checkpoint", Count, None, "evaluate this step instead of the newest", metavar="STEP")
    add("--limit", Count, None, f"objects of whole images to learn from, by default {SCENE_OBJECTS} of "
        "scenes and all of annotations, where as many are asked about; 0 takes all")  # fmt: skip
    add("--batch", Images, 32, "images that go through an encoder at once")
    add("--workers", Workers, 2, "threads that read and crop-embed images", metavar="THREADS")
    add("--device", Text("NAME"), "auto", "where the network computes: auto, cpu, cuda, cuda:1 ...")
    add("--curation", Choice(("lite0", "none")), "lite0", "curation encoder to compare with")
    add("--measures", Text("NAME[,NAME ...]"), None, f"tables: {', '.join(MEASURES)} of scenes (by default "
        f"{', '.join(QUICK)}), {', '.join(ANNOTATED)} of annotations (by default all); or all, "
        "or none")  # fmt: skip
    add("--seeds", PositiveInt, 5, "galleries, splits and pairs drawn behind a mean")
    add("--images", Folder, None, "images of --annotations; without it, as --folder-dataset")
    add("--compare", Text("MODEL"), [], "a vision transformer in HuggingFace form, folder or hub id, as "
        "further rows; repeatable", action="append")  # fmt: skip
    add("--without-crops", bool, False, "leave out the rows of crops and masked class tokens, which cost a "
        "pass for every region")  # fmt: skip
    add("--trust-remote-code", bool, False, "run the code beside a model's weights: region tokens of our "
        "exports")  # fmt: skip
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
