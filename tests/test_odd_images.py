"""Images of every kind that people have: curation and training see the same, right pixels."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from curation_scenes import run
from PIL import Image, ImageChops, ImageCms

from megaregion.curation.picture import BadImage, read_picture
from megaregion.data.image import Jpeg, decode_image, open_image
from megaregion.data.sample import BadSample

SIDE = 96
"""Above the least edge of an image that curation takes."""
RAMP = np.linspace(0, 1, SIDE)[None].repeat(SIDE, 0)
"""From black on the left to white on the right."""
COLORS = np.stack([RAMP, RAMP.T, RAMP[:, ::-1]], axis=2)


def of(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_opencv(values: np.ndarray, ending: str) -> bytes:
    """As OpenCV writes it, whose channels are blue, green, red."""
    done, content = cv2.imencode(
        ending, values if values.ndim == 2 else np.ascontiguousarray(values[..., ::-1])
    )
    assert done
    return bytes(content)


def eight_bits(values: np.ndarray) -> np.ndarray:
    return np.round(values * 255).astype(np.uint8)


def sixteen_bits(values: np.ndarray) -> np.ndarray:
    return np.round(values * 65535).astype(np.uint16)


def wide_gamut() -> bytes:
    """The color profile sRGB with the primaries of Display P3, relative to its white of D50."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }  # fmt: skip
    for row in range(struct.unpack_from(">I", content, 128)[0]):
        name, offset, _ = struct.unpack_from(">4sII", content, 132 + 12 * row)
        if name in primaries:
            struct.pack_into(">3i", content, offset + 8, *(round(65536 * value) for value in primaries[name]))
    return bytes(content)


def plain_ink(image: Image.Image) -> bytes:
    """A CMYK JPEG of other programs than Adobe's: ink as it is, and no mark."""
    content = of(ImageChops.invert(image.convert("CMYK")), "JPEG", quality=98, subsampling=0)
    start = content.index(b"\xff\xee")
    return content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4]) :]


