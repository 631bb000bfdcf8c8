"""Image and regions are transformed together, and each region sees its own patches."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from megaregion.config import DataConfig, ModelConfig, StageConfig
from megaregion.curation.picture import read_picture
from megaregion.data.batch import OBJECT, TEXT, Findings, collate, normalise
from megaregion.data.image import (
    Crop,
    decode_crop,
    decode_image,
    eighths_needed,
    fitting_grid,
    open_image,
    random_crop,
)
from megaregion.data.sample import BadSample, RegionRecord, SampleRecord, decode_mask, encode_mask, mask_area
from megaregion.data.transforms import EvalTransform, Transform, sample_regions, visibility
from megaregion.errors import UserError

MODEL = ModelConfig(image_size=64, patch_size=8)
DATA = DataConfig(regions_per_image=4, max_text_tokens=3, crop_scale=(0.3, 1.0), flip=0.5, min_visible=0.3)
RED = (255, 0, 0)


def scene(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A grey image with one red rectangle."""
    image = Image.new("RGB", (width, height), (90, 90, 90))
    image.paste(RED, box)
    return image


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, quality=95)
    return stream.getvalue()


def objects(width: int, height: int, *boxes: tuple[float, float, float, float]) -> SampleRecord:
    return SampleRecord(width, height, tuple(RegionRecord("object", box, n) for n, box in enumerate(boxes)))


