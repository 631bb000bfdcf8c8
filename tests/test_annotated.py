"""Scores on annotated images: coloured shapes on noise, in COCO's JSON with every kind of row."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_runs import convert
from launch import repository
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from readme import FENCE
from test_evaluation import run_tool
from toy import toy_vision
from toy_scenes import MODEL, write_run

from megaregion.config import DataConfig
from megaregion.data.transforms import EvalTransform
from megaregion.errors import UserError
from megaregion.evaluation.annotated import Annotated, open_scene, read_annotated
from megaregion.evaluation.classifiers import Patches, fit_attentive, fit_probe
from megaregion.evaluation.encoders import (
    BoxedImage,
    CropEncoder,
    Features,
    PooledEncoder,
    load_huggingface,
    pixel_map,
    raw_pixels,
)
from megaregion.evaluation.encoding import Batches
from megaregion.evaluation.harness import mteb_model, score_regions
from megaregion.evaluation.measures.proposals import overlap_of, proposals_table
from megaregion.evaluation.scenes import Truth
from megaregion.schemas.evaluation import Table, read_evaluation

SIDE = 64
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220)}
Shape = tuple[str, NDArray[np.bool_], Any]


def write_set(folder: Path, count: int = 40, seed: int = 0, diagonal: bool = False) -> Path:
    """Images of two shapes each, as a polygon and as run lengths of either kind; every tenth has a crowd.

    With ``diagonal``, two thirds of a shape's box have any colour: only its mask tells its class.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    rng, rows, files = np.random.default_rng(seed), [], []
    for number in range(count):
        pixels = rng.integers(90, 160, (SIDE, SIDE, 3), dtype=np.uint8)
        for x in (8, 40):
            name = list(COLOURS)[rng.integers(3)]
            mask = np.zeros((SIDE, SIDE), bool)
            mask[8:32, x : x + 24] = True
            if diagonal:
                pixels[mask] = rng.integers(0, 256, 3)
                for step in (0, 8, 16):
                    mask[8 + step : 16 + step, x : x + 24] = False
                    mask[8 + step : 16 + step, x + step : x + step + 8] = True
            pixels[mask] = COLOURS[name]
            rows.append(_row(number, name, mask, len(rows) % 3, x))
        if number % 10 == 0:
            mask = np.zeros((SIDE, SIDE), bool)
            mask[40:60, 4:60] = True
            pixels[mask] = COLOURS["red"]
            rows.append(_row(number, "red", mask, 1, 4) | {"iscrowd": 1})
        Image.fromarray(pixels).save(images / f"{number:04d}.png")
        files.append({"id": number, "file_name": f"{number:04d}.png", "width": SIDE, "height": SIDE})
    # What cannot be asked about.
    files.append({"id": 998, "file_name": "absent.png", "width": SIDE, "height": SIDE})
    rows += [
        rows[0] | {"image_id": 998},
        rows[0] | {"category_id": 77},
        rows[0] | {"bbox": [1], "segmentation": 0},
    ]
    names = enumerate(COLOURS, start=1)
    frequency = {"red": "f", "green": "c", "blue": "r"}
    categories = [{"id": place, "name": name, "frequency": frequency[name]} for place, name in names]
    file = folder / "shapes.json"
    file.write_text(json.dumps({"images": files, "annotations": rows, "categories": categories}))
    return file


