"""Annotation files of other people: each lands on the pixels that it means, and none is lost in silence."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation_scenes import run, scene
from PIL import Image
from pycocotools import mask as coco
from test_curation_inputs import write_tar

from megaregion.curation.inputs import find
from megaregion.curation.inputs.annotations import read_annotations
from megaregion.curation.inputs.find import find_images
from megaregion.curation.inputs.source import Source
from megaregion.curation.inputs.tars import scan_tar
from megaregion.curation.picture import Picture
from megaregion.curation.settings import AnnotationSettings
from megaregion.data import formats
from megaregion.data.coco import mask_of
from megaregion.data.formats import read_labels, stream_json
from megaregion.data.sample import SampleRecord, decode_mask, encode_mask, parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError
from megaregion.schemas.curation import BOXED

WIDTH, HEIGHT = 96, 64
BOX = (16, 16, 48, 48)
"""Red, and around CORNER, both on blocks of the JPEG that is packed."""
ANGLE = [(64, 0), (96, 0), (96, 16), (80, 16), (80, 48), (64, 48)]
"""Blue: corners of an L."""
EASY = {"clusters": 2, "vocab": 384, "ocr": "none", "min_edge": 2.0, "max_area": 1.0, "crop_side": 64}
FORMATS = ("coco", "voc", "yolo", "openimages", "sa1b")


def picture(tint: int, orientation: int = 1) -> bytes:
    """A red box and a blue angle on grey, as a camera stores them; no two tints are alike."""
    pixels = np.full((HEIGHT, WIDTH, 3), 100 + tint, np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = (255, 0, 0)
    pixels[0:16, 64:96] = pixels[16:48, 64:80] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    return file.getvalue()


def angle() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[0:16, 64:96] = mask[16:48, 64:80] = True
    return mask


def write(path: Path, content: str | bytes | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_all_formats(folder: Path) -> None:
    """The same eight images, one of each orientation, annotated in each format."""
    polygon = [value for corner in ANGLE for value in corner]
    x0, y0, x1, y1 = BOX
    images, rows, lines = [], [], []
    for number in range(1, 9):
        name = f"{number}"
        for place, sub in enumerate(
            ("coco/images", "voc/JPEGImages", "yolo/images", "openimages/pictures", "sa1b")
        ):
            write(folder / sub / f"{place}{name}.png", picture(place * 8 + number, number))
        images.append({"id": number, "file_name": f"0{name}.png", "width": WIDTH, "height": HEIGHT})
        packed = coco.encode(np.asfortranarray(angle().astype(np.uint8)))["counts"].decode()
        runs = {"size": [HEIGHT, WIDTH], "counts": list(encode_mask(angle()).counts)}
        shape = [[polygon], {**runs, "counts": packed}, runs][number % 3]
        own = [
            {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0},
            {"bbox": [64, 0, 32, 48], "segmentation": shape, "iscrowd": 0},
            {"bbox": [0, 48, 96, 16], "iscrowd": 1},
        ]
        rows += [{**row, "image_id": number, "category_id": place} for place, row in enumerate(own)]
        write(folder / "sa1b" / f"4{name}.json", {"image": {}, "annotations": own[:2]})
        boxes = "".join(
            f"<object><name>{word}</name><bndbox><xmin>{a + 1}</xmin><ymin>{b + 1}</ymin><xmax>{c}</xmax>"
            f"<ymax>{d}</ymax></bndbox></object>"
            for word, (a, b, c, d) in (("red", BOX), ("blue", (64, 0, 96, 48)))
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        write(folder / "voc" / "Annotations" / f"1{name}.xml", f"<annotation>{size}{boxes}</annotation>")
        shares = [value / (WIDTH, HEIGHT)[place % 2] for place, value in enumerate(polygon)]
        center = ((x0 + x1) / 2 / WIDTH, (y0 + y1) / 2 / HEIGHT, (x1 - x0) / WIDTH, (y1 - y0) / HEIGHT)
        text = "\n".join(" ".join(map(str, (n, *values))) for n, values in ((0, center), (1, shares)))
        write(folder / "yolo" / "labels" / f"2{name}.txt", text)
        lines += [
            (f"3{name}", "/m/0red", x0 / WIDTH, x1 / WIDTH, y0 / HEIGHT, y1 / HEIGHT, 0),
            (f"3{name}", "/m/0blue", 64 / WIDTH, 1, 0, 48 / HEIGHT, 0),
            (f"3{name}", "/m/0blue", 0, 1, 0, 1, 1),
        ]
    classes = [{"id": place, "name": word} for place, word in enumerate(("red", "blue", "crowd"))]
    write(folder / "coco" / "annotations" / "instances.json",
        {"info": {}, "annotations": rows, "images": images, "categories": classes})  # fmt: skip
    write(folder / "yolo" / "data.yaml", "names: [red, blue]\n")
    write(folder / "openimages" / "class-descriptions.csv", "/m/0red,red\n/m/0blue,blue\n")
    with (folder / "openimages" / "train-annotations-bbox.csv").open("w", newline="") as file:
        head = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
        csv.writer(file).writerows([head, *lines])


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, tuple[np.ndarray, SampleRecord]], Any]:
    """Pixels and record of every packed sample, by the number of its format and its orientation."""
    root = tmp_path_factory.mktemp("formats")
    write_all_formats(root / "in")
    summary = run(root / "in", root / "out", **EASY, annotations="only", min_image_side=32)
    dataset = ShardedDataset(root / "out" / "shards")
    found = {}
    for index in range(len(dataset)):
        sample = dataset.read(index)
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"), int)
        found[sample.key.rsplit("_", 1)[-1]] = pixels, parse_sample(sample.record)
    return found, summary


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", range(len(FORMATS)), ids=FORMATS)
def test_boxes_and_masks_of_each_format_land_on_their_pixels_however_exif_turns_them(
    place: int, orientation: int, packed: tuple[dict[str, tuple[np.ndarray, SampleRecord]], Any]
) -> None:
    pixels, record = packed[0][f"{place}{orientation}"]
    red, blue = (pixels[..., a] - pixels[..., b] > 128 for a, b in ((0, 2), (2, 0)))
    assert red.sum() == 32 * 32, "the colors can be told apart"
    by_class = {region.source_class: region for region in record.regions}
    if FORMATS[place] == "sa1b":
        by_class = dict(
            zip(("red", "blue"), sorted(record.regions, key=lambda r: r.mask is not None), strict=True)
        )
    assert set(by_class) == {"red", "blue"}
    for shown, region in ((red, by_class["red"]), (blue, by_class["blue"])):
        rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
        assert region.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    if FORMATS[place] in ("coco", "yolo", "sa1b"):
        assert by_class["blue"].mask is not None
        mask = decode_mask(by_class["blue"].mask)
        assert (mask & blue).sum() / (mask | blue).sum() >= 0.99


def test_the_summary_names_each_file_with_its_format_and_its_rows_add_up(
    packed: tuple[dict[str, tuple[np.ndarray, SampleRecord]], Any],
) -> None:
    summary = packed[1]
    files = {Path(path).name: file for path, file in summary.annotations["files"].items()}
    counted = ("format", "here", "images", "rows")
    assert {name: tuple(file[what] for what in counted) for name, file in files.items()} == {
        "instances.json": ("COCO", 8, 8, 24), "train-annotations-bbox.csv": ("Open Images", 8, 8, 24),
        "class-descriptions.csv": ("Open Images' classes", 0, 0, 0),
        "Pascal VOC files": ("Pascal VOC files", 8, 8, 16), "YOLO files": ("YOLO files", 8, 8, 16),
    }  # fmt: skip
    assert summary.counts["annotated regions"] == 5 * 8 * 2
    assert summary.counts["dropped: crowd"] == 16
    assert summary.counts["images with annotations"] == 40
    assert summary.counts["proposed"] == 24 + 24 + 16 + 16 + 16
    # data.yaml alone annotates nothing by itself; the JSON files lie beside SA-1B's images.
    assert summary.others == 1
    assert summary.left_out["annotation file"] == 3 + 8 + 8
    assert summary.left_out["file of an image"] == 8
    assert "COCO" in summary.table()


# Which image an annotation is about


def dataset(*names: str, **image: Any) -> dict[str, Any]:
    """COCO's JSON with a box in each image; the box says which."""
    return {
        "images": [{"id": n, "file_name": name, **image} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "bbox": [n, 0, 5, 5]} for n in range(len(names))],
    }