GREY = Image.fromarray(eight_bits(RAMP))
PHOTO = Image.fromarray(eight_bits(COLORS))
SHOWN = {"grey": np.stack([eight_bits(RAMP)] * 3, axis=2), "color": eight_bits(COLORS)}
STEPS = PHOTO.quantize(64, dither=Image.Dither.NONE)
KINDS = {
    "grey.png": (of(GREY, "PNG"), "grey", 0),
    "grey16.png": (of(Image.fromarray(sixteen_bits(RAMP)), "PNG"), "grey", 0.5),
    "grey16.tif": (of(Image.fromarray(sixteen_bits(RAMP)), "TIFF"), "grey", 0.5),
    "grey32.tif": (of(Image.fromarray(sixteen_bits(RAMP).astype(np.int32) * 9000), "TIFF"), "grey", 1),
    "grey16.jp2": (of(Image.fromarray(sixteen_bits(RAMP)), "JPEG2000"), "grey", 0.5),
    "color16.png": (by_opencv(sixteen_bits(COLORS), ".png"), "color", 0.5),
    "color16.tif": (by_opencv(sixteen_bits(COLORS), ".tiff"), "color", 0.5),
    "float.tif": (of(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "grey", 0),
    "float255.tif": (of(Image.fromarray(255 * RAMP.astype(np.float32)), "TIFF"), "grey", 1),
    "colorfloat.tif": (by_opencv(COLORS.astype(np.float32), ".tiff"), "color", 0),
    "color.tif": (of(PHOTO, "TIFF"), "color", 0),
    "color.bmp": (of(PHOTO, "BMP"), "color", 0),
    "color.jp2": (of(PHOTO, "JPEG2000"), "color", 0),
    "color.gif": (of(PHOTO, "GIF"), "color", 12),
    "color.webp": (of(PHOTO, "WEBP", lossless=True), "color", 0),
    "color.avif": (of(PHOTO, "AVIF", quality=98, subsampling="4:4:4"), "color", 1),
    "palette.png": (of(STEPS, "PNG"), "color", 25),
    "color.jpg": (of(PHOTO, "JPEG", quality=98, subsampling=0), "color", 1),
    "adobe.jpg": (of(PHOTO.convert("CMYK"), "JPEG", quality=98, subsampling=0), "color", 1),
    "ink.jpg": (plain_ink(PHOTO), "color", 1),
    "ink.tif": (of(PHOTO.convert("CMYK"), "TIFF"), "color", 0.5),
    "lab.tif": (of(PHOTO.convert("LAB"), "TIFF"), "color", 3),
    "black-and-white.png": (of(GREY.convert("1", dither=Image.Dither.NONE), "PNG"), "grey", 64),
}
"""A file, what it shows, and by how many levels of 255 its pixels may differ from that on average."""


@pytest.mark.parametrize("name", KINDS)
def test_curation_and_training_see_what_a_file_of_any_kind_shows(name: str) -> None:
    content, shown, levels = KINDS[name]
    seen = read_picture(content, 10**6).pixels
    assert np.array_equal(np.asarray(decode_image(content)), seen)
    assert np.abs(seen.astype(int) - SHOWN[shown].astype(int)).mean() <= levels


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_lies_over_white_in_curation_and_in_training(mode: str) -> None:
    image = GREY.convert(mode)
    if mode in ("P", "RGB"):
        content = of(image, "PNG", transparency=0 if mode == "P" else (0, 0, 0))
    else:
        image.putalpha(GREY.point(lambda light: 0 if light < 4 else 255))
        content = of(image, "PNG")
    seen = read_picture(content, 10**6).pixels
    assert np.array_equal(np.asarray(decode_image(content)), seen)
    assert (seen[:, 0] == 255).all(), "black is transparent"
    assert np.array_equal(seen[:, 4:], SHOWN["grey"][:, 4:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_colors_of_a_wide_gamut_become_srgb_and_a_profile_that_says_srgb_costs_nothing(kind: str) -> None:
    options: dict[str, object] = (
        {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    )
    image = Image.new("RGB", (SIDE, SIDE), (200, 90, 60))
    wide = of(image, kind, icc_profile=wide_gamut(), **options)
    picture = read_picture(wide, 10**6)
    assert np.array_equal(np.asarray(decode_image(wide)), picture.pixels)
    # Display P3 by the matrices of its definition: linear light, to XYZ, to linear sRGB.
    light = np.where((v := np.array([200, 90, 60]) / 255) <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    linear = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0196, -0.0786, 1.0979]]) @ light
    expected = 255 * (1.055 * linear.clip(0, 1) ** (1 / 2.4) - 0.055)
    assert np.abs(picture.pixels[0, 0] - expected).max() < 4
    assert np.abs(expected - [200, 90, 60]).max() > 8, "or nothing would be tested"
    assert picture.jpeg is None
    # What is packed needs no profile any more.
    assert np.abs(np.asarray(decode_image(picture.encode())).astype(int) - picture.pixels).max() <= 3
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    usual = of(image, kind, icc_profile=same, **options)
    assert np.array_equal(
        read_picture(usual, 10**6).pixels, read_picture(of(image, kind, **options), 10**6).pixels
    )
    if kind == "JPEG":
        assert isinstance(open_image(usual), Jpeg)
        assert read_picture(usual, 10**6).jpeg == usual


def test_only_a_jpeg_that_shows_its_own_pixels_upright_is_packed_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    kept = {
        "color": of(PHOTO, "JPEG"), "grey": of(GREY, "JPEG"), "turned": of(PHOTO, "JPEG", exif=exif),
        "ink": of(PHOTO.convert("CMYK"), "JPEG"), "png": of(PHOTO, "PNG"),
    }  # fmt: skip
    pictures = {name: read_picture(content, 10**6) for name, content in kept.items()}
    assert {name for name, picture in pictures.items() if picture.jpeg == kept[name]} == {"color", "grey"}
    assert all(isinstance(open_image(picture.encode()), Jpeg) for picture in pictures.values())
    undecoded = {name: read_picture(content, 10**6, decode=False) for name, content in kept.items()}
    assert {name: picture.encode() for name, picture in undecoded.items()} == {
        name: picture.encode() for name, picture in pictures.items()
    }
    assert {name for name, picture in undecoded.items() if not picture.pixels.size} == {"color", "grey"}


def test_a_damaged_profile_and_one_of_other_channels_change_nothing() -> None:
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (b"no profile", wide_gamut()[:300], whole):
        for content in (of(PHOTO, "PNG", icc_profile=profile), of(PHOTO, "JPEG", icc_profile=profile)):
            bare = of(PHOTO, "PNG" if content[:1] == b"\x89" else "JPEG")
            assert np.array_equal(read_picture(content, 10**6).pixels, read_picture(bare, 10**6).pixels)
            assert np.array_equal(np.asarray(decode_image(content)), np.asarray(decode_image(bare)))


def test_floats_beyond_the_range_keep_light_and_shade() -> None:
    values = COLORS.astype(np.float32)
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -5
    values[1] *= 3
    for bright in (values, values[..., 0]):
        seen = read_picture(by_opencv(bright, ".tiff"), 10**6).pixels
        assert seen[0, 0].tolist() == seen[0, 2].tolist() == [0, 0, 0]
        assert seen[0, 1].tolist() == [255, 255, 255]
        assert 60 < seen[2:, :, 0].mean() < 128, "neither white nor black"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_curation_turns_images_upright_as_exif_says(kind: str, orientation: int) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :24], upright[:32, 24:] = (255, 0, 0), (0, 255, 0)
    upright[32:, :24] = (0, 0, 255)
    turned = upright.transpose(1, 0, 2)
    back = [
        upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1],
        turned, turned[::-1], turned[::-1, ::-1], turned[:, ::-1],
    ][orientation - 1]  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(back))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind != "PNG" else {}
    content = of(stored, kind, exif=exif.tobytes(), **({} if kind == "TIFF" else options))
    picture = read_picture(content, 10**6)
    assert np.abs(picture.pixels.astype(int) - upright).mean() < 8