def _row(image: int, name: str, mask: NDArray[np.bool_], kind: int, x: int) -> dict[str, Any]:
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    full = mask[8:32, x : x + 24].all()
    corners = [x, 8, x + 24, 8, x + 24, 32, x, 32]
    segmentation: Any = {"size": [SIDE, SIDE], "counts": packed["counts"].decode()}
    if kind == 0 and full:
        segmentation = [corners]
    elif kind == 1:
        flat = mask.ravel(order="F")
        ends = [*(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
        segmentation = {"size": [SIDE, SIDE], "counts": np.diff(ends, prepend=0).tolist()}
    box = coco_mask.toBbox(packed).tolist()
    number = list(COLOURS).index(name) + 1
    return {"image_id": image, "category_id": number, "bbox": box, "segmentation": segmentation}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def data(shapes: Path) -> Annotated:
    return read_annotated(shapes, shapes.parent / "images")


def patches_of(name: str, cells: int = 8) -> PooledEncoder:
    """Raw pixels of each of 8 x 8 patches, pooled as a network's are."""
    model = dataclasses.replace(MODEL, image_size=SIDE, patch_size=SIDE // cells)
    return PooledEncoder(
        name,
        lambda images: [pixel_map(np.asarray(image), cells) for image in images],
        EvalTransform(DataConfig(), model),
    )


@dataclasses.dataclass(frozen=True)
class Constant:
    """Sees the same everywhere."""

    name: str = "constant"
    sees_masks: bool = True

    def encode(self, images: Sequence[BoxedImage]) -> Features:
        maps = [np.ones((4, 4, 3), np.float32) for _ in images]
        return Features(np.ones((sum(len(own.boxes) for own in images), 3), np.float32), maps=maps)


def mean(table: Table, row: str, column: str) -> float:
    cell = table.rows[row][column]
    assert cell is not None
    assert cell.low <= cell.mean <= cell.high
    return cell.mean


@pytest.fixture(scope="module")
def tables(data: Annotated) -> dict[str, Table]:
    found = score_regions([patches_of("oracle"), Constant()], data, batches=Batches(7, workers=2))
    return {table.key: table for table in found}


def test_every_kind_of_row_becomes_a_region_and_what_is_left_out_is_counted(data: Annotated) -> None:
    scenes = (*data.known.scenes, *data.asked.scenes)
    assert sorted(int(scene.key) for scene in scenes) == list(range(40))
    assert all(len(scene.objects) == 2 for scene in scenes)
    assert all(item.mask is not None and sum(item.mask.counts[1::2]) == 24 * 24
               for scene in scenes for item in scene.objects)  # fmt: skip
    assert data.left_out == {"crowd": 4, "image is not there": 1, "unknown class": 1, "bad annotation": 1}
    assert sum(len(scene.unclear) for scene in scenes) == 4
    assert data.frequency == {"red": "f", "green": "c", "blue": "r"}


def test_the_split_is_a_function_of_the_image_id_and_a_second_file_takes_its_place(
    shapes: Path, data: Annotated, tmp_path: Path
) -> None:
    content = json.loads(shapes.read_text())
    content["images"] = content["images"][::-1][:30]
    shorter = tmp_path / "shapes.json"
    shorter.write_text(json.dumps(content))
    again = read_annotated(shorter, shapes.parent / "images")
    asked = {scene.key for scene in data.asked.scenes}
    assert {scene.key for scene in again.asked.scenes} < asked
    assert not asked & {scene.key for scene in again.known.scenes}
    other = write_set(tmp_path / "train", count=5, seed=9)
    both = read_annotated(shapes, shapes.parent / "images", other, other.parent / "images")
    assert (len(both.asked.scenes), len(both.known.scenes)) == (40, 5)
    few = read_annotated(shapes, shapes.parent / "images", limit=6)
    assert (len(few.asked.objects), len(few.known.objects)) == (6, 6)


def test_features_that_tell_the_class_score_100_and_a_constant_scores_chance(
    tables: dict[str, Table],
) -> None:
    region = tables["shapes/region"]
    for form in ("boxes", "masks"):
        for classifier in ("knn", "linear", "attentive"):
            assert mean(region, "oracle", f"{form}_{classifier}") == 1.0
        assert mean(region, "constant", f"{form}_linear") == region.columns[0].chance
        assert mean(region, "constant", f"{form}_knn") < 0.6
        assert mean(tables["shapes/retrieval"], "oracle", f"{form}_class_at_1") == 1.0
    for frequency in ("rare", "common", "frequent"):
        assert mean(tables["shapes/frequency"], "oracle", f"{frequency}_linear") == 1.0
    assert "crowd 4" in region.told


def test_places_are_named_by_patches_and_crowds_do_not_count(tables: dict[str, Table]) -> None:
    places = tables["shapes/segmentation"]
    # Shapes end where patches do; what is lost is lost where scores are drawn between the patches' middles.
    assert mean(places, "oracle", "object_miou") > 0.75
    chance = places.columns[0].chance
    assert chance is not None
    assert mean(places, "constant", "miou") == pytest.approx(chance, abs=1e-6)
    assert 0.15 < chance < 0.25


def test_who_looks_inside_the_mask_sees_more_than_who_looks_at_the_box(tmp_path: Path) -> None:
    file = write_set(tmp_path, count=30, diagonal=True)
    striped = read_annotated(file, file.parent / "images")
    [table] = score_regions([patches_of("pixels")], striped, ("region",), Batches(8))
    for classifier in ("knn", "linear"):
        assert mean(table, "pixels", f"masks_{classifier}") == 1.0
    assert mean(table, "pixels", "boxes_knn") < 0.9


def test_the_same_numbers_come_from_any_batch_and_number_of_threads(
    data: Annotated, tables: dict[str, Table]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = score_regions([patches_of("oracle"), Constant()], data, batches=Batches(32))
    finally:
        torch.set_num_threads(threads)
    assert [str(table.rows) for table in again] == [str(tables[table.key].rows) for table in again]


def test_probes_of_hard_data_print_the_same_digits_on_any_number_of_threads() -> None:
    rng, threads = np.random.default_rng(0), torch.get_num_threads()
    middles = 0.15 * rng.standard_normal((12, 48))
    label = rng.integers(12, size=1500)
    features = (middles[label][:, None] + rng.standard_normal((1500, 4, 48))).astype(np.float16)
    names = [f"{number:02d}" for number in label]
    patches = (
        Patches(features[:1000], np.ones((1000, 4), bool)),
        Patches(features[1000:], np.ones((500, 4), bool)),
    )
    shares = []
    for count in (1, 3):
        torch.set_num_threads(count)
        linear = fit_probe(patches[0].means(), names[:1000], 0.1).predict(patches[1].means())
        attentive = fit_attentive(patches[0], names[:1000], 0.1).predict(patches[1])
        shares.append(
            [round(100 * np.mean(np.asarray(own) == names[1000:]), 1) for own in (linear, attentive)]
        )
    torch.set_num_threads(threads)
    assert shares[0] == shares[1]
    assert 25 < min(shares[0]) < 95


def test_attention_finds_the_patch_that_tells_the_class_where_the_mean_does_not() -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(2, size=400)
    features = rng.normal(0, 3, (400, 8, 6))
    features[:, :, 5] = 0
    for row, place in enumerate(rng.integers(8, size=400)):
        # One patch of eight is marked, and says the class; all others say noise.
        features[row, place] = [0, 0, 0, 0, 4 * label[row] - 2, 6]
    names = ["ab"[own] for own in label]
    known, asked = (
        Patches(part.astype(np.float16), np.ones((200, 8), bool)) for part in np.split(features, 2)
    )
    linear = fit_probe(known.means(), names[:200], 0.1).predict(asked.means())
    attentive = fit_attentive(known, names[:200], 0.1).predict(asked)
    right = [np.mean(np.asarray(own) == names[200:]) for own in (linear, attentive)]
    assert right[0] < 0.85
    assert right[1] > 0.95


def test_proposals_are_scored_by_the_objects_that_they_frame(data: Annotated) -> None:
    exact = np.array([[8, 8, 32, 32], [0, 0, 9, 9]], float)
    table = proposals_table(data, "half", lambda image: exact, Batches(8))
    # One of the two objects of each image is striped.
    for column in ("recall_50", "recall_75", "average"):
        assert mean(table, "half", column) == 0.5
    assert [column.chance for column in table.columns] == [0, 0, 0]
    none = proposals_table(data, "none", lambda image: np.zeros((0, 4)), Batches(8))
    assert mean(none, "none", "recall_50") == 0
    boxes = np.array([[0, 0, 2, 2]], np.float32)
    assert overlap_of(boxes, np.array([[1, 0, 3, 2.0]])) == pytest.approx(1 / 3)


# ---- formats ------------------------------------------------------------------------------------------


def write_formats(folder: Path, count: int, seed: int) -> Path:
    """The same two noisy squares in each image, annotated in every format, and a box without height."""
    images = folder / "images"
    images.mkdir(parents=True)
    rng, rows, files, lines, entries = np.random.default_rng(seed), [], [], [], []
    for number in range(count):
        name, boxes = f"{number:02d}", list[tuple[str, tuple[int, ...]]]()
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3))
        for x in (8, 40):
            colour = list(COLOURS)[rng.integers(3)]
            pixels[8:32, x : x + 24] = np.add(
                COLOURS[colour], rng.normal(0, 200, 3) + rng.normal(0, 50, (24, 24, 3))
            )
            boxes.append((colour, (x, 8, x + 24, 32)))
        boxes += [("red", (4, 40, 20, 40))] * (number == 0)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f"{name}.png")
        files.append({"id": name, "file_name": f"{name}.png"})
        xml = yolo = ""
        for colour, (x0, y0, x1, y1) in boxes:
            kind, box = list(COLOURS).index(colour), [x0, y0, x1 - x0, y1 - y0]
            rows.append({"image_id": name, "category_id": kind, "bbox": box})
            lines.append((name, f"/m/{kind}", *(side / SIDE for side in (x0, x1, y0, y1))))
            shares = (side / SIDE for side in ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
            yolo += " ".join(map(str, (kind, *shares))) + "\n"
            sides = f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
            xml += f"<object><name>{colour}</name><bndbox>{sides}</bndbox></object>"
        objects = {
            "bbox": [row["bbox"] for row in rows[-len(boxes) :]],
            "category": [own for own, _ in boxes],
        }
        entries.append(json.dumps({"file_name": f"{name}.png", "objects": objects}))
        packed = [{"bbox": row["bbox"], "predicted_iou": 0.9} for row in rows[-len(boxes) :]]
        for kind, content in (
            ("yolo/labels/{}.txt", yolo),
            ("Annotations/{}.xml", f"<annotation>{xml}</annotation>"),
            ("sa1b/{}.json", json.dumps({"image": {"width": SIDE, "height": SIDE}, "annotations": packed})),
        ):
            (folder / kind).parent.mkdir(parents=True, exist_ok=True)
            (folder / kind.format(name)).write_text(content)
    classes = [{"id": place, "name": name} for place, name in enumerate(COLOURS)]
    (folder / "coco.json").write_text(
        json.dumps({"annotations": rows, "images": files, "categories": classes})
    )
    (folder / "yolo" / "classes.txt").write_text("\n".join(COLOURS))
    (folder / "metadata.jsonl").write_text("\n".join(entries))
    head = [("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")]
    for name, table in (
        ("boxes.csv", [*head, *lines]),
        ("class-descriptions.csv", [(f"/m/{place}", name) for place, name in enumerate(COLOURS)]),
    ):
        (folder / name).write_text("".join(",".join(map(str, line)) + "\n" for line in table))
    return folder


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("formats")
    return write_formats(folder / "train", 12, 5), write_formats(folder / "val", 8, 6)


def test_the_same_boxes_give_the_same_figures_in_every_format(formats: tuple[Path, Path]) -> None:
    train, val = formats
    found = {}
    for place in ("coco.json", "boxes.csv", "metadata.jsonl", "yolo/labels", "Annotations"):
        own = read_annotated(val / place, val / "images", train / place, train / "images")
        assert own.left_out == {"no area": 2}, place
        tables = score_regions([patches_of("pixels")], own, ("region", "retrieval"), Batches(8))
        found[place] = [str(table.rows) for table in tables], own.asked.objects.names
    assert len({str(own) for own in found.values()}) == 1
    assert 0.2 < mean(tables[0], "pixels", "boxes_linear") < 1


def test_boxes_without_classes_are_framed_and_not_named(formats: tuple[Path, Path]) -> None:
    val = formats[1]
    own = read_annotated(val / "sa1b", val / "images")
    assert score_regions([patches_of("pixels")], own) == ()
    exact = proposals_table(
        own, "exact", lambda image: np.array([[8, 8, 32, 32], [40, 8, 64, 32.0]]), Batches(8)
    )
    assert mean(exact, "exact", "average") == 1.0


def test_names_that_are_no_text_are_names(formats: tuple[Path, Path], tmp_path: Path) -> None:
    val, images = formats[1], tmp_path / "images"
    images.mkdir()
    for number in range(8):
        name = images / os.fsdecode(b"caf\xe9%d.png" % number)
        shutil.copy(val / "images" / f"{number:02d}.png", name)
        shutil.copy(val / "Annotations" / f"{number:02d}.xml", name.with_suffix(".xml"))
    found = read_annotated(images, images)
    assert len(found.known.scenes) + len(found.asked.scenes) == 8
    assert found.left_out == {"no area": 1}


def test_what_is_wrong_with_annotations_is_told(formats: tuple[Path, Path], tmp_path: Path) -> None:
    val = formats[1]
    for name, content in (
        ("a.json", "{"),
        ("b.json", "[1]"),
        ("c.json", "{}"),
        ("d.csv", "a,b"),
        ("e.txt", "x"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name} (cannot be read|names no images).*name a JSON of COCO"):
            read_annotated(tmp_path / name, val / "images")
    with pytest.raises(UserError, match=r"leaves no image with regions .*image without annotations: 8"):
        read_annotated(tmp_path, val / "images")
    content = json.loads((val / "coco.json").read_text())
    content["images"] += [content["images"][0], {"id": "lvis", "coco_url": "http://x/val/07.png"}, 5]
    content["annotations"] += [
        {"image_id": "lvis", "bbox": [1, 1, 9, 9], "category_id": 0},
        {"image_id": 99},
        {},
        3,
    ]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    found = read_annotated(tmp_path / "odd.json", val / "images")
    assert found.left_out == {"image named twice": 1, "no area": 1, "row of an unknown image": 2}
    assert "lvis" in {scene.key for part in (found.known, found.asked) for scene in part.scenes}


def test_an_image_that_exif_turns_is_read_as_its_annotations_speak_of_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), (200, 0, 0)).save(tmp_path / "a.jpg", exif=exif)
    row = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8]}
    for number, (width, height) in enumerate(((40, 20), (20, 40), (30, 40)), start=1):
        image = {"id": 1, "file_name": "gone/a.jpg", "width": width, "height": height}
        content = {"images": [image], "annotations": [row], "categories": [{"id": 1, "name": "x"}]}
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(content))
    both = read_annotated(tmp_path / "1.json", tmp_path, tmp_path / "2.json")
    for truth in (both.known, both.asked):
        [scene] = truth.scenes
        assert open_scene(scene).size == (scene.width, scene.height)
    with pytest.raises(UserError, match=r"image has another size: 1"):
        read_annotated(tmp_path / "3.json", tmp_path)