def listed(folder: Path, out: Path, **settings: Any) -> Source:
    return find_images(folder, out / "stages", out, 2, annotation=AnnotationSettings(**settings))


def boxes_of(source: Source) -> dict[str, list[float]]:
    """The box that each image of a run got, by path."""
    found = {}
    for image in source.between(0, len(source)):
        for record in json.loads(source.annotation(image) or b"[]"):
            found[image.path] = record["annotations"][0]["bbox"]
    return found


def test_an_annotation_goes_to_the_image_whose_path_ends_alike_or_whose_folder_it_is_named_after(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    for name in ("train/1.jpg", "val/1.jpg", "train/2.jpg", "val/22.05.png", "other/3.jpg", "other/4.jpg"):
        write(folder / name, name)
    write(folder / "annotations" / "train.json", dataset("a/0.jpg", "1.jpg"))
    write(
        folder / "annotations" / "instances_val2017.json",
        dataset("x.jpg", "y.jpg", "val/1.jpg", "val/22.05.png"),
    )
    # The file lies among its images, and names one that is nowhere.
    write(folder / "other" / "_annotations.coco.json", dataset("3.jpg", "4.jpg", "5.jpg"))
    write(folder / "settings.json", {"images": "none", "annotations": [1, {"bbox": [1]}]})
    source = listed(folder, tmp_path / "out")
    assert boxes_of(source) == {
        "train/1.jpg": [1, 0, 5, 5], "val/1.jpg": [2, 0, 5, 5], "val/22.05.png": [3, 0, 5, 5],
        "other/3.jpg": [0, 0, 5, 5], "other/4.jpg": [1, 0, 5, 5],
    }  # fmt: skip
    summary = source.left_out["annotations"]
    assert {Path(p).name: (f["here"], f["images"]) for p, f in summary["files"].items()} == {
        "train.json": (1, 2), "instances_val2017.json": (2, 4), "_annotations.coco.json": (2, 3),
    }  # fmt: skip
    assert summary["images that they do not name"] == 1
    assert source.left_out["others"] == 1, "settings.json annotates nothing"


def test_a_tar_is_scanned_once_however_it_is_annotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / "a.json", dataset("1.jpg"))
    scans = []
    monkeypatch.setattr(find, "scan_tar", lambda path: scans.append(path) or scan_tar(path))

    def scanned() -> tuple[int, Any]:
        scans.clear()
        source = listed(tmp_path / "in", tmp_path / "out")
        # To look up an image its tar is scanned where it is read, not where it is listed.
        return len(scans), (source.left_out["annotations"], boxes_of(source))

    write_tar(tmp_path / "in" / "x.tar", [("1.jpg", b"1"), ("3.jpg", b"3")])
    count, first = scanned()
    assert (count, first[1], first[0]["images that they do not name"]) == (1, {"x.tar/1": [0, 0, 5, 5]}, 1)
    assert scanned() == (0, first)
    write_tar(tmp_path / "in" / "y.tar", [("2.jpg", b"2")])
    write(tmp_path / "in" / "a.json", dataset("1.jpg", "2.jpg"))
    assert scanned()[1][1] == {"x.tar/1": [0, 0, 5, 5], "y.tar/2": [1, 0, 5, 5]}
    write_tar(tmp_path / "in" / "x.tar", [("3.jpg", b"3")])
    assert scanned()[1][1] == {"y.tar/2": [1, 0, 5, 5]}
    assert scanned()[0] == 0


