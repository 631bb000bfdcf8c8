"""What becomes of every file and member is told before a curation and after it, and both say the same."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from curation_scenes import run, silent
from launch import tool
from PIL import Image
from test_curation_inputs import write_tar
from test_odd_images import GREY, KINDS, PHOTO, SIDE, of
from test_transforms import bomb

from megaregion.curation.inputs.check import Check, check_images
from megaregion.curation.inputs.find import find_images
from megaregion.curation.settings import AnnotationSettings, ImageSettings
from megaregion.data.sample import RegionRecord, SampleRecord
from megaregion.data.writer import ShardWriter
from megaregion.schemas.curation import Summary


def photo(number: int, kind: str = "JPEG", **options: object) -> bytes:
    return of(PHOTO.rotate(7 * number), kind, **options)


FRAMES = {"save_all": True, "append_images": [GREY.convert("RGB")]}
ODD = {
    # Dots and odd endings.
    "22.05.png": (photo(1, "PNG"), "image"),
    "22.06.png": (photo(2, "PNG"), "image"),
    "0.input.jpg": (photo(3), "image"),
    "b.JPE": (photo(4), "image"),
    "c.jfif": (photo(5), "image"),
    "d.avif": (photo(6, "AVIF"), "image"),
    "e.tif": (photo(7, "TIFF"), "image"),
    # The content decides.
    "f.png": (photo(8), "image"),
    "g.jpg_large": (photo(9), "image"),
    "no-ending": (photo(10, "WEBP"), "image"),
    "page.jpg": (b"<html>not found</html>", "not an image"),
    # Odd pixels.
    "deep.png": (KINDS["grey16.png"][0], "image"),
    "ink.jpg": (KINDS["ink.jpg"][0], "image"),
    "float.tif": (KINDS["colorfloat.tif"][0], "image"),
    "moves.gif": (photo(11, "GIF", **FRAMES), "first of several frames"),
    "pages.tiff": (photo(12, "TIFF", **FRAMES), "first of several frames"),
    "bomb.png": (bomb(), "decompression bomb"),
    "small.png": (of(Image.new("RGB", (9, 9)), "PNG"), "image too small"),
    "long.png": (of(Image.new("RGB", (64 * 21, 64)), "PNG"), "image too elongated"),
    "half.jpg": (photo(13)[:700], "truncated or damaged"),
    "empty.jpg": (b"", "empty file"),
    # Beside images.
    "0.json": (b'\xef\xbb\xbf{"caption": "with a byte order mark"}', "file of an image"),
    "b.txt": (b"a caption", "file of an image"),
    "e.json": (b'{"annotations": [{"bbox": [3, 3, 60, 60]}]}', "file of an image"),
    # No images.
    "._b.jpg": (b"macOS", "hidden file"),
    ".DS_Store": (b"macOS", "hidden file"),
    "Thumbs.db": (b"Windows", "other file"),
    "notes.md": (b"notes", "other file"),
    "drawing.svg": (b"<svg/>", "other format .svg"),
    "x.jpg/inside.jpg": (photo(14), "image"),
    os.fsdecode(b"caf\xe9.jpg"): (photo(15), "image"),
}  # fmt: skip
"""A file's content, and what becomes of it in a folder as in a tar."""


def kinds_of(found: Check) -> dict[str, int]:
    return {k: n for part in (found.used, found.unusable, found.left_out) for k, (n, _) in part.items()}


