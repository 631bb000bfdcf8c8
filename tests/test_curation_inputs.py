"""What curation takes: folders, WebDataset tars as img2dataset writes them, SA-1B's masks; broken ones."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from curation_scenes import contents, run, scene, settings_from, silent
from PIL import Image
from pyarrow import parquet

from megaregion.curation.inputs.annotations import read_annotations
from megaregion.curation.inputs.find import find_images
from megaregion.curation.inputs.source import Source
from megaregion.curation.inputs.tars import Scan, _Header, scan_tar
from megaregion.curation.picture import BadImage, Picture, read_picture
from megaregion.curation.pipeline import curate
from megaregion.data.sample import decode_mask, encode_mask, parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError

FEW = {"clusters": 4, "vocab": 384, "piece_images": 2, "samples_per_shard": 3, "crop_side": 96}


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    scene(number).save(file, "JPEG", quality=92)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], fmt: int = tarfile.PAX_FORMAT) -> Path:
    """As webdataset's TarWriter does: Python's tarfile, with times that are no whole seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=fmt) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(content), 1700000000.25  # type: ignore[assignment]
            tar.addfile(header, io.BytesIO(content))
    return path


def pack(mask: np.ndarray) -> str:
    """COCO's packed run lengths, written from its definition."""
    counts = list(encode_mask(mask).counts)
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            last = value == -1 if bits & 16 else value == 0
            text += chr(48 + bits + (0 if last else 32))
            if last:
                break
    return text