def test_heic_is_read_and_names_its_package_where_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    content = of(PHOTO, "HEIF", quality=95)
    seen = read_picture(content, 10**6).pixels
    assert np.abs(seen.astype(int) - SHOWN["color"]).mean() < 4
    assert np.array_equal(np.asarray(decode_image(content)), seen)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read in (decode_image, lambda found: read_picture(found, 10**6)):
        with pytest.raises((BadSample, BadImage), match="HEIC needs a package; pip install pillow_heif"):
            read(content)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_of_several_frames_counts_and_is_told(kind: str) -> None:
    frames = [
        Image.new("RGB", (SIDE, SIDE), color) for color in ((250, 10, 10), (10, 250, 10), (10, 10, 250))
    ]
    content = of(frames[0], kind, save_all=True, append_images=frames[1:])
    picture = read_picture(content, 10**6)
    assert picture.several
    assert np.abs(picture.pixels.astype(int) - (250, 10, 10)).max() < 12
    assert not read_picture(of(frames[0], kind), 10**6).several


@pytest.mark.parametrize("ending", [".png", ".tiff"])
def test_a_gigantic_image_of_any_kind_is_refused_before_it_is_decoded(
    ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE // 3)
    content = by_opencv(COLORS.astype(np.float32) if ending == ".tiff" else eight_bits(COLORS), ending)
    with pytest.raises(BadImage, match="decompression bomb"):
        read_picture(content, SIDE * SIDE // 3)
    with pytest.raises(BadSample, match="DecompressionBomb"):
        open_image(content)


def test_a_curation_takes_images_of_new_endings_and_counts_those_of_several_frames(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    moving = of(PHOTO, "GIF", save_all=True, append_images=[GREY.convert("RGB")])
    for name, content in {
        "a.gif": moving,
        "b.tif": KINDS["float.tif"][0],
        "c.avif": KINDS["color.avif"][0],
    }.items():
        (tmp_path / "in" / name).write_bytes(content)
    summary = run(tmp_path / "in", tmp_path / "out", "propose")
    assert (summary.files, summary.unusable, summary.counts["images used"]) == (3, {}, 3)
    assert summary.counts["first of several frames"] == 1
    assert "several frames" in summary.table()
