from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from megaregion.data.coco import Region, Unusable, frame, mask_of, region_of
from megaregion.data.sample import decode_mask


def said(**values: Any) -> Region:
    return region_of({"bbox": [2, 3, 10, 8]} | values, 40, 30)


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


def test_a_row_gives_its_box_or_the_frame_of_its_shape() -> None:
    assert said() == ((2, 3, 12, 11), None, False)
    assert said(bbox=[-2, 3, 10, 80]).box == (0, 3, 8, 30)
    assert said(bbox=[0.5, 0.1, 0.25, 0.2], relative=True).box == (20, 3, 30, 9)
    shape = {"size": [30, 40], "counts": [35, 10, 1155]}
    assert said(segmentation=shape) == ((1, 5, 2, 15), mask_of(shape, 30, 40), False)


@pytest.mark.parametrize(
    "shape",
    [
        [[1, 1, 5, 5]],
        [[1, 1, 5, 5, 1e9, 2]],
        {"size": [40, 30], "counts": [1200]},
        {"size": [30, 40], "counts": "~~"},
    ],
)
def test_the_box_stands_in_for_a_shape_that_cannot_be_used(shape: Any) -> None:
    assert said(segmentation=shape) == ((2, 3, 12, 11), None, True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"bbox": [1, 2, 3]}, "bad annotation"),
        ({"bbox": None}, "bad annotation"),
        ({"bbox": [1, 2, float("nan"), 3]}, "bad annotation"),
        ({"bbox": [2, 3, 10, 0]}, "no area"),
        ({"segmentation": {"size": [30, 40], "counts": [1200]}}, "no area"),
        ({"bbox": [50, 3, 10, 8]}, "outside the image"),
    ],
)
def test_a_row_that_gives_no_region_says_why(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        said(**values)