def annotated(side: int = 192) -> tuple[bytes, np.ndarray]:
    """SA-1B's record of two masks, one of them given twice, and of regions that cannot be used."""
    rows, columns = np.mgrid[:side, :side]
    round_mask = (rows - 100) ** 2 + (columns - 60) ** 2 < 40**2
    square = (rows >= 20) & (rows < 90) & (columns >= 110) & (columns < 192)

    def record(mask: np.ndarray, score: float = 0.95) -> dict[str, Any]:
        return {
            "segmentation": {"size": list(mask.shape), "counts": pack(mask)}, "predicted_iou": score,
            "bbox": [0, 0, 1, 1], "stability_score": 0.97, "id": 1,
        }  # fmt: skip

    bad = [
        {"segmentation": {"size": [5, 5], "counts": "0"}, "predicted_iou": 0.9},
        {"segmentation": {"size": [side, side], "counts": "\u20ac"}, "predicted_iou": 0.9},
        {"bbox": [10, 10, "wide", 3]},
        {**record(square), "predicted_iou": float("nan")},
    ]
    outside = [record(np.zeros_like(square)), {"bbox": [500, 10, 20, 20]}, {"bbox": [10, 10, 0, 30]}]
    regions = [record(round_mask), record(square, 0.9), record(square, 0.85), *bad, *outside]
    return json.dumps({"image": {"image_id": 1}, "annotations": regions}).encode(), round_mask


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of img2dataset, one without captions, one that broke off, one that is none; a Parquet file."""
    folder = tmp_path_factory.mktemp("tars")
    first: list[tuple[str, bytes]] = []
    for number in range(3):
        key = f"00000{number:04d}"
        meta = json.dumps({"caption": "a scene", "url": "https://x/y.jpg", "width": 192}).encode()
        first += [
            (f"{key}.jpg", jpeg(number)),
            (f"{key}.json", meta),
            (f"{key}.txt", b"a sc\xe8ne, not UTF-8"),
        ]
    first += [("000000001.jpg", jpeg(9)), ("000000077.jpg", jpeg(3)[:3000]), ("000000078.txt", b"no image")]
    write_tar(folder / "00000.tar", first)
    write_tar(folder / "more" / "00001.tar", [(f"deep/{'n' * 120}/{n}.JPG", jpeg(n)) for n in (4, 5)])
    whole = write_tar(folder / "00002.tar", [(f"{n}.jpg", jpeg(n)) for n in (6, 7, 8)], tarfile.GNU_FORMAT)
    whole.write_bytes(whole.read_bytes()[: scan_tar(whole).members[2].image.offset + 100])
    (folder / "00003.tar").write_bytes(b"<html>not found</html>")
    parquet.write_table(pa.table({"url": ["https://x/y.jpg"]}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    return folder


def test_tars_are_read_in_place_and_broken_ones_up_to_the_damage(tars: Path, tmp_path: Path) -> None:
    before = contents(tars)
    summary = run(tars, tmp_path / "out", **FEW)
    assert contents(tars) == before
    assert summary.bad.pop("00003.tar") == "not a tar file; images before it: 0"
    damage = summary.bad.pop("00002.tar")
    assert damage.startswith("truncated")
    assert damage.endswith("images before it: 2")
    assert summary.bad == {"00000.tar/000000077": "truncated or damaged"}
    # A Parquet file, a JSON file, and a text without an image in a tar.
    assert (summary.files, summary.duplicates, summary.others) == (9, 1, 3)
    dataset = ShardedDataset(tmp_path / "out" / "shards")
    dataset.verify()
    found = {dataset.read(index).key: dataset.read(index).image for index in range(len(dataset))}
    assert found["00000_000000001"] == jpeg(1)
    assert found["00002_7"] == jpeg(7)
    assert sorted(found.values()) == sorted(jpeg(number) for number in (0, 1, 2, 4, 5, 6, 7))
    assert all(len(key.encode()) <= 95 for key in found)
    assert not list((tmp_path / "out").rglob("*.jpg"))


def test_a_tar_is_looked_into_once_and_again_when_it_changed(tars: Path, tmp_path: Path) -> None:
    more = Path(shutil.copytree(tars, tmp_path / "tars", copy_function=shutil.copy2))
    first = find_images(more, tmp_path / "stages", tmp_path, 2)
    before = len(first)
    assert find_images(more, tmp_path / "stages", tmp_path, 2, workers=2).digest == first.digest
    write_tar(more / "00003.tar", [("a.jpg", jpeg(1)), ("b.b.jpg", jpeg(2)), (".c.jpg", jpeg(3))])
    again = find_images(more, tmp_path / "stages", tmp_path, 2)
    assert len(again) == before + 2
    assert again.digest != first.digest
    write_tar(more / "00003.tar", [("a.jpg", jpeg(1))])
    with pytest.raises(UserError, match="changed while curation ran; run again"):
        list(again.between(0, len(again)))


def test_an_image_that_is_damaged_after_it_was_proposed_is_counted_and_not_packed(tmp_path: Path) -> None:
    png = io.BytesIO()
    scene(7).save(png, "PNG")
    members = [*((f"{n}.jpg", jpeg(n)) for n in (1, 2, 4)), ("7.png", png.getvalue())]
    path = write_tar(tmp_path / "tars" / "a.tar", members)
    settings, out = {**FEW, "piece_images": 4, "samples_per_shard": 4}, tmp_path / "out"
    whole = run(path.parent, out, **settings)
    assert whole.counts["images packed"] == 4
    content, state = bytearray(path.read_bytes()), path.stat()
    for member in scan_tar(path).members[1::2]:
        content[member.image.offset + 2000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    shutil.rmtree(out / "stages" / "pack")
    summary = run(path.parent, out, **settings)
    assert summary.bad == dict.fromkeys(("a.tar/2", "a.tar/7"), "damaged after it was proposed")
    assert summary.unusable == {"damaged after it was proposed": 2}
    counts, lost = summary.counts, summary.counts["dropped: of a damaged image"]
    assert counts["images packed"] == 2
    assert counts["object regions"] + lost == whole.counts["object regions"] > counts["object regions"]
    words = counts["text regions"] + counts["words of damaged images"]
    assert words == whole.counts["text regions"] > counts["text regions"]


def test_a_damaged_header_ends_a_tar_and_is_not_taken_for_its_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", jpeg(n)) for n in range(3)], tarfile.USTAR_FORMAT)
    offset = scan_tar(path).members[1].image.offset - tarfile.BLOCKSIZE
    content = bytearray(path.read_bytes())
    content[offset + 3] ^= 255
    path.write_bytes(content)
    scan = scan_tar(path)
    assert [member.name for member in scan.members] == ["0"]
    assert scan.damage == "damaged header"
    (tmp_path / "empty.tar").write_bytes(b"")
    assert scan_tar(tmp_path / "empty.tar").damage == "not a tar file"


def test_masks_that_came_with_images_are_kept_without_proposing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, mask = annotated()
    loose, packed = tmp_path / "loose", tmp_path / "packed"
    loose.mkdir()
    names = [f"sa_{number}" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        (loose / f"{name}.jpg").write_bytes(jpeg(2 * number + 1))
        (loose / f"{name}.json").write_bytes(record)
    (loose / "sa_4.jpg").write_bytes(jpeg(8))
    (loose / "sa_4.json").write_bytes(b'{"annotations": [\xff')
    # SA-1B's own tars name members with ./ and need not put an image beside its masks.
    files = sorted(loose.iterdir(), key=lambda path: (path.suffix, path.name))
    write_tar(packed / "sa_000000.tar", [(f"./{path.name}", path.read_bytes()) for path in files])
    monkeypatch.setattr("megaregion.curation.stages.regions.load_proposer", None)
    found = {}
    for folder in (loose, packed):
        out = tmp_path / f"out-{folder.name}"
        summary = run(folder, out, clusters=4, vocab=384, piece_images=2, annotations="only")
        assert summary.bad == {}
        counts = summary.counts
        assert counts["annotation files that cannot be read"] == 1
        assert (counts["images with annotations"], counts["proposed"]) == (3, 30)
        reasons = ("bad annotation", "outside the image", "no area", "duplicate")
        assert [counts[f"dropped: {why}"] for why in reasons] == [12, 3, 6, 3]
        dataset = ShardedDataset(out / "shards")
        samples = [dataset.read(index) for index in range(len(dataset))]
        found[folder.name] = [sample.record for sample in samples]
        assert [sample.key for sample in samples] == [
            name if folder == loose else f"sa_000000_{name}" for name in (*names, "sa_4")
        ]
    assert found["loose"] == found["packed"]
    regions = [region for region in parse_sample(found["loose"][0]).regions if region.kind == "object"]
    assert [(region.box, region.score) for region in regions] == [
        ((21.0, 61.0, 100.0, 140.0), 0.95), ((110.0, 20.0, 192.0, 90.0), 0.9),
    ]  # fmt: skip
    assert regions[0].mask is not None
    assert np.array_equal(decode_mask(regions[0].mask), mask)


def test_only_annotations_count_and_only_json_is_read() -> None:
    picture = Picture(np.zeros((10, 10, 3), np.uint8), None)
    assert read_annotations(b'{"caption": "a dog", "annotations": "none"}', picture) is None
    assert read_annotations(b"[1, 2]", picture) is None
    clipped = read_annotations(b'\xef\xbb\xbf{"annotations": [{"bbox": [-3, 2, 9, 90]}]}', picture)
    assert clipped is not None
    assert clipped[0][0].box == (0.0, 2.0, 6.0, 10.0)
    for content in (b"", b"\xff\xfe", b"[" * 100_000):
        with pytest.raises(BadImage, match="cannot be read"):
            read_annotations(content, picture)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["mask", "box"])
@pytest.mark.parametrize("size", [(40, 24), (32, 32)])
def test_annotations_turn_with_an_image_that_exif_turns(
    orientation: int, kind: str, size: tuple[int, int]
) -> None:
    stored = np.zeros(size, bool)
    stored[5:9, 2:17] = True
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(stored.astype(np.uint8) * 255).save(file, "PNG", exif=exif)
    picture = read_picture(file.getvalue(), 10**6)
    upright = picture.pixels[..., 0] > 0
    runs = {"size": list(size), "counts": pack(stored)}
    row = {"segmentation": runs} if kind == "mask" else {"bbox": [2, 5, 15, 4]}
    [region], dropped = read_annotations(json.dumps({"annotations": [row]}).encode(), picture) or ([], None)
    assert dropped == {}
    rows, columns = np.flatnonzero(upright.any(axis=1)), np.flatnonzero(upright.any(axis=0))
    assert region.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    if kind == "mask":
        assert region.mask is not None
        assert np.array_equal(decode_mask(region.mask), upright)
    # The sides tell where somebody annotated the upright image.
    if upright.shape != size:
        runs = {"size": list(upright.shape), "counts": pack(upright)}
        x, y = int(columns[0]), int(rows[0])
        row = {"segmentation": runs} if kind == "mask" else {"bbox": [x, y, len(columns), len(rows)]}
        image = {"width": upright.shape[1], "height": upright.shape[0]}
        content = json.dumps({"image": image, "annotations": [row]}).encode()
        [again], _ = read_annotations(content, picture) or ([], None)
        assert again == region


def test_hostile_run_lengths_cost_no_time() -> None:
    row = {"segmentation": {"size": [10, 10], "counts": "o" * 2**20}}
    picture = Picture(np.zeros((10, 10, 3), np.uint8), None)
    began = time.monotonic()
    assert read_annotations(json.dumps({"annotations": [row]}).encode(), picture) == (
        [],
        {"bad annotation": 1},
    )
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["part-0.parquet"], "holds Parquet files of URLs; download them first: img2dataset --url_list"),
        (["broken.tar"], r"holds no image in its tars; broken\.tar: not a tar file"),
        (["a.psd", "b.SVG"], r"holds images of \.psd, \.svg only; convert them to JPEG or PNG"),
        (["a.txt"], r"holds no \.jpg, .* or \.tar file among its 1 files"),
    ],
)
def test_what_cannot_be_curated_is_refused_with_the_way_out(
    files: list[str], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"something")
        if name.endswith(".parquet"):
            parquet.write_table(pa.table({"url": ["https://x/y.jpg"]}), folder / name)
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "out", **FEW)
    with pytest.raises(UserError, match="is a Parquet file of URLs; download them first: img2dataset"):
        run(tmp_path / "urls.parquet", tmp_path / "out", **FEW)
    assert not (tmp_path / "out" / "shards").exists()


# Nothing is left out in silence


def listed(folder: Path, place: Path, **options: Any) -> Source:
    return find_images(folder, place / "stages", place, 2, **options)


def test_names_with_dots_and_odd_endings_are_taken_or_counted(tmp_path: Path) -> None:
    names = [
        "22.05.png", "22.06.png", "0.input.jpg", "0.target.jpg", "a.JPE", "b.jfif", "c.avif", "d.tif",
        "e.tiff", ".hidden.jpg", "README", "a.txt", "0.json", "22.05.json", "lonely.json",
    ]  # fmt: skip
    tar = write_tar(tmp_path / "tars" / "x.tar", [(name, name.encode()) for name in names])
    with tarfile.open(tar, "a") as more:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.JPE"
        more.addfile(link)
    scan = scan_tar(tar)
    taken = ["22.05", "22.06", "0.input", "0.target", "a", "b", "c", "d", "e"]
    assert [member.name for member in scan.members] == taken
    # A file of the same name belongs to an image, and one of its sample where that has no other image.
    assert [member.name for member in scan.members if member.annotation] == ["22.05"]
    beside = ["a.txt", "0.json", "22.05.json"]
    assert scan.kinds == {
        "hidden file": (1, [".hidden.jpg"]), "file of an image": (3, beside),
        "other file": (3, ["link.jpg", "README", "lonely.json"]),
    }  # fmt: skip
    assert len(taken) + sum(count for count, _ in scan.kinds.values()) == len(names) + 1
    (tmp_path / "loose").mkdir()
    for name in names:
        (tmp_path / "loose" / name).write_bytes(name.encode())
    loose = listed(tmp_path / "loose", tmp_path / "out")
    assert sorted(Path(image.path).stem for image in loose.between(0, len(loose))) == sorted(taken)
    assert {kind: count for kind, (count, _) in loose.kinds.items()} == {
        "hidden file": 1, "file of an image": 3, "other file": 2,
    }  # fmt: skip


def test_members_behind_the_end_mark_and_compressed_tars_are_named(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "1.tar", [("a.jpg", jpeg(1))])
    second = write_tar(tmp_path / "2.tar", [("b.jpg", jpeg(2))])
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    assert [member.name for member in scan_tar(joined).members] == ["a"]
    assert scan_tar(joined).damage.startswith("members behind its end mark")
    first.write_bytes(first.read_bytes() + bytes(3 * 2**20))
    assert scan_tar(first).damage == ""
    for name in ("3.tar", "4.tar.gz", "5.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(second.read_bytes()))
    assert scan_tar(tmp_path / "3.tar").damage == "compressed by gzip; decompress it first"
    bad = listed(tmp_path, tmp_path / "out").left_out["bad"]
    assert {name for name, why in bad.items() if "gzip" in why} == {"3.tar", "4.tar.gz", "5.tgz"}


def test_links_to_folders_and_to_nothing_are_named_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    (folder / "real").mkdir(parents=True)
    (folder / "real" / "a.jpg").write_bytes(b"a")
    (folder / "linked").symlink_to(folder / "real")
    (folder / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "good.jpg").symlink_to(folder / "real" / "a.jpg")
    os.mkfifo(folder / "pipe.jpg")
    found = listed(folder, tmp_path / "out")
    assert (len(found), found.left_out["duplicates"], found.left_out["others"]) == (1, 1, 1)
    assert found.left_out["bad"] == {
        "linked": "a link to a folder, which is not followed", "lost.jpg": "a link to nothing",
    }  # fmt: skip
    assert found.left_out["damaged"] == 2
    monkeypatch.setattr("megaregion.curation.inputs.find.NAMED", 1)
    found = listed(folder, tmp_path / "other")
    assert list(found.left_out["bad"]) == ["linked"]
    assert found.left_out["damaged"] == 2, "those beyond the named ones count too"


def test_keys_never_collide_across_tars_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_tar(folder / "x.tar", [("y_1.jpg", b"1"), ("z.jpg", b"2")])
    alone = listed(folder, tmp_path / "out")
    assert [image.key for image in alone.between(0, len(alone))] == ["x_y_1", "x_z"]
    before = alone.identity(0)
    write_tar(folder / "x" / "y.tar", [("1.jpg", b"3"), ("2.jpg", b"4")])
    write_tar(folder / "x_y.tar", [("1.jpg", b"5")])
    (folder / "x" / "z.jpg").write_bytes(b"6")
    found = listed(folder, tmp_path / "out")
    images = {image.path: image for image in found.between(0, len(found))}
    assert len({image.key for image in images.values()}) == len(images) == 6
    assert images["x/z.jpg"].key == "x_z"
    assert {found.read(image) for image in images.values()} == {b"1", b"2", b"3", b"4", b"5", b"6"}
    # The keys of x.tar's images are others now, so what was made of them is stale.
    assert [found.identity(n)[:5] for n in range(found.slices)].count(before) == 1
    assert before not in [found.identity(n) for n in range(found.slices)]


def test_a_plain_header_is_read_as_tarfile_reads_it(tmp_path: Path) -> None:
    names = ["a.jpg", "b/ü.jpg", f"{'d/' * 60}e.jpg", "f" * 140, os.fsdecode(b"caf\xe9.jpg"), ""]
    for place in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for name, size in itertools.product(names, (0, 1, 8**11)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid = size, 1.5, 2**30
            try:
                blocks = info.tobuf(place, "utf-8", "surrogateescape")
            except ValueError:
                continue  # This format has no room for it.
            for start in range(0, len(blocks), 512):
                for block in (blocks[start : start + 512], blocks[start : start + 511] + b"x"):
                    assert _read_header(_Header, block) == _read_header(tarfile.TarInfo, block)


def _read_header(kind: type[tarfile.TarInfo], block: bytes) -> object:
    try:
        found = kind.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return str(error)
    return found.name, found.size, found.isreg(), found.isdir(), found.type == tarfile.AREGTYPE


def test_a_tar_that_vanishes_or_changes_is_never_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    tar = write_tar(folder / "x.tar", [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))])
    content = tar.read_bytes()
    module = "megaregion.curation.inputs.find"

    def while_listed(act: Callable[[], object]) -> None:
        def scan(path: Path) -> Scan:
            found = scan_tar(path)
            act()
            return found

        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.scan_tar", scan)
            listed(folder, tmp_path / "out")

    with pytest.raises(UserError, match=r"x\.tar vanished while the images were listed; run again"):
        while_listed(tar.unlink)
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar changed while the images were listed; run again"):
        while_listed(lambda: tar.write_bytes(content + content))
    tar.write_bytes(content)
    found = listed(folder, tmp_path / "out")
    image = found.images(0)[0]
    assert found.read(image) == jpeg(1)
    # Of the same size, but not what was listed.
    tar.write_bytes(content.replace(jpeg(1)[100:200], jpeg(2)[100:200]))
    os.utime(tar, ns=(0, image.changed + 10**9))
    with pytest.raises(UserError, match=r"x\.tar changed while curation ran; run again"):
        found.read(image)


def test_what_megaregion_wrote_is_never_input(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in (1, 2, 4, 10):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    first = run(folder, folder, **FEW)
    shards = contents(folder / "shards")
    assert first.counts["images packed"] == 4
    # Into its own folder once more: shards and stages of the first time are no images.
    again = run(folder, folder, **FEW)
    assert contents(folder / "shards") == shards
    assert (again.files, again.bad, again.outputs) == (
        4,
        {},
        1 + len(list((folder / "shards").glob("*.tar"))),
    )
    assert "never taken for input" in again.table()
    # Another run's shards, an atlas and a training run's pictures below the images.
    (folder / "atlas" / "sheets").mkdir(parents=True)
    (folder / "atlas" / "atlas.json").write_text("{}")
    (folder / "atlas" / "sheets" / "1.jpg").write_bytes(jpeg(5))
    (folder / "run" / "pictures").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / "run" / name).write_text("")
    (folder / "run" / "pictures" / "a.map.jpg").write_bytes(jpeg(6))
    elsewhere = listed(folder, tmp_path / "other")
    assert (len(elsewhere), elsewhere.left_out["outputs"]) == (4, again.outputs + 2)
    for own in ("shards", "atlas", "run"):
        with pytest.raises(UserError, match=r"nothing but what megaregion wrote .* the original images"):
            run(folder / own, folder, **FEW)
    assert contents(folder / "shards") == shards


# What stands in the way is one line


@pytest.mark.parametrize(
    ("path", "folder", "stage"),
    [
        ("stages", False, "list"),
        ("stages/inputs.json", True, "list"),
        ("run.json", True, "list"),
        ("stages/propose", False, "propose"),
        ("shards", False, "all"),
        ("summary.json", True, "list"),
    ],
)
def test_a_file_or_folder_in_the_way_is_named(path: str, folder: bool, stage: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").write_bytes(jpeg(1))
    place = tmp_path / "out" / path
    place.parent.mkdir(parents=True)
    if folder:
        place.mkdir()
    else:
        place.write_text("in the way")
    with pytest.raises(
        UserError, match=rf"{path}.* cannot be written .*; remove what is in the way"
    ) as error:
        run(tmp_path / "in", tmp_path / "out", stage, **{**FEW, "clusters": 1, "ocr": "none"})
    assert "\n" not in str(error.value)


def test_workers_tell_what_the_machine_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "out" / "stages").mkdir(parents=True)
    (tmp_path / "out" / "stages" / "propose").write_text("in the way")
    with pytest.raises(UserError, match=r"propose/.* cannot be written"):
        curate(tmp_path / "in", tmp_path / "out", settings_from(FEW), silent, "propose", workers=1)


def test_a_folder_that_is_removed_while_curation_runs_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(jpeg(number))

    @contextmanager
    def remove(stage: str, images: int) -> Iterator[Callable[[], None]]:
        yield lambda: shutil.rmtree(tmp_path / "out", ignore_errors=True)

    with pytest.raises(UserError, match=r"out/.* was removed while curation ran; run again"):
        curate(tmp_path / "in", tmp_path / "out", settings_from(FEW), remove, workers=0)


def test_an_unreadable_corpus_and_images_without_a_region_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").write_bytes(jpeg(1))
    with pytest.raises(UserError, match="--corpus /proc/self/mem cannot be read"):
        run(tmp_path / "in", tmp_path / "out", **FEW, corpus="/proc/self/mem")
    with pytest.raises(UserError, match="no image has a region that can be embedded; loosen --min-edge"):
        run(tmp_path / "in", tmp_path / "out", **FEW, min_edge=5000.0, ocr="none")
