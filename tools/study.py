"""The paper's ablations in small: encoders trained by equal steps, and a verdict on every trend.

python tools/study.py --quick                      the central claim and the most important arms
python tools/study.py --only supervision clusters --seeds 5

Scenes are composed once and curated once per kind of labels; then runs go side by side, one per core, and
each ends with its evaluation. What is done is kept: a killed study goes on where it was, a killed run at its
last checkpoint. Equal compute means the same images, crops, patches and steps; the column of compute says
what region tokens add. Nothing is tuned here, so all numbers are of the test split.

Boxes are those of the scenes' truth, as SA-1B's masks are given to RICE; labels are clusters of the crops'
embeddings, as everywhere, and no class of the truth reaches a run.

    OUT/scenes  OUT/labels/NAME/shards  OUT/runs/NAME  OUT/study.json  OUT/study.md
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaregion.bounds import Choice, File, Folder, PositiveInt, Workers
from megaregion.command_line import Parser, changed_settings, run
from megaregion.config import RunConfig
from megaregion.errors import UserError, spread
from megaregion.files import home, new_folder, write_text
from megaregion.schemas.evaluation import (
    EVALUATION,
    Column,
    Estimate,
    Table,
    markdown,
    read_evaluation,
    scalars,
    text,
    write_evaluation,
)
from megaregion.settings import read_file

SUPPORT = 3
"""Seeds below which no trend is decided."""
KNOWN = 1000
"""Training scenes whose whole images the image measures learn from."""
COLUMNS = {
    "region/linear": "regions, linear",
    "region/knn": "regions, 5-NN",
    "retrieval/class_at_1": "same class @1",
    "retrieval/cutout_at_1": "same cut-out @1",
    "image/linear": "images, linear",
    "image/knn": "images, 5-NN",
    "ocr/knn_recall": "tokens, 5-NN",
}
FOOTNOTE = (
    "Percent; in brackets the 95% t-interval over seeds. Compute: a training image's operations in the "
    "encoder, of the first row's."
)
RULE = (
    "A trend is decided by the differences of runs with the same seed: it agrees if the 95% t-interval of "
    "their mean lies above 0, disagrees if below, and is undecided else or with fewer than "
    f"{SUPPORT} seeds."
)

# ---- what is compared ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """One curation of the training scenes."""

    boxes: str
    """What of the truth is given as annotations: image, boxes or masks; empty lets curation propose."""
    flags: str = ""
    like: str = ""
    """Labels whose finished stages this curation takes over where they are the same."""


@dataclass(frozen=True)
class Arm:
    """Runs of one kind: what they learn from, and what they change of the study's config."""

    name: str
    labels: str = "objects"
    flags: str = ""


@dataclass(frozen=True)
class Claim:
    """That one arm scores higher than another."""

    better: str
    than: str
    measure: str
    paper: str


@dataclass(frozen=True)
class Trend:
    """Arms side by side, and what the paper says of them."""

    title: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...] = ()
    told: str = ""
    quick: bool = False


GIVEN = "--annotations only --min-edge 8 --max-area 1 --max-aspect 100 --nms-iou 0.95 --min-objectness 0"
LABELS = {
    "objects": Labels("boxes", f"{GIVEN} --ocr none"),
    "image": Labels("image", f"{GIVEN} --ocr none"),
    "image-64": Labels("image", f"{GIVEN} --ocr none --clusters 64", "image"),
    "masks": Labels("masks", f"{GIVEN} --ocr none"),
    "objects-64": Labels("boxes", f"{GIVEN} --ocr none --clusters 64", "objects"),
    "objects-1024": Labels("boxes", f"{GIVEN} --ocr none --clusters 1024", "objects"),
    "objects-three": Labels("boxes", f"{GIVEN} --ocr none --labels-per-region 3", "objects"),
    "read": Labels("boxes", f"{GIVEN} --vocab 384"),
    "proposed": Labels("", "--max-regions 20 --min-objectness 0 --ocr none"),
}
"""Every kind of labels. Clusters are 256 where nothing else is said, of images as of regions."""

