from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_scenes import MODEL, write_run, write_scenes, write_shards

from megaregion.config import ModelConfig
from megaregion.data.info import read_info
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError
from megaregion.evaluation.clusters import confuse, like_order
from megaregion.evaluation.encoders import BoxedImage, Features
from megaregion.evaluation.network import NetworkEncoder, TrainedRun, fitting_size, open_run, region_attention
from megaregion.evaluation.pictures import Frame, high_map, overlay, paint, read_frames
from megaregion.evaluation.scenes import open_vocabulary
from megaregion.models import RegionEncoder, initialise


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    return write_shards(root / "shards", write_scenes(root / "scenes"))


@pytest.fixture(scope="module")
def run(dataset: Path) -> TrainedRun:
    write_run(dataset.parent / "run", dataset, read_info(dataset).text_classes)
    return open_run(dataset.parent / "run")


@pytest.fixture(scope="module")
def encoder(run: TrainedRun) -> NetworkEncoder:
    return run.trained()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---- maps ------------------------------------------------------------------------------------------


def test_a_map_holds_what_enters_the_last_block(encoder: NetworkEncoder) -> None:
    pixels, _ = encoder.prepare(noise(60, 60), [], 48)
    vit = encoder.model.vit
    shallow = RegionEncoder(dataclasses.replace(MODEL, depth=1), 16)
    shallow.load_state_dict(encoder.model.state_dict(), strict=False)
    with torch.inference_mode():
        expected = vit.post_norm(shallow.vit(pixels).image[:, 1:]).unflatten(1, (6, 6))
    assert np.allclose(encoder.maps([noise(60, 60)])[0], expected[0].numpy(), atol=1e-5)


def test_a_frame_keeps_its_shape_at_any_resolution(encoder: NetworkEncoder) -> None:
    assert fitting_size((640, 360), 320, 16) == (176, 320)
    assert fitting_size((10, 2000), 160, 8) == (160, 8)
    assert high_map(encoder, noise(80, 40), 96).shape == (6, 12, MODEL.width)


