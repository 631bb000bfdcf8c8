"""The region class that goes with exported weights: the trainer's embeddings, without megaregion."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_runs import MODEL, convert, noise, write_run
from PIL import Image
from torch import Tensor

from megaregion.config import DataConfig, RegionStart, RegionWeights
from megaregion.data.image import Crop
from megaregion.data.sample import encode_mask
from megaregion.data.transforms import visibility
from megaregion.export import ExportOptions, export_checkpoint
from megaregion.models import RegionEncoder

HEIGHT, WIDTH = 64, 96

BOXES = [
    [[0, 0, 33, 40], [10.5, 3, 60, 64], [90, 60, 95, 63], [1, 1, 2, 2], [-20, -9, 40, 200]],
    [[16, 16, 48, 48]],
    [],
]
"""Boxes of three images: uneven, none, smaller than a patch, beyond the image."""


def loaded(folder: Path) -> Any:
    from transformers import AutoModel

    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    registers = "num_register_tokens" in model.config.to_dict()
    assert type(model).__name__ == ("RegisterVisionModel" if registers else "RegionVisionModel")
    return model.eval()


def exported(
    folder: Path, weights: RegionWeights = "shared", registers: int = 0, start: RegionStart = "class"
) -> tuple[RegionEncoder, Any]:
    config = dataclasses.replace(MODEL, region_weights=weights, registers=registers, region_start=start)
    encoder = write_run(folder / "run", config=config)
    export_checkpoint(folder / "run", folder / "out", ExportOptions(regions=True))
    return encoder, loaded(folder / "out")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[RegionEncoder, Any]:
    return exported(tmp_path_factory.mktemp("regions"))


def expected(encoder: RegionEncoder, image: Tensor, boxes: Any, masks: Any) -> Tensor:
    """The trainer's embeddings of one image's regions, by the trainer's own rule of who sees what."""
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    rows, columns = HEIGHT // MODEL.patch_size, WIDTH // MODEL.patch_size
    crop = Crop(0, 0, WIDTH, HEIGHT)
    visible = visibility(corners, masks, crop, rows, columns, DataConfig().patch_coverage)
    with torch.no_grad():
        return encoder(image[None], torch.from_numpy(visible)[None])[0]


@pytest.mark.parametrize(
    ("weights", "registers", "start"),
    [
        ("shared", 0, "class"), ("separate", 0, "class"), ("shared", 4, "class"), ("separate", 1, "learned"),
        ("shared", 0, "learned"),
    ],
)  # fmt: skip
def test_region_features_equal_the_trainers_embeddings(
    tmp_path: Path, weights: RegionWeights, registers: int, start: RegionStart
) -> None:
    encoder, model = exported(tmp_path, weights, registers, start)
    images = noise(3, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        found = model(pixel_values=images).last_hidden_state
        torch.testing.assert_close(found, encoder.vit(images).image, atol=1e-5, rtol=0)
    features = model.get_region_features(images, boxes=BOXES)
    assert [tuple(each.shape) for each in features] == [(5, 32), (1, 32), (0, 32)]
    for image, boxes, found in zip(images, BOXES, features, strict=True):
        if boxes:
            ours = expected(encoder, image, boxes, [None] * len(boxes))
            torch.testing.assert_close(found, ours, atol=1e-5, rtol=0)


def test_a_region_with_a_mask_is_judged_by_its_mask(pair: tuple[RegionEncoder, Any]) -> None:
    encoder, model = pair
    images = noise(2, 3, HEIGHT, WIDTH)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    disk = (y - 30) ** 2 + (x - 50) ** 2 < 22**2
    sliver = (x == 71) & (y < 9)
    nothing = np.zeros((HEIGHT, WIDTH), dtype=bool)
    masks = np.stack([disk, sliver, nothing])
    boxes = [[28, 8, 72, 52], [71, 0, 72, 9], [40, 40, 44, 44]]
    found = model.get_region_features(images, boxes=[boxes, [[0, 0, 9, 9]]], masks=[masks, None])
    ours = expected(encoder, images[0], boxes, [encode_mask(mask) for mask in masks])
    torch.testing.assert_close(found[0], ours, atol=1e-5, rtol=0)
    assert found[1].shape == (1, 32)
    [alone] = model.get_region_features(images[:1], masks=[masks[:2]])
    torch.testing.assert_close(alone, ours[:2], atol=1e-5, rtol=0)


def test_regions_of_other_images_change_nothing(pair: tuple[RegionEncoder, Any]) -> None:
    _, model = pair
    images = noise(3, 3, HEIGHT, WIDTH)
    together = model.get_region_features(images, boxes=BOXES)
    [alone] = model.get_region_features(images[1:2], boxes=BOXES[1:2])
    torch.testing.assert_close(together[1], alone, atol=1e-5, rtol=0)
    [normed] = model.get_region_features(images[1:2], boxes=BOXES[1:2], projected=False)
    assert normed.shape == (1, MODEL.width)
    with torch.no_grad():
        torch.testing.assert_close(model.projection(normed), alone)


def test_regions_that_do_not_fit_are_named(pair: tuple[RegionEncoder, Any]) -> None:
    _, model = pair
    images = noise(2, 3, HEIGHT, WIDTH)
    for message, arguments in {
        "give boxes, masks or both": {},
        "boxes must have an entry for each of 2 images, got 1": {"boxes": [[]]},
        "image 1 has neither boxes nor masks": {"boxes": [[[0, 0, 9, 9]], None]},
        "image 0 has 1 boxes and 2 masks": {
            "boxes": [[[0, 0, 9, 9]], []],
            "masks": [torch.ones(2, HEIGHT, WIDTH), None],
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            model.get_region_features(images, **arguments)
    with pytest.raises(ValueError, match="does not divide"):
        model.get_region_features(noise(1, 3, 65, 64), boxes=[[]])


def test_the_cards_region_code_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    assert convert("to-hf", tmp_path / "run", tmp_path / "out", "--regions", "--check") == 0
    # No report of weights that the class does not know.
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    load, regions = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    scope: dict[str, Any] = {"image": Image.fromarray(np.full((80, 96, 3), 90, dtype=np.uint8))}
    monkeypatch.chdir(tmp_path / "out")
    exec(load, scope)
    exec(regions, scope)
    assert scope["regions"].shape == (1, 32)
    # 96 x 80 within the 16 patches of training: 4 columns, 3 rows.
    assert scope["inputs"]["pixel_values"].shape == (1, 3, 48, 64)