COUNT, RATE = "--data.regions_per_image", "--head.object.sample_rate"
HEAD = "--head.object.loss {} --head.object.margin {}"
OBJECTS, WHOLE = Arm("objects"), {256: "image", 64: "image-64"}

TRENDS = {
    "supervision": Trend(
        "Regions against whole images",
        (OBJECTS, *(Arm(f"image, K = {k}", name, f"{COUNT} 1") for k, name in WHOLE.items())),
        tuple(
            Claim("objects", f"image, K = {k}", measure, "RICE over MLCD: refCOCO val 83.5, 82.8")
            for measure in ("region/linear", "region/knn", "retrieval/class_at_1")
            for k in WHOLE
        ),
        "Whole images are one region each, labelled by as many clusters of images, or by as large ones.",
        quick=True,
    ),
    "regions": Trend(
        "Regions of an image",
        tuple(Arm(f"N = {n}", "proposed", f"{COUNT} {n}") for n in (1, 5, 10, 20)),
        (
            Claim("N = 5", "N = 1", "region/linear", "COCO det 34.5, 31.4"),
            Claim("N = 10", "N = 5", "region/linear", "COCO det 35.2, 34.5"),
            Claim("N = 10", "N = 20", "region/linear", "COCO det 35.2, 34.7"),
        ),
        "Boxes are proposed by selective search, at most 20 of an image.",
    ),
    "clusters": Trend(
        "Number of clusters",
        (Arm("K = 64", "objects-64"), Arm("K = 256"), Arm("K = 1024", "objects-1024")),
        (
            Claim("K = 256", "K = 64", "region/linear", "COCO det 35.2 at 1M, 32.8 at 200K"),
            Claim("K = 256", "K = 1024", "region/linear", "COCO det 35.2 at 1M, 34.9 at 2M"),
        ),
        "The paper has 2,000 regions a cluster, this study about 140, 35 and 9.",
        quick=True,
    ),
    "negatives": Trend(
        "Share of negatives",
        tuple(Arm(f"rho = {rho}", flags=f"{RATE} {rho}") for rho in (0.05, 0.1, 0.5, 1.0)),
        (Claim("rho = 0.1", "rho = 0.5", "region/linear", "COCO det 35.2, 33.7"),),
        "Of 256 classes; the paper draws from a million.",
    ),
    "loss": Trend(
        "Loss and margin",
        tuple(
            Arm(f"{loss}, m = {margin}", flags=HEAD.format(loss, margin))
            for loss in ("separated", "softmax")
            for margin in (0.0, 0.1, 0.3)
        ),
        (Claim("separated, m = 0.3", "softmax, m = 0.0", "region/linear", "its loss, that of UNICOM"),),
        "At scale 16; the paper names 64.",
    ),
    "layers": Trend(
        "Region layers",
        tuple(Arm(f"{n} layers", flags=f"--model.region_layers {n}") for n in (1, 2, 4)),
        told="The paper does not say how many.",
    ),
    "weights": Trend(
        "Weights of region tokens",
        tuple(Arm(kind, flags=f"--model.region_weights {kind}") for kind in ("shared", "separate")),
        told="The paper does not say.",
    ),
    "start": Trend(
        "First state of region tokens",
        (Arm("class token"), Arm("learned query", flags="--model.region_start learned")),
        told="The paper does not say. A learned query leaves the class token, and so images, without a loss.",
    ),
    "kinds": Trend(
        "Objects and text",
        (
            Arm("both", "read", f"{COUNT} 6"),
            Arm("objects alone", "read", f"{COUNT} 6 --head.text.weight 0"),
            Arm("text alone", "read", f"{COUNT} 6 --head.object.weight 0"),
        ),
        (
            Claim("both", "objects alone", "ocr/knn_recall", "text regions are there for OCR"),
            Claim("both", "text alone", "region/linear", "object regions are there for objects"),
        ),
        "The other head's weight is 0, so that all see the same regions.",
    ),
    "visibility": Trend(
        "Box or mask",
        (Arm("box"), Arm("mask", "masks")),
        told="The paper does not say which. Asked about by boxes.",
    ),
    "labels": Trend(
        "Labels of a region",
        (
            Arm("1 label"),
            Arm("3 labels", "objects-three", "--data.max_object_labels 3"),
            Arm("near classes spared", flags="--head.object.near_classes 0.75"),
        ),
        told="The paper takes the nearest cluster alone; MLCD takes eight of an image.",
    ),
}
"""What the study compares."""

