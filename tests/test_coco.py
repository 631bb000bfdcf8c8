from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from megaregion.data.coco import CocoRegion, frame, mask_of, read_coco, region_of
from megaregion.data.sample import decode_mask
from megaregion.errors import UserError

IMAGE = {"id": 7, "file_name": "train/7.jpg", "width": 40, "height": 30}
DOG = {"id": 18, "name": "dog", "frequency": "r"}


def written(path: Path, *rows: Any, images: Any = (IMAGE,), categories: Any = (DOG,)) -> Path:
    content = {"images": list(images), "categories": list(categories), "annotations": list(rows)}
    path.write_text(json.dumps(content))
    return path


def row(**values: Any) -> dict[str, Any]:
    return {"image_id": 7, "category_id": 18, "bbox": [2, 3, 10, 8], "iscrowd": 0} | values


def read_one(path: Path) -> CocoRegion | None:
    coco = read_coco(path)
    return region_of(coco.images[0].rows[0], coco.images[0], coco.categories)


def test_polygons_and_both_kinds_of_run_lengths_are_the_pixels_that_pycocotools_gives() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 60, 2).tolist()
        shapes = [
            (rng.uniform(-0.2, 1.2, (int(rng.integers(3, 9)), 2)) * [width, height]).ravel().tolist()
            for _ in range(int(rng.integers(1, 4)))
        ]
        packed = coco_mask.merge(coco_mask.frPyObjects(shapes, height, width))
        pixels = coco_mask.decode(packed).astype(bool)
        assert np.array_equal(decode_mask(mask_of(shapes, height, width)), pixels)
        text = {"size": [height, width], "counts": packed["counts"].decode()}
        assert np.array_equal(decode_mask(mask_of(text, height, width)), pixels)
        listed = {"size": [height, width], "counts": list(mask_of(text, height, width).counts)}
        assert mask_of(listed, height, width) == mask_of(text, height, width)
        box = frame(mask_of(text, height, width))
        x, y, w, h = coco_mask.toBbox(packed).tolist()
        assert box == ((x, y, x + w, y + h) if pixels.any() else None)


def test_a_row_gives_class_box_shape_and_whether_it_is_a_crowd(tmp_path: Path) -> None:
    found = read_one(written(tmp_path / "a.json", row()))
    assert found is not None
    assert (found.category.name, found.category.frequency) == ("dog", "r")
    assert (found.box, found.mask, found.crowd) == ((2, 3, 12, 11), None, False)
    shape = {"size": [30, 40], "counts": [35, 10, 1155]}
    crowd = read_one(written(tmp_path / "b.json", row(iscrowd=1, segmentation=shape)))
    assert crowd is not None
    assert crowd.crowd
    assert crowd.box == (1, 5, 2, 15)
    assert read_one(written(tmp_path / "c.json", row(bbox=[50, 3, 10, 8]))) is None
    lvis = {key: value for key, value in IMAGE.items() if key != "file_name"}
    lvis["coco_url"] = "http://images.cocodataset.org/val2017/000000000007.jpg"
    [image] = read_coco(written(tmp_path / "d.json", images=[lvis])).images
    assert image.file_name == "val2017/000000000007.jpg"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"category_id": 19}, "unknown class"),
        ({"bbox": [1, 2, 3]}, "bad annotation"),
        ({"bbox": [1, 2, float("nan"), 3]}, "bad annotation"),
        ({"segmentation": [[1, 1, 5, 5]]}, "bad annotation"),
        ({"segmentation": [[1, 1, 5, 5, 1e9, 2]]}, "bad annotation"),
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, "bad annotation"),
        ({"segmentation": {"size": [30, 40], "counts": "~~"}}, "bad annotation"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused_with_a_reason(
    tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        read_one(written(tmp_path / "a.json", row(**values)))


def test_what_cannot_be_used_at_all_is_counted(tmp_path: Path) -> None:
    images = [IMAGE, IMAGE, {"id": 8, "file_name": "8.jpg"}, 5]
    rows = [row(), row(image_id=8), row(image_id=99), 3, {}]
    coco = read_coco(written(tmp_path / "a.json", *rows, images=images, categories=[DOG, {"id": 1}]))
    assert [image.file_name for image in coco.images] == ["train/7.jpg"]
    assert len(coco.images[0].rows) == 1
    assert coco.dropped == {
        "category without id and name": 1,
        "row without image": 2,
        "image named twice": 1,
        "image without id, name and size": 2,
        "row of an unknown image": 2,
    }


@pytest.mark.parametrize(("content", "told"), [("{", "cannot be read"), ("[1]", "holds no list of images")])
def test_a_file_that_is_no_coco_json_is_refused_in_one_line(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=told):
        read_coco(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_coco(tmp_path / "absent.json")