def test_of_two_images_that_an_annotation_fits_alike_none_gets_it(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg"):
        write(tmp_path / "in" / name, name)
    write(tmp_path / "in" / "annotations" / "all.json", dataset("1.jpg", "2.jpg"))
    source = listed(tmp_path / "in", tmp_path / "out")
    assert boxes_of(source) == {"b/2.jpg": [1, 0, 5, 5]}
    assert source.left_out["annotations"]["annotations that two images fit"] == 1


def test_annotations_above_the_images_are_found_and_a_file_elsewhere_is_named(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "data" / "val2017", tmp_path / "elsewhere.json"
    write(images / "1.jpg", "1")
    write(tmp_path / "data" / "annotations" / "instances_val2017.json", dataset("0.jpg", "1.jpg"))
    assert boxes_of(listed(images, tmp_path / "out")) == {"1.jpg": [1, 0, 5, 5]}
    write(elsewhere, dataset("1.jpg"))
    source = listed(images, tmp_path / "out", annotations_file=str(elsewhere))
    assert boxes_of(source) == {"1.jpg": [0, 0, 5, 5]}
    assert listed(images, tmp_path / "out", annotations="ignore").left_out["annotations"] == {}
    for content, why in (("{", "is no annotation"), ({"images": []}, "no images are named in it")):
        with pytest.raises(UserError, match=rf"--annotations-file .*elsewhere.json .*{why}"):
            listed(images, tmp_path / "out", annotations_file=str(write(elsewhere, content)))
    with pytest.raises(UserError, match=r"--annotations-file .*absent is no file"):
        listed(images, tmp_path / "out", annotations_file=str(tmp_path / "absent"))


def test_a_file_of_many_images_is_read_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / "1.jpg", "1")
    file = write(tmp_path / "in" / "a.json", dataset("1.jpg"))
    first = listed(tmp_path / "in", tmp_path / "out")
    before = first.identity(0)
    with monkeypatch.context() as patch:
        patch.setattr("megaregion.curation.inputs.index.read_dataset", None)
        assert listed(tmp_path / "in", tmp_path / "out").digest == first.digest
    write(file, dataset("0.jpg", "1.jpg"))
    again = listed(tmp_path / "in", tmp_path / "out")
    assert boxes_of(again) == {"1.jpg": [1, 0, 5, 5]}
    assert again.identity(0) != before, "what was made of the other box is stale"
    file.unlink()
    assert listed(tmp_path / "in", tmp_path / "out").identity(0) == [("1", again.images(0)[0].sha256)]


def test_images_in_tars_get_annotations_and_captions_reach_the_record(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    jpegs = {}
    for number in range(3):
        file = io.BytesIO()
        scene(number, 96).save(file, "JPEG", quality=95)
        jpegs[number] = file.getvalue()
    write_tar(
        folder / "x.tar", [("a/1.jpg", jpegs[1]), ("a/1.txt", b"\xef\xbb\xbf a dog "), ("2.jpg", jpegs[2])]
    )
    write(folder / "0.jpg", jpegs[0])
    write(folder / "0.txt", "a cat")
    write(folder / "annotations.json", dataset("0.jpg", "1.jpg", "2.jpg"))
    texts = {
        "images": [{"id": 9, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 9, "caption": "a bird"}],
    }
    write(folder / "captions.json", texts)
    easy = {**EASY, "min_edge": 1.0, "annotations": "only"}
    summary = run(folder, tmp_path / "out", **easy, captions=True)
    assert summary.counts["images with annotations"] == 3
    shards = ShardedDataset(tmp_path / "out" / "shards")
    records = {shards.read(n).key: parse_sample(shards.read(n).record) for n in range(3)}
    assert {key: record.caption for key, record in records.items()} == {
        "0": "a cat", "x_a_1": "a dog", "x_2": "a bird",
    }  # fmt: skip
    assert {key: record.regions[0].box[0] for key, record in records.items()} == {
        "0": 0,
        "x_a_1": 1,
        "x_2": 2,
    }
    # Without captions, only packing is done again.
    made = tmp_path / "out" / "stages" / "propose" / "00000" / "candidates.jsonl"
    before = made.stat().st_mtime_ns
    run(folder, tmp_path / "out", **easy)
    assert made.stat().st_mtime_ns == before
    shards = ShardedDataset(tmp_path / "out" / "shards")
    assert {parse_sample(shards.read(n).record).caption for n in range(3)} == {""}


@pytest.mark.parametrize(
    ("mode", "used", "proposed"), [("prefer", 1, True), ("only", 1, False), ("ignore", 0, True)]
)
def test_an_image_without_a_usable_annotation_is_proposed_for_unless_only_annotations_count(
    mode: str, used: int, proposed: bool, tmp_path: Path
) -> None:
    for number in range(2):
        write(tmp_path / "in" / f"{number}.jpg", "")
        scene(number, 96).save(tmp_path / "in" / f"{number}.jpg", quality=95)
    rows = [
        {"image_id": 0, "bbox": [20, 20, 40, 40]}, {"image_id": 1, "bbox": [20, 20, 40, 40], "iscrowd": 1},
        {"image_id": 1, "bbox": [20, 20, 0, 40]},
    ]  # fmt: skip
    write(tmp_path / "in" / "a.json", {**dataset("0.jpg", "1.jpg"), "annotations": rows})
    summary = run(tmp_path / "in", tmp_path / "out", "propose", **EASY, annotations=mode)
    counts = summary.counts
    assert counts.get("images with annotations", 0) == counts.get("annotated regions", 0) == used
    assert counts.get("images whose annotations are all unusable", 0) == used
    assert (counts.get("dropped: crowd", 0), counts.get("dropped: no area", 0)) == (used, used)
    assert (counts["proposed"] > 3) == proposed


# What a row says


def regions_of(*rows: dict[str, Any], image: dict[str, Any] | None = None, **options: Any) -> Any:
    view = Picture(np.zeros((HEIGHT, WIDTH, 3), np.uint8), None, options.pop("orientation", 1))
    content = json.dumps({"image": image or {}, "annotations": rows}).encode()
    found, counts = read_annotations(content, view, **options) or ([], {})
    return [region.box for region in found], dict(counts)


def test_a_row_whose_mask_is_unusable_gives_its_box_and_each_other_has_its_reason() -> None:
    good = {"bbox": [4, 4, 8, 8]}
    box = (4, 4, 12, 12)
    for shape in (
        [[1, 2]],
        [[4, 4, 12, 1e9, 8, 8]],
        {"size": [1, 1], "counts": "11"},
        [[4, 4, 4.1, 4, 4, 4.1]],
        [[]],
    ):
        assert regions_of({**good, "segmentation": shape}) == ([box], {BOXED: 1}), shape
    assert regions_of({"segmentation": [[4, 4, 4.2, 4, 4.2, 4.2]]}) == ([(4, 4, 4.2, 4.2)], {BOXED: 1})
    assert regions_of({**good, "segmentation": [[2, 2, 6, 2, 6, 6, 2, 6]]}) == ([(2, 2, 6, 6)], {})
    zigzag = [[n % 2 * 90 for n in range(2**16)]]
    assert regions_of({**good, "segmentation": zigzag}) == ([box], {BOXED: 1}), (
        "its outline would fill the memory"
    )
    assert regions_of({"bbox": [4, 4, 8, -8]}) == ([], {"no area": 1})
    assert regions_of({"bbox": [-9, 4, 8, 8]}) == ([], {"outside the image": 1})
    assert regions_of({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "11"}}, {}) == (
        [],
        {"bad annotation": 2},
    )
    assert regions_of(good, image={"width": 640, "height": 480}) == ([], {"of an image of another size": 1})
    assert regions_of(good, image={"width": [], "height": {}}) == ([box], {})


def test_shares_of_the_sides_are_of_the_stored_pixels_unless_the_user_knows_better() -> None:
    row = {"bbox": [0.25, 0.5, 0.25, 0.5], "relative": True}
    assert regions_of(row) == ([(24, 32, 48, 64)], {})
    # Turned by a quarter: the stored image is 64 wide and 96 high.
    assert regions_of(row, orientation=6) == ([(0, 16, 48, 32)], {})
    assert regions_of(row, orientation=6, pixels="upright") == ([(24, 32, 48, 64)], {})
    size = {"width": WIDTH, "height": HEIGHT}
    turned = regions_of({"bbox": [0, 0, 9, 9]}, image=size, orientation=6, pixels="stored")
    assert turned == ([(87, 0, 96, 9)], {})


def test_a_thousand_masks_are_the_same_here_and_in_pycocotools_packed_or_not() -> None:
    rng = np.random.Generator(np.random.Philox(key=5))
    for _ in range(1000):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        mask = rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 0.98, 1.0])
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        ours = mask_of({"size": [height, width], "counts": theirs["counts"].decode()}, height, width)
        assert ours == encode_mask(mask)
        assert np.array_equal(decode_mask(ours), coco.decode(theirs))
        assert (
            coco.frPyObjects({"size": [height, width], "counts": list(ours.counts)}, height, width) == theirs
        )