# ---- the material ----------------------------------------------------------------------------------


def call(command: Iterable[object], log: Path | None = None) -> None:
    """Run one of the project's commands, its output to a file if one is named; a UserError if it fails."""
    tool, *flags = map(str, command)
    words = [sys.executable, str(home("tools") / Path(tool).name), *flags]
    alone = None if log is None else {**os.environ, "OMP_NUM_THREADS": "1"}
    with nullcontext() if log is None else log.open("a") as said:
        code = subprocess.run(words, stdout=said, stderr=said, check=False, env=alone).returncode
    if code:
        raise UserError(f"{tool} ended with exit code {code}, see {log or 'above'}; start again to go on")


def write_annotations(scenes: Path, boxes: str, path: Path) -> None:
    """The truth of the training scenes as COCO's JSON without its classes; `boxes` is that of Labels."""
    images: list[Any] = []
    rows: list[Any] = []
    for truth in _truth(scenes, "train"):
        size = truth["width"], truth["height"]
        images.append(
            {"id": len(images), "file_name": f"{truth['key']}.jpg", "width": size[0], "height": size[1]}
        )
        found = [{"box": [0, 0, *size]}] if boxes == "image" else truth["objects"]
        for item in found:
            x0, y0, x1, y1 = item["box"]
            row = {"id": len(rows), "image_id": images[-1]["id"], "category_id": 1, "iscrowd": 0}
            row |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            rows.append(row | ({"segmentation": item["mask"]} if boxes == "masks" else {}))
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "region"}]}
    write_text(path, json.dumps(content))


