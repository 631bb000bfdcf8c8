"""HuggingFace's datasets as input: rows of Parquet and Arrow files, and metadata beside images."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from curation_scenes import run, silent
from PIL import Image
from pyarrow import parquet
from test_annotations import ANGLE, BOX, EASY, picture, write
from test_check import kinds_of, told
from test_curation_inputs import write_tar

from megaregion.curation.inputs.check import check_images
from megaregion.curation.inputs.columnar import ROWS, Columnar
from megaregion.curation.inputs.find import find_images
from megaregion.curation.inputs.source import Source
from megaregion.curation.settings import AnnotationSettings, ImageSettings
from megaregion.data.sample import SampleRecord, parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LISTS = pa.struct(
    [
        ("bbox", pa.list_(pa.list_(pa.float32(), 4))), ("category", pa.list_(pa.int64())),
        ("segmentation", pa.list_(pa.list_(pa.list_(pa.float32())))),
        ("keypoints", pa.list_(pa.list_(pa.int32()))),
    ]
)  # fmt: skip
STRUCTS = pa.list_(pa.struct([("bbox", pa.list_(pa.float64())), ("category", pa.int64())]))
CLASSES = {"names": ["red", "blue"], "_type": "ClassLabel"}
FEATURES = {
    "image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"},
    "objects": {"bbox": {"feature": {}, "_type": "List"}, "category": {"feature": CLASSES, "_type": "List"}},
}  # fmt: skip
"""As datasets 5 describes them, in the metadata of either kind of file."""


def table(rows: list[dict[str, Any]], objects: Any = LISTS, **more: Any) -> pa.Table:
    kinds = {"image": IMAGE, "text": pa.string(), "objects": objects, **more}
    used = [(name, kind) for name, kind in kinds.items() if any(name in row for row in rows)]
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.Table.from_pylist(rows, pa.schema(used).with_metadata(metadata))


def save(path: Path, content: pa.Table, block: int = 2) -> Path:
    """As Parquet, or as an Arrow stream, which is what save_to_disk writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(content, path, row_group_size=block)
    else:
        with pa.ipc.new_stream(str(path), content.schema) as writer:
            writer.write_table(content, block)
    return path