def test_frames_share_one_basis_and_the_map_of_a_frame_does_not_depend_on_its_order(
    encoder: NetworkEncoder,
) -> None:
    frames = [Frame(f"f{i}", noise(48, 48, i)) for i in range(3)]
    there = paint(encoder, frames, 96)
    back = paint(encoder, frames[::-1], 96)
    assert there.cells == (12, 12)
    for a, b in zip(there.maps, back.maps[::-1], strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2


def test_frames_are_an_image_or_a_folder_and_nothing_else(tmp_path: Path) -> None:
    for number in (2, 1, 10):
        noise(8, 8).save(tmp_path / f"frame-{number:03d}.png")
    assert [frame.name for frame in read_frames(tmp_path)] == ["frame-001", "frame-002", "frame-010"]
    assert len(read_frames(tmp_path / "frame-001.png")) == 1
    with pytest.raises(UserError, match=r"holds no image"):
        read_frames(tmp_path / "absent")
    (tmp_path / "frame-003.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"frame-003.jpg cannot be read"):
        read_frames(tmp_path)


# ---- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["shared", "separate"])
def test_attention_is_what_the_block_computes_and_stays_inside_the_region(weights: str) -> None:
    config: ModelConfig = dataclasses.replace(MODEL, region_weights=weights)
    model = RegionEncoder(config, 16)
    initialise(model, 3)
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    visible = torch.zeros(1, 2, 36, dtype=torch.bool)
    visible[0, 0, :9] = True
    visible[0, 1] = True
    looks = region_attention(model, pixels, visible)
    assert looks.inside.shape == (2, 6, 6)
    assert np.allclose(looks.inside.sum((1, 2)), 1, atol=1e-5)
    assert looks.inside[0].ravel()[9:].max() == 0
    # A region that sees every patch differs from the free query only by the class token's weight.
    free = looks.anywhere[1] / looks.anywhere[1].sum()
    assert np.allclose(looks.inside[1], free, atol=0.02)
    # What the block itself reads of values that name their patch is this attention.
    last = model.vit.blocks[-1]
    block = last if weights == "shared" else last.region
    caught = {}
    mix = block.attention.mix

    def watch(query, key, value, mask=None, packing=None):  # type: ignore[no-untyped-def]
        if mask is not None:
            scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5 + mask
            caught["weights"] = scores.softmax(-1).mean(1)[0, :, 1:]
        return mix(query, key, value, mask, packing)

    block.attention.mix = watch
    with torch.inference_mode():
        model.vit(pixels, visible)
    assert np.allclose(caught["weights"].reshape(2, 6, 6).numpy(), looks.inside, atol=1e-6)


def test_an_overlay_is_warm_where_attention_is_and_grey_where_it_is_not() -> None:
    weights = np.zeros((4, 4), np.float32)
    weights[0, 0] = 1
    pixels = np.asarray(overlay(noise(40, 40), weights, np.array([0, 0, 39, 39], np.float32)), int)
    assert pixels[40, 40, 0] - pixels[40, 40, 2] > 60
    assert np.ptp(pixels[300, 300]) <= 2


# ---- clusters --------------------------------------------------------------------------------------


class ByLabel:
    """Says of every region what its sample's record says, but calls cluster 2 cluster 0."""

    name = "oracle"

    def __init__(self, shards: ShardedDataset) -> None:
        self._labels = {}
        for index in range(len(shards)):
            from megaregion.data.sample import parse_sample

            for region in parse_sample(shards.read(index).record).regions:
                if region.label is not None:
                    self._labels[index, tuple(region.box)] = region.label
        self.order: list[int] = []

    def encode(self, items: list[BoxedImage]) -> Features:
        boxes = [tuple(float(edge) for edge in box) for item in items for box in item.boxes]
        by_box = {box: label for (_, box), label in self._labels.items()}
        named = np.asarray([by_box[box] % 2 for box in boxes])
        return Features(np.eye(3, dtype=np.float32)[named], np.eye(3, dtype=np.float32)[named])


def test_a_cluster_that_is_named_after_another_shows_as_a_confused_pair(dataset: Path) -> None:
    shards = ShardedDataset(dataset)
    oracle = ByLabel(shards)
    found = confuse(shards, oracle, np.eye(3, dtype=np.float32), seed=0)  # type: ignore[arg-type]
    assert found is not None
    assert found.top1 is not None
    labels = [region.label for _, region in found.regions]
    assert found.top1.mean == pytest.approx(np.mean([label != 2 for label in labels]), abs=0.1)
    assert (2, 0) in {pair[:2] for pair in found.pairs}
    two, zero = found.shown.index(2), found.shown.index(0)
    assert found.matrix[two, two] == 0
    assert found.matrix[two, zero] > 0.8
    assert found.matrix.sum(axis=1) == pytest.approx(1)


def test_a_sample_that_cannot_be_read_is_counted_by_the_confusion_and_by_the_prior(
    dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(dataset, tmp_path / "shards")
    for file in (tmp_path / "shards").glob("*.tar"):
        # As long as before, so that the index still fits.
        file.write_bytes(file.read_bytes().replace(b'"kind":"text"', b'"kind":"test"', 1))
    whole, damaged = ShardedDataset(dataset), ShardedDataset(tmp_path / "shards")
    centers = np.eye(3, dtype=np.float32)
    all_regions, fewer = (confuse(s, ByLabel(whole), centers, seed=0) for s in (whole, damaged))  # type: ignore[arg-type]
    assert all_regions is not None
    assert fewer is not None
    assert (all_regions.unreadable, fewer.unreadable) == (0, 1)
    assert len(fewer.regions) == len(all_regions.regions) - 2
    vocabulary = open_vocabulary(damaged)
    assert vocabulary is not None
    assert vocabulary.unreadable == 1
    assert open_vocabulary(whole).unreadable == 0  # type: ignore[union-attr]


def test_like_clusters_lie_beside_each_other() -> None:
    angles = np.array([0.0, 1.5, 0.1, 1.4])
    centers = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    order = like_order([0, 1, 2, 3], centers)
    assert {*order[:2]} in ({0, 2}, {1, 3})