def _truth(scenes: Path, split: str) -> list[dict[str, Any]]:
    with (scenes / split / "truth.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def sort_images(scenes: Path, out: Path) -> Path | None:
    """Whole scenes in folders named after each one's largest object; None where they are too few."""
    named: dict[str, dict[str, list[str]]] = {}
    for split in ("train", "test"):
        named[split] = {}
        for truth in _truth(scenes, split)[:KNOWN]:
            largest = max(truth["objects"], key=lambda item: sum(item["mask"]["counts"][1::2]), default=None)
            if largest:
                named[split].setdefault(largest["class"], []).append(f"{truth['key']}.jpg")
    classes = {name for name, keys in named["train"].items() if len(keys) > 1}
    if len(classes) < 2 or not classes & set(named["test"]):
        return None
    with new_folder(out) as folder:
        for split, found in named.items():
            for name in classes & set(found):
                (folder / split / name).mkdir(parents=True)
                for key in found[name]:
                    (folder / split / name / key).symlink_to((scenes / split / "images" / key).absolute())
    return out


def curate(out: Path, name: str, extra: Sequence[str]) -> None:
    """Curate the training scenes as LABELS says; finished stages stay."""
    labels, folder = LABELS[name], out / "labels" / name
    if labels.like and not folder.exists():
        curate(out, labels.like, extra)
        with new_folder(folder) as made:
            shutil.copytree(out / "labels" / labels.like / "stages", made / "stages")
    where = ["--images", out / "scenes/train/images", "--out", folder]
    command = ["tools/curate.py", *where, *extra, *labels.flags.split()]
    if labels.boxes:
        file = out / f"{labels.boxes}.json"
        if not file.exists():
            write_annotations(out / "scenes", labels.boxes, file)
        command += ["--annotations-file", file]
    print(f"== labels: {name}", flush=True)
    call(command)


# ---- the runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One run: an arm under one seed."""

    arm: Arm
    seed: int
    out: Path
    config: Path
    curation: str
    steps: int
    images: Path | None

    @property
    def folder(self) -> Path:
        """Where it lies; arms of the same settings share their runs."""
        from megaregion.settings import dotted

        # Of settings what is no default, so that one that comes later makes no run a new one.
        usual = dotted(asdict(RunConfig()))
        chosen = {key: value for key, value in dotted(asdict(self.settings)).items() if value != usual[key]}
        content = [LABELS[self.arm.labels].flags, self.curation, chosen, self.steps]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
        return self.out / "runs" / f"{self.arm.labels}-{digest}-{self.seed}"

    @property
    def settings(self) -> RunConfig:
        """The study's config with what the arm changes."""
        parser = Parser()
        parser.add_settings_files()
        parser.add_settings(RunConfig())
        flags = parser.parse_args(self.arm.flags.split())
        return changed_settings(flags, read_file(RunConfig(), self.config))


def train_and_measure(task: Task) -> dict[str, dict[str, float]]:
    """Means of the trained and of the untrained network by TABLE/COLUMN; a finished run is only read."""
    folder, file = task.folder, task.folder / EVALUATION
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shards = task.out / "labels" / task.arm.labels / "shards"
        where = ["--output", folder.parent, "--name", folder.name, "--data.path", shards, "--resume", "auto"]
        length = ["--train.steps", task.steps, "--seed", task.seed]
        call(
            ["tools/pretrain.py", "--config", task.config, *where, *length, *task.arm.flags.split()],
            folder / "study.log",
        )
        import torch

        from megaregion.evaluation.network import open_run
        from megaregion.evaluation.study import StudyConfig, evaluate

        torch.set_num_threads(1)
        opened = open_run(folder)
        config = StudyConfig(
            task.out / "scenes", shards, limit=2000, workers=1, images=task.images, baselines=False,
            measures=("region", "retrieval", "ocr"),
        )  # fmt: skip
        write_evaluation(file, evaluate(opened, config, [opened.untrained()]).evaluation())
    tables = read_evaluation(file).tables
    return {row: scalars(tables, row) for row in ("trained", "untrained")}


def compute_of(task: Task) -> float:
    """Operations of a training image in the encoder, forward and backward."""
    from megaregion.models.costs import encoder_flops

    config = task.settings
    return encoder_flops(config.model, config.data.regions_per_image, config.head.embedding_dim).training


# ---- the verdicts ----------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> Estimate:
    """Mean with its 95% t-interval; of one value no interval can be said."""
    import numpy as np
    from scipy import stats

    mean, half = float(np.mean(values)), 0.0
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Estimate(mean, mean - half, mean + half, tuple(values) if len(values) > 1 else ())


def verdict(better: Sequence[float], than: Sequence[float]) -> tuple[str, Estimate]:
    """Whether runs score higher than others of the same seeds, by RULE, and their mean difference."""
    found = interval([a - b for a, b in zip(better, than, strict=True)])
    if len(found.seeds) < SUPPORT or found.low <= 0 <= found.high:
        return "undecided", found
    return ("agrees" if found.low > 0 else "disagrees"), found


Found = Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]
"""Of every arm, the means of each seed's trained and untrained network."""


def table_of(key: str, trend: Trend, found: Found, compute: Mapping[str, float]) -> Table:
    """The arms of a trend; what the untrained network scores stands as chance."""
    first = found[trend.arms[0].name]
    seen = [name for name in COLUMNS if name in first[0]["trained"] and name in first[0]["untrained"]]
    means = {name: interval([each["untrained"][name] for each in first]).mean for name in seen}
    rows: dict[str, dict[str, Estimate | None]] = {}
    for arm in trend.arms:
        own = found[arm.name]
        rows[arm.name] = {name: interval([each["trained"][name] for each in own]) for name in seen}
        share = compute[arm.name] / compute[trend.arms[0].name]
        rows[arm.name]["compute"] = Estimate(share, share, share, ())
    columns = (*(Column(name, COLUMNS[name], means[name]) for name in seen), Column("compute", "compute"))
    return Table(key, trend.title, trend.told, columns, rows, "untrained")


def judged(trend: Trend, found: Found) -> list[dict[str, Any]]:
    """The claims of a trend with their verdicts."""
    lines = []
    for claim in trend.claims:
        sides = (found[arm] for arm in (claim.better, claim.than))
        said, difference = verdict(*([each["trained"][claim.measure] for each in side] for side in sides))
        lines.append({**asdict(claim), "verdict": said, "difference": asdict(difference)})
    return lines