def red_share(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Share of red pixels in each patch, [rows, columns]."""
    red = (pixels[..., 0] > 170) & (pixels[..., 1] < 50)
    rows, columns = red.shape[0] // patch, red.shape[1] // patch
    return red.reshape(rows, patch, columns, patch).mean(axis=(1, 3))


@pytest.mark.parametrize("jpeg", [False, True])
@pytest.mark.parametrize("size", [(200, 140), (640, 900)])
def test_boxes_follow_crop_and_mirror(size: tuple[int, int], jpeg: bool) -> None:
    width, height = size
    box = (width // 5, height // 3, width // 2, height * 3 // 4)
    record = objects(width, height, box)
    transform = Transform(DATA, MODEL, seed=1)
    seen = 0
    for position in range(40):
        image = scene(width, height, box)
        sample = transform(open_image(encode(image)) if jpeg else image, record, position)
        if sample is None:
            continue
        seen += 1
        share = red_share(sample.pixels, MODEL.patch_size)
        visible = sample.visible[0].reshape(MODEL.grid, MODEL.grid)
        # Colours bleed over an edge by about a pixel, an eighth of a patch.
        assert visible[share > 0.7].all()
        assert not visible[share < 0.3].any() or share.max() < 0.7
    assert seen > 20


def test_a_mask_follows_crop_and_mirror_as_its_box_does() -> None:
    box = (40, 46, 100, 105)
    mask = np.zeros((140, 200), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    plain = objects(200, 140, box)
    masked = SampleRecord(200, 140, (plain.regions[0]._replace(mask=encode_mask(mask)),))
    for position in range(30):
        transform = Transform(DATA, MODEL, seed=1)
        by_box = transform(scene(200, 140, box), plain, position)
        by_mask = transform(scene(200, 140, box), masked, position)
        assert (by_box is None) == (by_mask is None)
        if by_box is not None and by_mask is not None:
            assert np.array_equal(by_box.visible, by_mask.visible)


def test_the_same_seed_and_position_give_the_same_bits() -> None:
    record = objects(200, 140, (10, 10, 150, 100), (50, 50, 190, 130))
    image = noise(200, 140)
    data = dataclasses.replace(DATA, color_jitter=0.4)
    first, again = (Transform(data, MODEL, 5)(image, record, 10**12) for _ in range(2))
    other = Transform(data, MODEL, 6)(image, record, 10**12)
    assert first is not None
    assert again is not None
    assert other is not None
    for name in ("pixels", "visible", "kinds", "labels"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.pixels, other.pixels)


def test_an_image_with_text_is_never_mirrored() -> None:
    data = dataclasses.replace(DATA, flip=1.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    box = (0, 0, 20, 64)
    record = objects(64, 64, (0, 0, 64, 64))
    word = RegionRecord("text", (0, 0, 64, 64), None, (1,), text="EXIT")
    with_text = SampleRecord(64, 64, (*record.regions, word))
    for position in range(20):
        mirrored = Transform(data, MODEL, 0)(scene(64, 64, box), record, position)
        upright = Transform(data, MODEL, 0)(scene(64, 64, box), with_text, position)
        assert mirrored is not None
        assert upright is not None
        assert red_share(mirrored.pixels, 8)[:, -1].all()
        assert red_share(upright.pixels, 8)[:, 0].all()


def test_text_outside_the_crop_also_keeps_an_image_upright() -> None:
    data = dataclasses.replace(DATA, flip=1.0, crop_scale=(0.2, 0.2))
    word = RegionRecord("text", (0, 0, 2, 2), None, (1,), text="EXIT")
    record = SampleRecord(64, 64, (*objects(64, 64, (0, 0, 64, 64)).regions, word))
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).convert("RGB")
    sample = Transform(dataclasses.replace(data, min_visible=0.1), MODEL, 0)(ramp, record, 3)
    assert sample is not None
    assert (np.diff(sample.pixels[32, :, 0].astype(int)) >= 0).all()


def test_regions_stay_only_if_enough_of_them_lies_in_the_crop() -> None:
    data = dataclasses.replace(DATA, crop_scale=(0.3, 0.3), crop_ratio=(1.0, 1.0), flip=0.0, min_visible=0.5)
    boxes = [(x, y, x + 12, y + 12) for x in range(0, 120, 9) for y in range(0, 120, 9)]
    model, record = MODEL, objects(132, 132, *boxes)
    everything = dataclasses.replace(data, regions_per_image=len(boxes))
    sample = Transform(everything, model, 0)(Image.new("RGB", (132, 132)), record, 0)
    assert sample is not None
    side = round((132 * 132 * 0.3) ** 0.5)
    kept = sorted(set(sample.labels[:, 0].tolist()))
    corners = [(x, y) for x in range(132 - side + 1) for y in range(132 - side + 1)]

    def inside(crop: tuple[int, int]) -> list[int]:
        low = np.maximum(np.array(boxes)[:, :2], crop)
        high = np.minimum(np.array(boxes)[:, 2:], np.array(crop) + side)
        return np.flatnonzero(np.maximum(high - low, 0).prod(axis=1) >= 0.5 * 144).tolist()

    assert any(inside(crop) == kept for crop in corners)
    assert 0 < len(kept) < len(boxes)


def test_an_image_without_a_region_in_the_crop_gives_none() -> None:
    data = dataclasses.replace(DATA, crop_scale=(0.01, 0.01), min_visible=0.9)
    assert (
        Transform(data, MODEL, 0)(Image.new("RGB", (100, 100)), objects(100, 100, (0, 0, 99, 99)), 0) is None
    )
    assert Transform(data, MODEL, 0)(Image.new("RGB", (100, 100)), objects(100, 100), 0) is None


def test_labels_are_one_cluster_or_the_first_distinct_tokens() -> None:
    data = dataclasses.replace(DATA, regions_per_image=2, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    regions = (
        RegionRecord("object", (0, 0, 64, 64), 17),
        RegionRecord("text", (0, 0, 64, 64), None, (9, 4, 9, 4, 2, 8), text="EXIT"),
    )
    sample = Transform(data, MODEL, 0)(Image.new("RGB", (64, 64)), SampleRecord(64, 64, regions), 0)
    assert sample is not None
    assert sample.kinds.tolist() == [OBJECT, TEXT]
    assert sample.labels.tolist() == [[17, -1, -1], [9, 4, 2]]


def test_of_an_object_with_several_clusters_the_nearest_are_kept_or_others_each_time() -> None:
    whole = dataclasses.replace(DATA, regions_per_image=2, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    near = RegionRecord("object", (0, 0, 64, 64), 17, others=(3, 40, 5, 8))
    record = SampleRecord(64, 64, (near, RegionRecord("object", (0, 0, 64, 64), 2)))

    def labels(position: int, **changes: object) -> list[list[int]]:
        data = dataclasses.replace(whole, **changes)
        sample = Transform(data, MODEL, 1).frame(record, position)
        assert sample is not None
        return [[label for label in row if label >= 0] for row in sample.labels.tolist()]

    assert labels(0) == [[17], [2]]
    assert labels(0, max_object_labels=4) == [[17, 3, 40, 5], [2]], "more than slots of a text"
    one = [labels(position, object_labels="drawn")[0] for position in range(200)]
    assert {label for row in one for label in row} == {17, 3, 40, 5, 8}
    assert all(len(row) == 1 for row in one)
    three = [labels(p, object_labels="drawn", max_object_labels=3) for p in range(40)]
    assert all(len(set(first)) == 3 and second == [2] for first, second in three)
    assert three == [labels(p, object_labels="drawn", max_object_labels=3) for p in range(40)]
    crops = [
        Transform(dataclasses.replace(DATA, object_labels=how), MODEL, 1).frame(record, 5).crop
        for how in ("nearest", "drawn")
    ]
    assert crops[0] == crops[1], "the augmentation stays what it is"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32))
def test_every_image_gives_exactly_n_regions(kept: int, n: int, seed: int) -> None:
    chosen = sample_regions(kept, n, np.random.default_rng(seed)).tolist()
    assert len(chosen) == n
    assert set(chosen) <= set(range(kept))
    assert len(set(chosen)) == min(kept, n)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32))
def test_a_crop_lies_inside_its_image(width: int, height: int, seed: int) -> None:
    crop = random_crop(np.random.default_rng(seed), width, height, (0.05, 1.0), (0.75, 4 / 3))
    assert 0 <= crop.x0 < crop.x1 <= width
    assert 0 <= crop.y0 < crop.y1 <= height


WHOLE = Crop(0, 0, 32, 24)


@pytest.mark.parametrize(
    ("box", "coverage", "patches"),
    [
        ((0, 0, 32, 24), 0.5, set(range(12))),
        ((8, 8, 16, 16), 0.5, {5}),
        ((8, 8, 20, 16), 0.5, {5, 6}),
        ((8, 8, 19.9, 16), 0.5, {5}),
        ((8, 8, 19.9, 16), 0.0, {5, 6}),
        ((8, 8, 19.9, 16), 1.0, {5}),
        ((4, 4, 12, 12), 0.25, {0, 1, 4, 5}),
        ((-50, -50, 8, 8), 0.5, {0}),
    ],
)
def test_a_patch_is_visible_if_the_box_covers_enough_of_it(box, coverage: float, patches: set[int]) -> None:
    visible = visibility(np.array([box], dtype=float), [None], WHOLE, 3, 4, coverage)
    assert set(np.flatnonzero(visible[0]).tolist()) == patches


@pytest.mark.parametrize(
    ("box", "patch"),
    [
        ((1, 1, 2, 2), 0),
        ((7, 9, 10, 10), 5),
        ((31, 23, 32, 24), 11),
        ((40, 23, 41, 24), 11),
        ((8, 0, 8, 0), 1),
    ],
)
def test_a_region_that_sees_no_patch_sees_the_nearest_to_its_center(box, patch: int) -> None:
    visible = visibility(np.array([box], dtype=float), [None], WHOLE, 3, 4, 0.5)
    assert np.flatnonzero(visible[0]).tolist() == [patch]


def test_a_mirrored_view_mirrors_visibility_also_of_the_nearest_patch() -> None:
    boxes = np.array([(0, 0, 16, 8), (1, 9, 2, 10), (18, 3, 32, 21)], dtype=float)
    masks = [None, None, encode_mask(np.tril(np.ones((24, 32), dtype=bool)))]
    plain, mirrored = (
        visibility(boxes, masks, Crop(0, 0, 32, 24, flipped), 3, 4, 0.5).reshape(3, 3, 4)
        for flipped in (False, True)
    )
    assert np.array_equal(plain[:, :, ::-1], mirrored)


def test_a_mask_decides_where_its_box_would_see_more() -> None:
    mask = np.zeros((24, 32), dtype=bool)
    mask[:, :9] = True
    box = np.array([(0, 0, 32, 24)], dtype=float)
    visible = visibility(box, [encode_mask(mask)], WHOLE, 3, 4, 0.5)
    assert set(np.flatnonzero(visible[0]).tolist()) == {0, 4, 8}


def test_a_thin_mask_sees_the_patch_nearest_to_its_own_center() -> None:
    mask = np.zeros((24, 32), dtype=bool)
    mask[20:24, 30] = True
    box = np.array([(0, 0, 32, 24)], dtype=float)
    visible = visibility(box, [encode_mask(mask)], WHOLE, 3, 4, 0.5)
    assert np.flatnonzero(visible[0]).tolist() == [11]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_mask_area_is_exact_at_any_fraction_of_a_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((11, 13)) < rng.random()
    x_edges, y_edges = np.sort(rng.integers(0, 53, 5)) / 4, np.sort(rng.integers(0, 45, 4)) / 4
    fine = np.kron(decode_mask(encode_mask(mask)), np.ones((4, 4)))
    expected = [
        [fine[int(4 * y0) : int(4 * y1), int(4 * x0) : int(4 * x1)].sum() / 16 for x0, x1 in pairs(x_edges)]
        for y0, y1 in pairs(y_edges)
    ]
    np.testing.assert_allclose(mask_area(encode_mask(mask), x_edges, y_edges), expected, atol=1e-9)


def pairs(edges: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


@functools.cache
def photo(width: int, height: int) -> Image.Image:
    """Noise with the spectrum of a photo: twice the frequency has less than half the amplitude."""
    rng = np.random.default_rng(0)
    rates = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitudes = np.maximum(rates, 1 / width) ** -1.3
    planes = [
        np.fft.irfft2(amplitudes * np.exp(2j * np.pi * rng.random(amplitudes.shape)), (height, width))
        for _ in range(3)
    ]
    pixels = np.stack([128 + 50 * plane / plane.std() for plane in planes], axis=-1)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.mark.parametrize(("width", "eighths"), [(240, 8), (330, 8), (360, 5), (448, 4), (900, 2), (1500, 2)])
def test_decoding_a_photo_near_the_wanted_size_gives_the_same_picture(width: int, eighths: int) -> None:
    content = encode(photo(1603, 1011))
    crop = Crop(56, 24, 56 + width, 24 + min(width, 960)).on_blocks(1603, 1011)
    assert eighths_needed(crop, 224, 224) == eighths
    fast = decode_crop(open_image(content), crop, 224, 224, shrink=True).astype(float)
    exact = decode_crop(open_image(content), crop, 224, 224).astype(float)
    assert np.abs(fast - exact).mean() < 3, "mean difference on the scale of 0..255"
    assert np.corrcoef(fast.ravel(), exact.ravel())[0, 1] > 0.995


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_edge_stays_where_it_is_however_small_the_photo_is_decoded(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(260, 1100)), data.draw(st.integers(260, 1100))
    edge = data.draw(st.integers(width // 3, width // 2))
    image = Image.new("RGB", (width, height), (250, 250, 250))
    image.paste((5, 5, 5), (0, 0, edge, height))
    crop = random_crop(
        np.random.default_rng(data.draw(st.integers(0, 99))), width, height, (0.7, 1), (0.7, 1.4)
    )
    crop = crop.on_blocks(width, height) if data.draw(st.booleans()) else crop
    crop = dataclasses.replace(crop, flipped=data.draw(st.booleans()))
    expected = (edge - crop.x0) / (crop.x1 - crop.x0) * 64
    # A narrow crop may leave the edge out.
    assume(1 < expected < 63)
    pixels = decode_crop(open_image(encode(image)), crop, 64, 64, shrink=True)[..., 0].astype(float)
    found = ((250 - pixels) / 245).sum(axis=1)
    assert np.abs(found - expected).max() < 0.25, "a quarter of a pixel of the result"
    assert (pixels[:, 0] > pixels[:, -1]).all() == crop.flipped


def test_the_borders_of_a_view_move_to_blocks_inside_the_image() -> None:
    crop = Crop(3, 5, 431, 300, True).on_blocks(431, 303)
    assert crop == Crop(0, 8, 424, 296, True)


def test_a_jpeg_that_the_strict_decoder_refuses_but_pillow_reads_is_read() -> None:
    content = encode(noise(64, 64))
    stray = content[:-2] + b"\x00\x13\x77" + content[-2:]
    assert np.array_equal(
        decode_crop(open_image(stray), Crop(0, 0, 64, 64), 64, 64, shrink=True),
        decode_crop(open_image(content), Crop(0, 0, 64, 64), 64, 64),
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_any_colour_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (20, 10), RED).convert("L" if mode == "I;16" else mode)
    content = encode(image.convert(mode), "JPEG" if mode in ("L", "CMYK") else "PNG")
    assert decode_crop(open_image(content), Crop(0, 0, 20, 10), 8, 8).shape == (8, 8, 3)


def test_sixteen_bit_grey_keeps_its_light_and_shade_in_training_and_in_curation() -> None:
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    content = encode(Image.fromarray(ramp), "PNG")
    assert Image.open(io.BytesIO(content)).mode == "I;16"
    expected = np.repeat((ramp // 256).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(np.asarray(decode_image(content)), expected)
    assert np.array_equal(read_picture(content, 10**6).pixels, expected)


def test_the_evaluation_transform_shows_the_whole_image_at_any_size() -> None:
    image = scene(100, 50, (0, 0, 50, 50))
    pixels, visible = EvalTransform(DATA, MODEL, (32, 48))(image, [(0, 0, 50, 50), (50, 0, 100, 25)])
    assert pixels.shape == (3, 32, 48)
    assert pixels.dtype == torch.float32
    assert visible.shape == (2, 4 * 6)
    assert visible[0].reshape(4, 6).all(dim=0).tolist() == [True] * 3 + [False] * 3
    assert visible[1].reshape(4, 6)[:2, 3:].all()
    assert visible.sum() == 12 + 6
    red = torch.tensor([(c / 255 - m) / s for c, m, s in zip(RED, DATA.mean, DATA.std, strict=True)])
    torch.testing.assert_close(pixels[:, 16, 4], red)
    assert image.size == (100, 50)


def test_the_evaluation_transform_takes_images_without_regions_and_leaves_them_whole() -> None:
    image = open_image(encode(scene(1000, 800, (0, 0, 9, 9))))
    _, visible = EvalTransform(DATA, MODEL)(image, [])
    assert visible.shape == (0, 64)
    assert image.size == (1000, 800)


def test_the_evaluation_size_must_be_a_multiple_of_the_patch() -> None:
    with pytest.raises(UserError, match=r"multiple of model\.patch_size 8, got 30 x 32"):
        EvalTransform(DATA, MODEL, (30, 32))


def test_pixels_are_normalised_per_channel() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    mean, std = torch.tensor(DATA.mean).view(3, 1, 1), torch.tensor(DATA.std).view(3, 1, 1)
    expected = (pixels.double() / 255 - mean) / std
    torch.testing.assert_close(normalise(pixels, DATA.mean, DATA.std), expected.float())


def test_a_batch_moves_as_a_whole_and_normalises_where_it_is() -> None:
    record = objects(64, 64, (0, 0, 40, 40))
    samples = [Transform(DATA, MODEL, 0)(scene(64, 64, (0, 0, 9, 9)), record, p, f"k{p}") for p in (7, 8, 9)]
    usable = [s for s in samples if s is not None]
    batch = collate(usable, len(usable), DATA, Findings())
    moved = batch.to("meta")
    assert moved.images.device.type == "meta"
    assert {t.device.type for t in (moved.positions, moved.visible, moved.kinds, moved.labels)} == {"meta"}
    assert batch.images.shape == (len(batch.keys), 3, 64, 64)
    assert batch.images.is_contiguous()
    assert (batch.visible.dtype, batch.kinds.dtype, batch.labels.dtype) == (
        torch.bool,
        torch.int8,
        torch.int64,
    )
    assert batch.found.bad == 0


def bomb() -> bytes:
    """A PNG of 58 bytes that claims 30,000 x 30,000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def slightly_too_large() -> bytes:
    return encode(Image.new("L", (9_500, 9_500)), "PNG")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff", b"GIF89a" + bytes(50), bomb()])
def test_what_is_no_image_or_a_bomb_is_a_bad_sample(content: bytes) -> None:
    with pytest.raises(BadSample, match="image cannot be opened"):
        open_image(content)


def test_an_image_just_above_the_limit_is_a_bad_sample_too() -> None:
    # Pillow only warns up to twice its limit.
    with pytest.raises(BadSample, match="DecompressionBombWarning"):
        open_image(slightly_too_large())


def test_a_truncated_image_is_a_bad_sample() -> None:
    content = encode(noise(64, 64))
    image = open_image(content[: len(content) // 2])
    with pytest.raises(BadSample, match="image cannot be decoded"):
        Transform(DATA, MODEL, 0)(image, objects(64, 64, (0, 0, 64, 64)), 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_image_is_a_bad_sample_or_an_image_and_nothing_else(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    content = bytearray(encode(scene(24, 24, (3, 3, 9, 9)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(content))
        if image.width * image.height < 10**6:
            decode_crop(image, Crop(0, 0, image.width, image.height), 8, 8, shrink=True)
    except BadSample:
        pass


def test_a_record_of_another_image_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="image has 64 x 32 pixels, its record says 64 x 64"):
        Transform(DATA, MODEL, 0)(Image.new("RGB", (64, 32)), objects(64, 64, (0, 0, 9, 9)), 0)


@pytest.mark.parametrize("most", [49, 196, 256, 576])
def test_a_native_grid_keeps_the_shape_and_leaves_few_patches_unused(most: int) -> None:
    used = []
    for step in range(-30, 31):
        shape = 3 ** (step / 30)
        rows, columns = fitting_grid(Crop(0, 0, 500 / shape, 500), most)
        assert rows * columns <= most
        assert abs(math.log(rows / columns / shape)) < 0.35
        used.append(rows * columns / most)
    assert sum(used) / len(used) > 0.9


def test_native_samples_of_any_shape_share_one_sequence() -> None:
    transform = Transform(DataConfig(packing="native", regions_per_image=2, flip=0.0), MODEL, 0)
    samples = []
    for position, (width, height) in enumerate([(90, 30), (40, 80), (60, 60)]):
        box = (0.0, 0.0, width / 2, float(height))
        record = SampleRecord(width, height, (RegionRecord(kind="object", box=box, label=1),))
        samples.append(transform(Image.new("RGB", (width, height), (9, 99, 199)), record, position))
    batch = collate(samples, len(samples), transform.data, Findings())
    counts = [rows * columns for rows, columns in batch.grids]
    assert max(counts) <= MODEL.grid**2
    assert batch.images.shape == (sum(counts), 3, 8, 8)
    assert batch.visible.shape == (2, sum(counts))
    assert batch.grids[0][1] > 1.8 * batch.grids[0][0]
    assert batch.grids[1][0] > 1.3 * batch.grids[1][1]
    # The first patch of the second image follows the last of the first.
    first = samples[1].pixels[:8, :8].transpose(2, 0, 1)
    assert (batch.pixels[counts[0]].numpy() == first).all()


def test_the_size_of_a_crop_follows_its_position() -> None:
    stages = (StageConfig(96, 10), StageConfig(32, 20))
    transform = Transform(DataConfig(regions_per_image=1), MODEL, 0, stages)
    record = SampleRecord(99, 99, (RegionRecord(kind="object", box=(0.0, 0.0, 99.0, 99.0), label=1),))
    sides = {p: transform(Image.new("RGB", (99, 99)), record, p).pixels.shape[0] for p in (0, 9, 10, 19, 20)}
    assert sides == {0: 64, 9: 64, 10: 96, 19: 96, 20: 32}
