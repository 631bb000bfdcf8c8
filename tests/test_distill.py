"""A teacher of patch features: what it sees of the student's crops, and which encoders may be one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from head_reference import group_of_one, place_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import toy_config, toy_vision

from megaregion.config import StageConfig
from megaregion.errors import UserError
from megaregion.models import foreign
from megaregion.training import losses
from megaregion.training.losses import Teacher

PATCHES = {"CLIPVision": 16, "Siglip": 4, "Siglip2Vision": 16, "Dinov2": 4, "DINOv3ViT": 8, "MLCDVision": 8}
"""Side of a teacher's patches in pixels, by its kind; the student's is 8."""
STAGES = {"stages": (StageConfig(48, 16),)}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with group_of_one():
        yield


def teacher(folder: Path, **changes: object) -> Teacher:
    config = toy_config(folder, folder, distill__teacher=str(folder), **STAGES, **changes)
    return Teacher(config, place_of(dist.group.WORLD))


def crops(side: int) -> Tensor:
    """Crops of 3 images on the 0..1 scale, [3, 3, side, side]."""
    coarse = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


def normalised(pixels: Tensor, of: Teacher) -> Tensor:
    mean, std = (torch.tensor(own)[:, None, None] for own in (of._config.data.mean, of._config.data.std))
    return (pixels - mean) / std


def most_changed(of: Teacher, side: int, row: int, column: int) -> tuple[int, int]:
    """The patch whose feature changes most when the student's patch of that place turns black."""
    pixels = crops(side)
    before = of.features(normalised(pixels, of))
    pixels[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
    changed = (of.features(normalised(pixels, of)) - before).norm(dim=-1).mean(0)
    return divmod(int(changed.argmax()), side // 8)


@pytest.mark.parametrize(("kind", "patch"), PATCHES.items())
def test_a_teacher_gives_a_feature_for_each_patch_of_the_student_at_its_place(
    kind: str, patch: int, tmp_path: Path
) -> None:
    found = teacher(toy_vision(kind, tmp_path, patch=patch))
    assert found._sides == {4: 4 * patch, 6: 6 * patch}
    for side in (32, 48):
        assert found.features(normalised(crops(side), found)).shape == (3, (side // 8) ** 2, found.width)
        for place in ((0, 1), (3, 2)):
            assert most_changed(found, side, *place) == place


def test_a_teacher_normalises_by_itself_and_sees_a_few_images_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = teacher(toy_vision("Dinov2", tmp_path))
    other = teacher(tmp_path, data__mean=(0.1, 0.2, 0.3), data__std=(0.5, 0.6, 0.7))
    expected = usual.features(normalised(crops(32), usual))
    torch.testing.assert_close(other.features(normalised(crops(32), other)), expected, atol=1e-5, rtol=1e-5)
    model = usual._model
    with torch.no_grad():
        alone = model((crops(32) - 0.4) / 0.3).last_hidden_state[:, 1:]
    torch.testing.assert_close(expected, alone, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(losses, "TAUGHT", 2)
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, given: counts.append(len(given["pixel_values"])), with_kwargs=True
    )
    assert torch.allclose(usual.features(normalised(crops(32), usual)), expected, atol=1e-5)
    assert counts == [2, 1]


def test_features_of_a_teacher_that_sees_one_size_alone_are_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "INTERPOLATE", "no such thing")
    found = teacher(toy_vision("CLIPVision", tmp_path))
    assert found._sides == {4: 32, 6: 32}
    assert most_changed(found, 48, 0, 5) == (0, 5)
    assert most_changed(found, 48, 5, 0) == (5, 0)
    assert found.features(normalised(crops(48), found)).shape == (3, 36, 32)


def test_what_cannot_teach_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^distill\.teacher: .*cannot be loaded \("):
        teacher(tmp_path)
    from transformers import CLIPImageProcessor, SwinConfig, SwinModel

    swin = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    )
    SwinModel(swin).save_pretrained(tmp_path / "swin")
    CLIPImageProcessor().save_pretrained(tmp_path / "swin")
    with pytest.raises(UserError, match=r"swin gives no features of each patch of an image of 16 or 32 px"):
        teacher(tmp_path / "swin")
    weights = toy_vision("Dinov2", tmp_path / "dino") / "model.safetensors"
    kept = load_file(weights)
    name = next(iter(kept))
    del kept[name]
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(UserError, match=rf"^distill\.teacher: .*dino lacks 1 weights, {name} first"):
        teacher(tmp_path / "dino")