def lines_of(claims: Sequence[Mapping[str, Any]]) -> str:
    """Claims as a table of Markdown; empty without any."""
    rows = ["| trend | by | the paper | difference, points | verdict |", "|---|---|---|---:|---|"]
    for each in claims:
        shown = Estimate(**each["difference"])
        trend, by = f"{each['better']} over {each['than']}", COLUMNS[each["measure"]]
        rows.append(f"| {trend} | {by} | {each['paper']} | {shown} | {each['verdict']} |")
    return "\n".join(rows) if claims else ""


# ---- the command -----------------------------------------------------------------------------------


def main() -> None:
    arguments = _parser().parse_args()
    chosen = arguments.only or [key for key, trend in TRENDS.items() if trend.quick or not arguments.quick]
    out = arguments.out
    steps = arguments.steps or read_file(RunConfig(), arguments.config).train.steps
    counts = ["--train", arguments.train_scenes, "--test", arguments.test_scenes]
    call(["tools/make_scenes.py", "--out", out / "scenes", *counts, "--workers", arguments.workers])
    images = sort_images(out / "scenes", out / "images")
    for name in dict.fromkeys(arm.labels for key in chosen for arm in TRENDS[key].arms):
        curate(out, name, ["--workers", str(arguments.workers), *arguments.curation.split()])
    # Seed by seed, so that a study that is ended early has something of every arm.
    tasks = [
        Task(arm, seed, out, arguments.config, arguments.curation, steps, images)
        for seed in range(arguments.seeds)
        for key in chosen
        for arm in TRENDS[key].arms
    ]
    unique = list({task.folder: task for task in tasks}.values())
    print(f"== {len(unique)} runs of {steps:,} steps, {arguments.workers} at a time", flush=True)
    means = {}
    for task, scores in zip(unique, spread(train_and_measure, unique, arguments.workers), strict=True):
        means[task.folder] = scores
        score = scores["trained"]["region/linear"]
        print(f"{len(means):>4}  {task.folder.name:<32}{score:>8.1%}", flush=True)
    tables, claims = [], []
    for key in chosen:
        trend = TRENDS[key]
        own = {arm.name: [task for task in tasks if task.arm == arm] for arm in trend.arms}
        found = {name: [means[task.folder] for task in each] for name, each in own.items()}
        tables.append(table_of(key, trend, found, {name: compute_of(each[0]) for name, each in own.items()}))
        claims += judged(trend, found)
    skipped = ", ".join(key for key in TRENDS if key not in chosen) or "none"
    scenes = f"{arguments.train_scenes:,} training scenes"
    about = f"{arguments.seeds} seeds, {steps:,} steps, {scenes}. Not run: {skipped}."
    content = {"tables": [asdict(table) for table in tables], "claims": claims}
    write_text(out / "study.json", json.dumps(content, indent=1))
    page = f"{about}\n\n{lines_of(claims)}\n\n{RULE}\n\n{markdown(tables, footnote=FOOTNOTE)}"
    write_text(out / "study.md", page)
    print("", text(tables), "", lines_of(claims), "", RULE, about, "", sep="\n")
    print(out / "study.json", out / "study.md", sep="\n")


def _parser() -> Parser:
    parser = Parser(description="Train small encoders that differ in one thing; judge the paper's trends.")
    add = parser.add_flag
    add("--out", Folder, Path("data/study"), "folder of scenes, labels, runs and results")
    add("--config", File, home("configs") / "study.yaml", "settings of every run, which arms change")
    add("--only", Choice(tuple(TRENDS)), None, f"trends to look at: {', '.join(TRENDS)}", nargs="+")
    add("--quick", bool, False, "the most important trends alone")
    add("--seeds", PositiveInt, 3, "runs of every arm; with fewer than 3 nothing is decided")
    add("--steps", PositiveInt, None, "steps of every run, by default those of --config")
    add("--train-scenes", PositiveInt, 3000, "scenes to curate and train on")
    add("--test-scenes", PositiveInt, 300, "held-out scenes of unseen cut-outs")
    add("--workers", Workers, 2, "runs side by side, one per core")
    add("--curation", str, "", "further flags of every tools/curate.py", metavar="FLAGS")
    return parser


if __name__ == "__main__":
    run(main)