# Files as they come


def test_json_is_read_item_by_item_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {
        "info": {"year": 2017},
        "empty": [],
        "annotations": [1, [2, "]}"], {"a": "\u00fc\\"}],
        "last": 3.5,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False).encode()
    for chunk in (1, 2, 7, 1000):
        monkeypatch.setattr(formats, "CHUNK", chunk)
        for start in (b"", b"\xef\xbb\xbf"):
            found = list(stream_json(io.BytesIO(start + text)))
            assert [item for key, item, *_ in found if key == "annotations"] == content["annotations"]
            assert [key for key, *_ in found] == ["info", *["annotations"] * 3, "last"]
            for _, item, said, place in found:
                there = (start + text)[place : place + len(said)]
                assert said.encode("latin-1") == there
                assert json.loads(there) == item
        for broken in (
            text[:-1],
            text[:30],
            b"[1]",
            b"",
            b'{"a": [1,',
            b'{"a" 1}',
            text[:2],
            b'{"a": "\xff"}',
        ):
            with pytest.raises(ValueError, match=r"."):
                list(stream_json(io.BytesIO(broken)))
    monkeypatch.setattr(formats, "MAX_VALUE", 1000)
    endless = io.BytesIO(b'{"a": "' + b"x" * 10**6)
    with pytest.raises(ValueError, match=r"."):
        list(stream_json(endless))
    assert endless.tell() < 5000