def told(summary: Summary) -> dict[str, int]:
    """The kinds of a check as a curation's summary tells them."""
    several = summary.counts.get("first of several frames", 0)
    used = summary.files - summary.duplicates - sum(summary.unusable.values())
    found = {"image": used - several, "first of several frames": several}
    return {kind: n for kind, n in (found | summary.unusable | summary.left_out).items() if n}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The odd files in a folder, the same in a tar, and what only one of them can hold."""
    root = tmp_path_factory.mktemp("odd")
    for name, (content, _) in ODD.items():
        path = root / "loose" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "loose" / "nothing").mkdir()
    (root / "loose" / "double.jpg").write_bytes(ODD["0.input.jpg"][0])
    (root / "loose" / "lost.jpg").symlink_to(root / "nowhere.jpg")
    (root / "loose" / "images").symlink_to(root / "loose" / "x.jpg")
    (root / "loose" / "packed.tar.gz").write_bytes(b"\x1f\x8b" + bytes(60))
    # Apart: all endings of a sample come one after the other only by chance.
    tar = write_tar(root / "tarred" / "odd.tar", [(name, content) for name, (content, _) in ODD.items()])
    with tarfile.open(tar, "a") as more:
        again = tarfile.TarInfo("f.png")
        more.addfile(again)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "f.png"
        more.addfile(link)
    return root


MORE = {
    "loose": {"duplicate": 1, "link not followed": 2, "damaged tar": 1},
    "tarred": {"duplicate": 1, "other file": 1, "tar": 1},
}


@pytest.mark.parametrize("place", MORE)
def test_check_and_summary_agree_and_add_up_and_each_odd_file_is_what_the_table_says(
    place: str, odd: Path, tmp_path: Path
) -> None:
    expected = dict(MORE[place])
    for _, kind in ODD.values():
        expected[kind] = expected.get(kind, 0) + 1
    before = sorted(odd.rglob("*"))
    found = check_images(
        odd / place, tmp_path / "out", ImageSettings(), AnnotationSettings(), silent, workers=0
    )
    assert sorted(odd.rglob("*")) == before
    assert kinds_of(found) == expected
    assert found.total == sum(expected.values()) == len(ODD) + sum(MORE[place].values())
    content = json.loads(found.to_json())
    for part in ("used", "unusable", "left_out"):
        for kind, row in content[part].items():
            assert 1 <= len(row["examples"]) <= min(3, row["count"]), kind
            for example in row["examples"]:
                name = example.removeprefix("odd.tar/")
                bare = [one for one in (name, f"{name}.png", f"{name}.jpg") if one in ODD]
                assert not bare or ODD[bare[0]][1] == kind or kind == "duplicate", example
    summary = run(odd / place, tmp_path / "out", "propose")
    assert told(summary) == expected


def test_the_command_says_the_same_with_several_processes_and_ends_with_2_where_nothing_is_usable(
    odd: Path, tmp_path: Path
) -> None:
    file = tmp_path / "check.json"
    command = ("tools/curate.py", "check", "--workers", 2, "--piece-images", 5, "--images")
    ended = tool(*command, odd, "--json", file)
    assert ended.returncode == 0, ended.stderr
    alone = check_images(odd, tmp_path / "out", ImageSettings(), AnnotationSettings(), silent, workers=0)
    assert alone.table() in ended.stdout
    assert json.loads(file.read_text()) == json.loads(alone.to_json())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "empty.jpg").write_bytes(b"")
    ended = tool(*command, tmp_path / "bad")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "holds no usable image (empty file 1)" in ended.stderr


def test_what_may_not_be_read_is_counted_and_named(tmp_path: Path) -> None:
    for name in ("good.jpg", "secret.jpg", "closed/a.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(photo(len(name)))
    (tmp_path / "in" / "secret.jpg").chmod(0)
    (tmp_path / "in" / "closed").chmod(0)
    tmp_path.chmod(0o777)
    for folder in list(tmp_path.parents)[:3]:
        folder.chmod(folder.stat().st_mode | 0o055)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        found = find_images(tmp_path / "in", tmp_path / "stages", tmp_path, 2)
    finally:
        if root:
            os.seteuid(0)
        (tmp_path / "in" / "closed").chmod(0o755)
    assert [image.path for image in found.images(0)] == ["good.jpg"]
    assert found.kinds["not readable"] == (
        2, ["closed/ (a folder that may not be read)", "secret.jpg (a file that may not be read)"],
    )  # fmt: skip


def test_plain_webdataset_reads_a_shard_of_keys_that_had_dots(tmp_path: Path) -> None:
    import webdataset

    for name in ("22.05.png", "22.06.png", "0.input.jpg"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(ODD[name][0])
    source = find_images(tmp_path / "in", tmp_path / "stages", tmp_path, 9)
    images = source.images(0)
    record = SampleRecord(SIDE, SIDE, (RegionRecord("object", (0, 0, 9, 9), 0),))
    with ShardWriter(tmp_path, "shard-00000") as writer:
        for image in images:
            writer.add(image.key, source.read(image), record)
    dataset = webdataset.WebDataset(str(tmp_path / "shard-00000.tar"), shardshuffle=False)
    rows = [(row["__key__"], row["jpg"]) for row in dataset]
    assert rows == [(image.key, source.read(image)) for image in images]
    assert [key for key, _ in rows] == ["0_input", "22_05", "22_06"]


def test_the_first_of_loose_images_with_one_content_is_judged(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.jpg").write_bytes(b"" if number % 2 else np.uint32(number).tobytes())
    found = check_images(folder, tmp_path / "out", ImageSettings(), AnnotationSettings(), silent, workers=0)
    assert kinds_of(found) == {"not an image": 20, "empty file": 1, "duplicate": 19}
    assert found.unusable["not an image"][1] == ["0.jpg", "10.jpg", "12.jpg"]


def test_labels_of_two_images_count_once_and_an_annotation_beside_an_image_counts_as_its_file(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "set" / "images"
    folder.mkdir(parents=True)
    (tmp_path / "set" / "data.yaml").write_text("names: [cat]")
    (tmp_path / "set" / "labels").mkdir()
    (tmp_path / "set" / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5")
    for number, name in enumerate(("a.jpg", "a.png", "b.jpg")):
        (folder / name).write_bytes(photo(number))
    coco = {"images": [{"id": 1, "file_name": "b.jpg"}], "annotations": []}
    (folder / "b.coco.json").write_text(json.dumps(coco))
    settings = AnnotationSettings(annotations_file=str(folder / "b.coco.json"))
    beside = check_images(folder.parent, tmp_path / "out", ImageSettings(), settings, silent, workers=0)
    assert kinds_of(beside) == {"image": 3, "other file": 2, "file of an image": 1}
    found = check_images(folder.parent, tmp_path / "out", ImageSettings(), AnnotationSettings(), silent, 0)
    assert kinds_of(found) == {"image": 3, "other file": 1, "annotation file": 1, "file of an image": 1}