# ---- the tool -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "toy"
    write_run(folder, folder.parent / "shards", text_classes=0)
    return folder


def test_a_run_is_scored_by_tokens_patches_and_crops(
    run: Path, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--images", shapes.parent / "images", "--limit", 24, "--workers", 1)
    assert run_tool(run, "--annotations", shapes, *options) == 0
    found = read_evaluation(run / "evaluation.json")
    region = found.table("shapes/region")
    assert list(region.rows) == [
        "trained", "trained/pooled", "trained/crops", "untrained", "pixels", "curation",
    ]  # fmt: skip
    for name, cells in region.rows.items():
        assert (cells["masks_knn"] is None) == (name in ("trained/crops", "pixels", "curation"))
        assert (cells["boxes_attentive"] is None) == (name != "trained/pooled")
    assert list(found.table("shapes/segmentation").rows) == ["trained"]
    assert list(found.table("shapes/proposals").rows) == ["selective search"]
    assert "Naming every place, shapes" in (run / "report_shapes.html").read_text()
    assert "## Naming regions, shapes" in (run / "evaluation.md").read_text()
    assert "shapes" in capsys.readouterr().out
    # Another file's tables stand beside them.
    other = write_set(run.parent / "other", count=12, seed=3).rename(run.parent / "other" / "more.json")
    options = ("--images", other.parent / "images", "--measures", "retrieval", "--without-crops")
    assert run_tool(run, "--annotations", other, *options) == 0
    keys = [table.key for table in read_evaluation(run / "evaluation.json").tables]
    assert keys[0] == "shapes/region"
    assert keys[-1] == "more/retrieval"


def test_label_files_are_scored_from_the_command_line(
    run: Path, formats: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = formats
    rest = ("--images", val / "images", "--out", tmp_path, "--curation", "none", "--without-crops")
    learn = ("--train-images", train / "images", "--train-annotations")
    options = (*rest, *learn, train / "yolo" / "labels")
    assert run_tool(run, "--annotations", val / "yolo" / "labels", *options) == 0
    said = capsys.readouterr().out
    assert "Left out: no area 2." in " ".join(said.split())
    assert "not measured, for the annotations lack classes, masks or frequencies" in said
    assert run_tool(run, "--annotations", val / "sa1b", *rest) == 0
    assert "segmentation" in capsys.readouterr().out.rpartition("not measured")[2]
    keys = [table.key for table in read_evaluation(tmp_path / "evaluation.json").tables]
    assert keys == ["labels/region", "labels/retrieval", "labels/proposals", "sa1b/proposals"]
    assert run_tool(run, "--annotations", val / "images", *rest) == 2
    assert "image without annotations: 8" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_exit_code_2(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(run) == 2
    assert run_tool(run, "--annotations", shapes) == 2
    assert run_tool(run, "--annotations", shapes, "--images", tmp_path) == 2
    assert run_tool(run, "--annotations", shapes, "--images", tmp_path, "--measures", "ocr") == 2
    assert run_tool(run, "--annotations", tmp_path / "no.json", "--images", tmp_path) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 5, lines
    assert all(line.startswith("megaregion: ") for line in lines)
    assert "image is not there: 41" in lines[2]


def test_an_export_and_any_model_are_scored_without_a_run(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export, model = tmp_path / "photos-regions", tmp_path / "clip"
    assert convert("to-hf", run, export, "--regions") == 0
    toy_vision("CLIPVision", model)
    options = (
        "--images",
        shapes.parent / "images",
        "--curation",
        "none",
        "--measures",
        "region,segmentation",
    )
    assert run_tool(export, "--annotations", shapes, *options, "--compare", model, "--trust-remote-code") == 0
    rows = read_evaluation(export / "evaluation.json").table("shapes/region").rows
    assert list(rows) == [
        "photos-regions", "photos-regions/crops", "pixels", "clip", "clip/crops", "photos-regions/token",
        "clip/masked",
    ]  # fmt: skip
    # The export's own region tokens are the run's; masks are drawn at the network's size.
    of_run = read_evaluation(run / "evaluation.json").table("shapes/region").rows["trained"]
    assert rows["photos-regions/token"]["boxes_knn"] == of_run["boxes_knn"]
    assert rows["photos-regions/token"]["masks_knn"] is not None
    assert list(read_evaluation(export / "evaluation.json").table("shapes/segmentation").rows) == [
        "photos-regions", "clip",
    ]  # fmt: skip
    photos = tmp_path / "photos"
    for split, number in itertools.product(("train", "val"), range(3)):
        for name, colour in COLOURS.items():
            (photos / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), colour).save(photos / split / name / f"{number}.png")
    options = ("--folder-dataset", photos, "--curation", "none", "--out", tmp_path / "out", "--seeds", 1)
    assert run_tool(model, *options) == 0
    table = read_evaluation(tmp_path / "out" / "evaluation.json").table("photos/image")
    assert list(table.rows) == ["clip", "pixels"]
    assert mean(table, "pixels", "knn") == 1.0
    assert "photos-regions" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["CLIPVision", "Siglip", "Siglip2Vision", "Dinov2", "MLCDVision"])
def test_any_vision_encoder_is_asked_by_patches_by_crops_and_by_what_it_pools_of_a_region(
    kind: str, data: Annotated, tmp_path: Path
) -> None:
    toy_vision(kind, tmp_path)
    model = load_huggingface(str(tmp_path))
    pools = model.tokens()
    assert pools is not None
    assert pools.name.endswith("/head" if "Siglip" in kind else "/masked")
    image, mask = open_scene(data.asked.scenes[0]), data.asked.scenes[0].objects[0].mask
    whole, half = ([0, 0, side, SIDE] for side in (SIDE, SIDE // 2))
    asked = [
        BoxedImage(image, np.array(boxes, np.float32), masks)
        for boxes, masks in (([whole], ()), ([whole, half, half], (None, None, mask)))
    ]
    regions = pools.encode(asked).region
    # The whole image as a region is the image; half of it is not, nor what a mask leaves of that.
    assert np.allclose(regions[:2], model.images([image] * 2), atol=1e-5)
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(regions[1:], 2)) > 1e-4
    few = dataclasses.replace(data, known=Truth(data.known.scenes[:4]), asked=Truth(data.asked.scenes[:4]))
    [table] = score_regions([model, pools, model.crops()], few, ("region",))
    assert [row["boxes_linear"] is not None for row in table.rows.values()] == [True] * 3
    assert [row["masks_linear"] is not None for row in table.rows.values()] == [True, True, False]


def test_patches_for_siglip_2_are_cut_as_its_processor_cuts_them(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    toy_vision("Siglip2Vision", tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(
        image, return_tensors="pt", max_num_patches=16, patch_size=8
    )
    ours = load_huggingface(str(tmp_path)).inputs([image])
    assert {key: value.tolist() for key, value in theirs.items() if key != "pixel_values"} == {
        key: value.tolist() for key, value in ours.items() if key != "pixel_values"
    }
    assert torch.allclose(theirs["pixel_values"], ours["pixel_values"], atol=1e-4)


def test_the_readmes_example_of_the_harness_runs(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (repository() / "megaregion" / "evaluation" / "README.md").read_text()
    code = [block for language, block in FENCE.findall(page) if language == "py"][1]
    shutil.copy(shapes, tmp_path / "instances_val2017.json")
    (tmp_path / "val2017").symlink_to(shapes.parent / "images")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("colour"))
    assert line.split()[1] == "100.0"
    assert line.split()[-1] == "-"


def test_the_readmes_way_from_ade20k_to_a_score_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (repository() / "megaregion" / "evaluation" / "README.md").read_text()
    code = next(block for language, block in FENCE.findall(page) if language == "py")
    ade = tmp_path / "ADEChallengeData2016"
    for kind in ("images", "annotations"):
        (ade / kind / "validation").mkdir(parents=True)
    names = "".join(f"{number}\t0.1\t1\t1\t{name}\n" for number, name in enumerate(COLOURS, 1))
    (ade / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{names}")
    rng = np.random.default_rng(0)
    for number in range(12):
        # Four quarters of three classes; the last one has no class, and any colour.
        quarters = np.append(rng.permutation(3) + 1, 0).reshape(2, 2).astype(np.uint8)
        colours = np.array([rng.integers(0, 256, 3), *COLOURS.values()], np.uint8)
        for kind, content in (("annotations", quarters), ("images", colours[quarters])):
            large = np.repeat(np.repeat(content, 32, axis=0), 32, axis=1)
            ending = "png" if kind == "annotations" else "jpg"
            Image.fromarray(large).save(ade / kind / "validation" / f"{number}.{ending}", quality=95)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = read_annotated(Path("ade20k_val.json"), ade / "images" / "validation")
    assert found.left_out == {"crowd": 12}
    [table] = score_regions([patches_of("oracle")], found, ("segmentation",), Batches(8))
    assert "over the 3 classes that occur" in table.told
    assert mean(table, "oracle", "miou") > 0.9


def test_mteb_takes_an_encoder_for_its_image_tasks() -> None:
    mteb = pytest.importorskip("mteb", reason="mteb is not installed")
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageFeature
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    rng = np.random.default_rng(0)

    def part(count: int) -> Dataset:
        label = [number % 3 for number in range(count)]
        colours = list(COLOURS.values())
        images = [
            Image.fromarray((rng.integers(0, 40, (32, 32, 3)) + np.array(colours[own]) // 2).astype(np.uint8))
            for own in label
        ]
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(COLOURS))})
        return Dataset.from_dict({"image": images, "label": label}, features=features)

    class Colours(AbsTaskClassification):
        metadata = TaskMetadata(
            name="Colours", description="Colours.", reference=None, type="ImageClassification",
            category="i2c", modalities=["image"], eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="accuracy",
            dataset={"path": "colours", "revision": "1"}, date=None, domains=None, task_subtypes=None,
            license=None, annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation="",
        )  # fmt: skip
        input_column_name = "image"
        samples_per_label = 4
        n_experiments = 2

        def load_data(self, *_: Any, **__: Any) -> None:
            self.dataset = DatasetDict(train=part(24), test=part(12))
            self.data_loaded = True

    model = mteb_model(CropEncoder("pixels", raw_pixels))
    [result] = mteb.evaluate(model, [Colours()], cache=None).task_results
    assert result.get_score() == 1.0