def row(tint: int, text: str = "", structs: bool = False, **image: Any) -> dict[str, Any]:
    """The red box and the blue angle of an image."""
    boxes = [[BOX[0], BOX[1], 32, 32], [64, 0, 32, 48]]
    pairs = [{"bbox": box, "category": n} for n, box in enumerate(boxes)]
    lists = {
        "bbox": boxes, "category": [0, 1], "keypoints": [[1, 2, 1], []],
        "segmentation": [[], [[value for corner in ANGLE for value in corner]]],
    }  # fmt: skip
    return {
        "image": {"bytes": picture(tint), "path": "a.png", **image}, "text": text,
        "objects": pairs if structs else lists,
    }  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images in three files; one half of the last image's pixels is missing."""
    folder = tmp_path_factory.mktemp("huggingface")
    save(folder / "data" / "train-00000-of-00001.parquet", table([row(n, f"text {n}") for n in range(3)]))
    save(
        folder / "saved" / "data-00000-of-00001.arrow", table([row(n, structs=True) for n in (3, 4)], STRUCTS)
    )
    write(folder / "saved" / "state.json", {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    bad = [
        {"image": None}, {"image": {"bytes": None, "path": None}}, {"image": {"bytes": b"no", "path": ""}},
        {"image": {"bytes": None, "path": "/etc/passwd"}}, {"image": {"bytes": picture(9)[:100]}},
    ]  # fmt: skip
    save(folder / "bad.parquet", table(bad))
    # What img2dataset leaves, and a file that is none.
    save(folder / "urls.parquet", pa.table({"url": ["https://x/y.jpg"], "width": [3]}))
    write(folder / "broken.arrow", b"something")
    return folder


def listed(folder: Path, out: Path, **settings: Any) -> Source:
    return find_images(folder, out / "stages", out, 2, annotation=AnnotationSettings(**settings))


def samples(out: Path) -> dict[str, tuple[np.ndarray, SampleRecord]]:
    shards = ShardedDataset(out / "shards")
    read = [shards.read(n) for n in range(len(shards))]
    pixels = [np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"), int) for sample in read]
    return {sample.key: (own, parse_sample(sample.record)) for sample, own in zip(read, pixels, strict=True)}


def test_every_row_becomes_a_sample_with_its_boxes_masks_classes_and_text_and_all_others_are_counted(
    dataset: Path, tmp_path: Path
) -> None:
    options = {**EASY, "annotations": "only", "min_image_side": 32, "piece_images": 2, "captions": True}
    summary = run(dataset, tmp_path / "out", **options)
    found = samples(tmp_path / "out")
    keys = [f"data_train-00000-of-00001_{n}" for n in range(3)]
    assert list(found) == [*keys, "saved_data-00000-of-00001_0", "saved_data-00000-of-00001_1"]
    assert [record.caption for _, record in found.values()] == ["text 0", "text 1", "text 2", "", ""]
    for key, (pixels, record) in found.items():
        red, blue = (pixels[..., a] - pixels[..., b] > 128 for a, b in ((0, 2), (2, 0)))
        by_class = {region.source_class: region for region in record.regions}
        assert set(by_class) == {"red", "blue"}
        for shown, region in ((red, by_class["red"]), (blue, by_class["blue"])):
            rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
            assert region.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert (by_class["blue"].mask is not None) == key.startswith("data")
    assert summary.counts["annotated regions"] == 10
    assert summary.counts["keypoints not used"] == 3
    assert summary.unusable == {
        "no image in its row": 2, "not an image": 1, "truncated or damaged": 1,
        "named by a path alone; embed its bytes": 1,
    }  # fmt: skip
    assert summary.bad["broken.arrow"].startswith("not a Parquet or Arrow file")
    assert summary.bad["bad.parquet/3"] == "named by a path alone; embed its bytes"
    settings = ImageSettings(min_image_side=32)
    checked = check_images(dataset, tmp_path / "x", settings, AnnotationSettings(), silent, workers=0)
    assert told(summary) == kinds_of(checked)
    assert summary.left_out == {
        "Parquet or Arrow file": 3, "unusable Parquet or Arrow file": 1, "other file": 2,
    }  # fmt: skip
    assert checked.total == 5 + 5 + 3 + 1 + 2


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_rows_are_read_in_any_order_and_few_at_a_time_whatever_the_blocks(
    ending: str, tmp_path: Path
) -> None:
    contents = [bytes([n]) * (1 + n) for n in range(50)]
    rows = [{"image": {"bytes": content}} for content in contents]
    for block in (1, 7, 50):
        file = Columnar(save(tmp_path / f"{block}{ending}", table(rows), block))
        assert len(file) == 50
        for number in (0, 1, 2, 40, 3, 49, 0, 17, 18, 35, *range(50)):
            assert file.image(number) == contents[number]
            assert file._rows.num_rows <= max(ROWS, block if ending == ".arrow" else 0)


def test_a_file_cut_short_is_read_up_to_the_damage_and_named(tmp_path: Path) -> None:
    whole = save(tmp_path / "in" / "a.arrow", table([row(n) for n in range(4)])).read_bytes()
    (tmp_path / "in" / "a.arrow").write_bytes(whole[:-100])
    source = listed(tmp_path / "in", tmp_path / "out")
    assert [image.key for image in source.between(0, len(source))] == ["a_0", "a_1"]
    assert source.left_out["bad"]["a.arrow"].startswith("truncated or damaged")
    assert source.left_out["bad"]["a.arrow"].endswith("images before it: 2")
    (tmp_path / "in" / "a.arrow").write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.arrow changed while curation ran; run again"):
        source.read(source.images(0)[0])


def test_of_several_columns_of_images_one_has_to_be_named(tmp_path: Path) -> None:
    second = {"other": {"bytes": picture(7), "path": ""}}
    file = save(
        tmp_path / "in" / "a.parquet", table([{**row(1), **second}], other=IMAGE).replace_schema_metadata()
    )
    with pytest.raises(
        UserError, match=r"a\.parquet: several columns of images \(image, other\); name one by"
    ):
        listed(tmp_path / "in", tmp_path / "out")
    source = listed(tmp_path / "in", tmp_path / "out", image_column="other")
    assert source.read(source.images(0)[0]) == picture(7)
    before = source.identity(0)
    again = listed(tmp_path / "in", tmp_path / "out", image_column="image")
    assert again.read(again.images(0)[0]) == picture(1)
    assert again.identity(0) != before
    with pytest.raises(UserError, match="no column text of images; name another one by --image-column"):
        listed(tmp_path / "in", tmp_path / "out", image_column="text")
    with pytest.raises(UserError, match=r"is a file of images; give its folder, --images .*in"):
        listed(file, tmp_path / "out", image_column="image")


def test_keys_of_a_tar_stay_when_files_of_the_same_name_lie_beside_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "0.tar", [("1.jpg", picture(1))])
    save(tmp_path / "in" / "0.parquet", pa.table({"url": ["https://x/y.jpg"]}))
    source = listed(tmp_path / "in", tmp_path / "out")
    assert [image.key for image in source.images(0)] == ["0_1"]
    save(tmp_path / "in" / "0.parquet", table([row(n) for n in range(2)]))
    save(tmp_path / "in" / "0.arrow", table([row(n) for n in range(2)]))
    source = listed(tmp_path / "in", tmp_path / "out")
    keys = [image.key for image in source.between(0, len(source))]
    assert len({*keys}) == len(keys) == 5


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_metadata_beside_images_gives_texts_and_boxes(ending: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for part in ("train", "test"):
        write(folder / part / "1.png", picture(len(part)))
        entry = {"file_name": "1.png", "text": f"of {part}", "objects": row(0, structs=True)["objects"]}
        lines = [json.dumps(entry), "", json.dumps({"file_name": "absent.png"})]
        if ending == "csv":
            lines = ["file_name,text,note", f'1.png,"of {part}",x']
        write(folder / part / f"metadata.{ending}", "\n".join(lines))
    write(folder / "log.jsonl", '{"step": 1}\n{"file_name": "1.png"}\n')
    source = listed(folder, tmp_path / "out", captions=True)
    images = list(source.between(0, len(source)))
    assert [source.caption(image) for image in images] == ["of test", "of train"]
    records = [json.loads(source.annotation(image) or b"[{}]")[0].get("annotations", []) for image in images]
    boxes = [[16, 16, 32, 32], [64, 0, 32, 48]]
    assert [[one["bbox"] for one in record] for record in records] == [boxes if ending == "jsonl" else []] * 2
    assert source.kinds["annotation file"][0] == 2
    assert {file["format"] for file in source.left_out["annotations"]["files"].values()} == {"imagefolder"}