def test_a_damaged_file_of_annotations_is_named_and_nothing_of_it_is_used(tmp_path: Path) -> None:
    write(tmp_path / "in" / "1.jpg", "1")
    write(tmp_path / "in" / "a.json", json.dumps(dataset("1.jpg"))[:-5])
    source = listed(tmp_path / "in", tmp_path / "out")
    assert boxes_of(source) == {}
    [(path, why)] = source.left_out["bad"].items()
    assert path.endswith("a.json")
    assert why.startswith("annotations that cannot be read")


def test_captions_and_foreign_xml_are_no_labels_and_hostile_ones_cost_nothing(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path / "a.txt", "a dog and 2 cats")) is None
    assert read_labels(write(tmp_path / "a.xml", "<svg></svg>")) is None
    bomb = "<!DOCTYPE a [<!ENTITY b 'c'><!ENTITY d '&b;&b;'>]><annotation><object>&d;</object></annotation>"
    for content in (bomb, "<annotation><object>", "<annotation><object><name>x</name></object></annotation>"):
        kind, size, [row] = read_labels(write(tmp_path / "b.xml", content)) or ("", (), [{}])
        assert (kind, size, "bbox" in row) == ("Pascal VOC", (0, 0), False)
    write(tmp_path / "obj.names", "cat\ndog\n")
    labels = write(tmp_path / "labels" / "1.txt", "1 .5 .5 .2 .2 0.9\n0 x\n7 .5 .5 1 1\n")
    _, _, rows = read_labels(labels) or ("", (), [])
    assert rows == [
        {"class": "dog", "bbox": [0.4, 0.4, 0.2, 0.2], "relative": True, "score": 0.9}, {},
        {"class": "7", "bbox": [0, 0, 1, 1], "relative": True},
    ]  # fmt: skip
