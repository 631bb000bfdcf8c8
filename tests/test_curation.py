"""Curation from image files to a finished dataset: the real stages on a few small images."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import curation_scenes
import numpy as np
import pytest
from curation_scenes import contents, save_tiny_clip, save_tiny_sam, scene, settings_from, workers_of
from PIL import Image

from megaregion.curation.inputs.find import find_images
from megaregion.curation.picture import BadImage, Picture, iou, read_picture
from megaregion.curation.stages import JOINED
from megaregion.curation.stages.stage import Output, Store
from megaregion.data.info import load_tokenizer, token_set
from megaregion.data.sample import parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError
from megaregion.schemas.curation import Summary

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"clusters": 8, "vocab": 384, "piece_images": 8, "samples_per_shard": 10, "crop_side": 96}
GOOD = 24


def bomb() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "more" / ".hidden").mkdir(parents=True)
    for number in range(GOOD):
        path = folder / ("more" if number % 3 == 0 else "") / f"scene-{number:02d}.jpg"
        if number == 5:
            scene(number).save(path.with_suffix(".png"))
        elif number == 7:
            scene(number).save(path.with_suffix(".webp"), quality=90)
        elif number == 9:
            exif = Image.Exif()
            exif[0x0112] = 6
            scene(number).rotate(90).save(path, quality=92, exif=exif)
        else:
            scene(number).save(path, quality=92)
    whole = (folder / "scene-01.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "zz-copy.JPG").write_bytes(whole)
    (folder / "notes.txt").write_text("nothing")
    (folder / "more" / ".hidden" / "cache.jpg").write_bytes(whole)
    scene(1, 40).save(folder / "icon.jpg")
    return folder


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sam(tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def run(images: Path, out: Path, stage: str = "all", **changes: Any) -> Summary:
    return curation_scenes.run(images, out, stage, **(SMALL | changes))


@pytest.fixture(scope="module")
def curated(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    out = tmp_path_factory.mktemp("curated")
    return out, run(images, out)


@pytest.fixture
def copy(curated: tuple[Path, Summary], tmp_path: Path) -> Path:
    return Path(shutil.copytree(curated[0], tmp_path / "copy"))


def times(folder: Path) -> dict[str, int]:
    found = {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    return {name: changed for name, changed in found.items() if name.count("/") > 1}


def redone(before: dict[str, int], out: Path) -> set[str]:
    """Stages of which at least one manifest was written anew."""
    return {
        name.split("/")[1]
        for name, changed in times(out).items()
        if before.get(name) != changed and "manifest" in name
    }


# The whole path


def test_every_usable_image_becomes_a_sample_with_labels_in_the_label_space(
    curated: tuple[Path, Summary],
) -> None:
    out, summary = curated
    dataset = ShardedDataset(out / "shards")
    dataset.verify()
    assert dataset.info.object_classes == 8
    assert dataset.info.text_classes == 384
    assert len(dataset) == GOOD == summary.counts["images packed"]
    centers = np.load(out / "shards" / "centers.npy", allow_pickle=False)
    assert centers.shape == (8, 1280)
    assert np.allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
    objects = texts = 0
    for index in range(len(dataset)):
        record = parse_sample(dataset.read(index).record)
        for region in record.regions:
            x0, y0, x1, y1 = region.box
            assert 0 <= x0 < x1 <= record.width
            assert 0 <= y0 < y1 <= record.height
            objects += region.kind == "object"
            texts += region.kind == "text"
            if region.kind == "object":
                assert 0 <= region.labels[0] < 8
    assert (objects, texts) == (summary.counts["object regions"], summary.counts["text regions"])
    assert objects >= 2 * GOOD
    assert summary.clusters is not None
    assert summary.clusters.largest * 8 >= objects


def test_rendered_words_are_read_and_become_their_tokens(curated: tuple[Path, Summary]) -> None:
    out, _ = curated
    dataset = ShardedDataset(out / "shards")
    tokenizer = load_tokenizer(out / "shards" / "tokenizer.model")
    found = {}
    for index in range(len(dataset)):
        key, _, content = dataset.read(index)
        texts = [region for region in parse_sample(content).regions if region.kind == "text"]
        assert all(region.tokens == token_set(tokenizer, region.text) for region in texts)
        found[key] = [region.text for region in texts]
    assert sum(words != [] for words in found.values()) >= 10
    assert found["scene-02"] == ["Hotel"]
    assert found["more_scene-00"] == ["EXIT"]


def test_plain_webdataset_reads_the_shards(curated: tuple[Path, Summary]) -> None:
    import webdataset

    out, _ = curated
    dataset = ShardedDataset(out / "shards")
    shards = [str(path) for path in sorted((out / "shards").glob("*.tar"))]
    rows = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [row["__key__"] for row in rows] == [dataset.read(i).key for i in range(len(dataset))]
    for index, row in enumerate(rows):
        assert json.loads(row["json"]) == json.loads(dataset.read(index).record)
        with Image.open(io.BytesIO(row["jpg"])) as image:
            assert image.size == (json.loads(row["json"])["width"], json.loads(row["json"])["height"])


def test_object_regions_lie_on_the_objects_rather_than_the_background(
    curated: tuple[Path, Summary],
) -> None:
    dataset = ShardedDataset(curated[0] / "shards")
    found = 0
    for index in range(len(dataset)):
        boxes = [r.box for r in parse_sample(dataset.read(index).record).regions if r.kind == "object"]
        overlaps = iou(np.array([[17, 75, 72, 130], [115, 95, 170, 150]], float), np.array(boxes, float))
        found += int((overlaps.max(axis=1) > 0.5).sum())
    assert found >= 0.8 * 2 * (len(dataset) - 1)


def test_an_image_rotated_by_exif_is_stored_upright(curated: tuple[Path, Summary], images: Path) -> None:
    dataset = ShardedDataset(curated[0] / "shards")
    stored = {dataset.read(i).key: dataset.read(i).image for i in range(len(dataset))}
    upright = np.asarray(Image.open(io.BytesIO(stored["more_scene-09"]))).astype(int)
    assert np.abs(upright - np.asarray(scene(9)).astype(int)).mean() < 6
    assert stored["scene-01"] == (images / "scene-01.jpg").read_bytes()
    assert stored["scene-05"][:3] == b"\xff\xd8\xff"


# Bad input


def test_unusable_files_are_counted_and_named_and_never_packed(curated: tuple[Path, Summary]) -> None:
    _, summary = curated
    assert summary.bad == {
        "bomb.png": "decompression bomb",
        "empty.png": "empty file",
        "icon.jpg": "image too small",
        "page.jpg": "not an image",
        "truncated.jpg": "truncated or damaged",
    }
    assert (summary.files, summary.duplicates, summary.others) == (GOOD + 6, 1, 1)
    table = summary.table()
    for expected in ("decompression bomb", "unusable: truncated.jpg", "background", "clusters", "tokens"):
        assert expected in table


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0garbage", bomb(), b"GIF89a" + bytes(50)])
def test_a_hostile_file_is_refused_with_a_reason(content: bytes) -> None:
    with pytest.raises(BadImage):
        read_picture(content, max_pixels=10**7)


@pytest.mark.parametrize(
    ("size", "reason"), [((2100, 100), "elongated"), ((63, 90), "small"), ((900, 900), "bomb")]
)
def test_an_image_of_an_unusable_size_is_refused(size: tuple[int, int], reason: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    with pytest.raises(BadImage, match=reason):
        read_picture(file.getvalue(), max_pixels=500_000, min_side=64)


def test_hidden_colours_under_transparency_do_not_show(tmp_path: Path) -> None:
    layer = np.zeros((40, 40, 4), np.uint8)
    layer[..., 0] = 255
    Image.fromarray(layer).save(tmp_path / "a.png")
    assert (read_picture((tmp_path / "a.png").read_bytes(), 10**6).pixels == 255).all()


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no .*among its 1 files"):
        run(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="is no folder"):
        run(tmp_path / "missing", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"clusters": 0}, r"--clusters must lie in \[1, 1e9\], got 0"),
        ({"vocab": 100}, r"--vocab must lie in \[384, 1e6\]"),
        ({"nms_iou": 1.5}, "--nms-iou must lie in"),
        ({"proposer": "sam"}, "needs --sam FOLDER"),
        ({"embedder": "clip", "clip": "/no/such"}, "--clip /no/such is no folder"),
        ({"crop_side": 100}, "multiple of 16"),
    ],
)
def test_a_contradicting_setting_is_refused(change: dict[str, Any], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        settings_from(change)


def test_more_clusters_than_regions_are_refused(copy: Path, images: Path) -> None:
    with pytest.raises(UserError, match=r"--clusters must be at most the .* use fewer clusters"):
        run(images, copy, clusters=5000)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError("920320 requested and 36800 written")],
    ids=["system", "numpy"],
)
def test_a_full_disk_is_one_clear_line_and_costs_only_the_open_piece(
    error: OSError, copy: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = times(copy)

    def full(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Output, "file", full)
        with pytest.raises(UserError, match="no space left"):
            run(images, copy, clusters=6)
    run(images, copy, clusters=6)
    assert redone(before, copy) == {"cluster", "assign", "pack", "publish"}


# Doing only what is needed


def test_a_second_run_does_nothing(curated: tuple[Path, Summary], images: Path) -> None:
    out, summary = curated
    files, written = contents(out), times(out)
    assert run(images, out) == summary
    assert {name for name, content in contents(out).items() if files.get(name) != content} == set()
    assert times(out) == written


def test_damaged_and_half_written_pieces_are_done_again(copy: Path, images: Path) -> None:
    whole = contents(copy / "shards")
    before = times(copy)
    features = copy / "stages" / "embed" / "00001" / "features.npy"
    features.write_bytes(features.read_bytes()[:-100])
    (copy / "stages" / "ocr" / "00002" / "manifest.json").unlink()
    (copy / "stages" / "propose" / "00000" / "manifest.json").write_text('{"key": ')
    shard = copy / "shards" / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    (copy / "shards" / ".shard-00007.tar.partial").write_bytes(b"what a killed run had begun")
    run(images, copy)
    assert contents(copy / "shards") == whole
    assert redone(before, copy) == {"propose", "ocr", "embed", "pack", "publish"}


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"clusters": 6}, {"cluster", "assign", "pack", "publish"}),
        ({"vocab": 400}, {"tokenizer", "pack", "publish"}),
        ({"samples_per_shard": 100}, {"pack", "publish"}),
    ],
)
def test_a_changed_setting_redoes_later_stages_only(
    copy: Path, images: Path, change: dict[str, Any], stages: set[str]
) -> None:
    before = times(copy)
    run(images, copy, **change)
    assert redone(before, copy) == stages
    dataset = ShardedDataset(copy / "shards")
    dataset.verify()
    assert len(dataset) == GOOD
    # Shards of the earlier settings are gone, or a reader of *.tar would see samples twice.
    assert len(list((copy / "shards").glob("*.tar"))) == len(dataset.info.shards)


def test_a_new_image_redoes_only_its_own_piece_of_the_image_stages(
    copy: Path, images: Path, tmp_path: Path
) -> None:
    more = Path(shutil.copytree(images, tmp_path / "images", copy_function=shutil.copy2))
    scene(99).save(more / "zzz.jpg")
    before = times(copy)
    summary = run(more, copy)
    written = {name for name, changed in times(copy).items() if before.get(name) != changed}
    assert {name for name in written if "/ocr/" in name and "words" in name} == {
        "stages/ocr/00003/words.jsonl"
    }
    assert summary.counts["images packed"] == GOOD + 1


def test_another_list_of_images_takes_nothing_that_is_finished_before_its_own_dataset_is(
    copy: Path, images: Path, tmp_path: Path
) -> None:
    before, written = contents(copy), times(copy)
    few, none = tmp_path / "few", tmp_path / "none"
    none.mkdir()
    (none / "notes.txt").write_text("no image")
    few.mkdir()
    for number in (1, 2, 4, 10):
        shutil.copy2(images / f"scene-{number:02d}.jpg", few)
    with pytest.raises(UserError, match="holds no"):
        run(none, copy)
    assert contents(copy) == before
    run(few, copy, stage="list")
    with pytest.raises(UserError, match="--stage embed needs piece 0 of stage propose"):
        run(few, copy, stage="embed")
    assert {name for name in before if "/" in name} <= set(contents(copy))
    run(images, copy)
    assert redone(written, copy) == set()
    run(few, copy, clusters=4)
    run(few, tmp_path / "fresh", clusters=4)
    assert contents(copy / "shards") == contents(tmp_path / "fresh" / "shards")
    stages = copy / "stages"
    assert [path.name for path in (stages / "propose").glob("0*")] == ["00000"], "pieces of other images stay"


def test_a_stage_before_its_input_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--stage embed needs piece 0 of stage propose"):
        run(images, tmp_path / "out", stage="embed")


def pieces(out: Path) -> dict[str, bytes]:
    """All that stages left, but for the time that it took."""
    return {
        name: re.sub(rb'"seconds": [\d.]+', b"", content)
        for name, content in contents(out).items()
        if name.startswith(("stages/propose/", "stages/ocr/", "stages/embed/", "shards/"))
    }


def test_single_stages_in_order_give_the_same_pieces_and_all_at_once_decode_each_image_once(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number in (1, 2, 4, 10):
        shutil.copy2(images / f"scene-{number:02d}.jpg", few)
    decoded = []

    def watched(content: bytes, most: int, least: int, decode: bool = True) -> Picture:
        decoded.extend([1] * decode)
        return read_picture(content, most, least, decode)

    def decodes(out: str, *stages: str) -> int:
        decoded.clear()
        for stage in stages:
            run(few, tmp_path / out, stage, clusters=4, piece_images=3)
        return len(decoded)

    monkeypatch.setattr("megaregion.curation.stages.stage.read_picture", watched)
    assert decodes("at once", "all") == 4
    assert decodes("stepwise", "ocr", "propose", "embed", "cluster", "assign", "tokenizer", "pack") == 3 * 4
    assert pieces(tmp_path / "stepwise") == pieces(tmp_path / "at once")
    # Two of the first piece's three images are kept, and the second piece's only one.
    monkeypatch.setattr("megaregion.curation.picture.ROOM", 2 * 192 * 192 * 3)
    assert decodes("little room", JOINED) == 3 + 1 + 1 + 1
    shutil.rmtree(tmp_path / "little room" / "stages" / "ocr" / "00000")
    (tmp_path / "little room" / "stages" / "embed" / "00001" / "manifest.json").unlink()
    assert decodes("little room", JOINED) == 3 + 1, "more than the missing pieces was done"
    assert decodes("little room", "all") == 0
    assert pieces(tmp_path / "little room") == pieces(tmp_path / "at once")


def test_two_runs_in_one_folder_are_refused(images: Path, tmp_path: Path) -> None:
    from megaregion.curation.workers import folder_held

    with folder_held(tmp_path), pytest.raises(UserError, match=r"in use by process .* choose another folder"):
        run(images, tmp_path)


def command(images: Path, out: Path) -> list[str]:
    flags = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    program = [sys.executable, str(ROOT / "tools" / "curate.py")]
    return [*program, "--images", str(images), "--out", str(out), "--workers", "2", *flags]


def test_killed_workers_and_runs_cost_one_piece_and_any_number_gives_the_same_bytes(
    curated: tuple[Path, Summary], images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen(command(images, out), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for stage, victims in (("propose", workers_of), ("ocr", lambda process: [process])):
        while not list(out.glob(f"stages/{stage}/*/manifest.json")):
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.02)
        os.kill(victims(first.pid)[0], signal.SIGKILL)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL
    assert "died (exit code -9; -9 is often lack of memory); the piece is done again" in errors
    assert not (out / "shards" / "dataset.json").exists()
    kept = times(out)
    done = subprocess.run(
        command(images, out), cwd=ROOT, check=True, capture_output=True, text=True, timeout=300
    )
    assert "unusable: truncated.jpg" in done.stdout
    assert contents(out / "shards") == contents(curated[0] / "shards")
    manifests = {name: when for name, when in kept.items() if name.endswith("manifest.json")}
    assert manifests
    assert manifests.items() <= times(out).items()


def test_a_piece_that_kills_three_workers_ends_the_run_with_a_clear_line(
    images: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy2(images / "scene-01.jpg", few)
    process = subprocess.Popen(
        command(few, tmp_path / "out"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed: set[int] = set()
    while process.poll() is None:
        for worker in set(workers_of(process.pid)) - killed:
            os.kill(worker, signal.SIGKILL)
            killed.add(worker)
        time.sleep(0.01)
    assert process.returncode == 2
    assert len(killed) == 3
    last = process.communicate()[1].splitlines()[-1]
    assert last.startswith("megaregion: the worker for piece 0 of stage propose died (exit code -9; ")
    assert "3 times; run again to continue, perhaps with fewer --workers" in last


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path / "nowhere", tmp_path / "out"), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("megaregion: --images")
    assert len(done.stderr.splitlines()) == 1


def test_sample_keys_are_unique_even_where_paths_look_alike(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    for number, name in enumerate(("a/b.c.jpg", "a/b_c.jpg", "a_b_c.png", "x" * 120 + ".jpg", "d.jpg")):
        (tmp_path / "in" / name).write_bytes(bytes([number]))
    found = find_images(tmp_path / "in", tmp_path / "stages", tmp_path / "out", 3)
    keys = [image.key for image in found.between(0, len(found))]
    assert len(set(keys)) == 5
    assert "d" in keys
    assert all(len(key.encode()) <= 95 and not set(key) & set("./") for key in keys)
    again = find_images(tmp_path / "in", tmp_path / "stages", tmp_path / "out", 3)
    assert [*again.between(0, len(again))] == [*found.between(0, len(found))]
    assert again.digest == found.digest


# Other engines and odd cases


def test_sam_runs_as_a_stage_and_other_weights_are_another_setting(
    sam: Path, images: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy2(images / "scene-01.jpg", few)
    weights = Path(shutil.copytree(sam, tmp_path / "sam"))
    changes = {"proposer": "sam", "sam": str(weights), "sam_grid": 2}
    run(few, tmp_path / "out", stage="propose", **changes)
    before = times(tmp_path / "out")
    run(few, tmp_path / "out", stage="propose", **changes)
    assert not redone(before, tmp_path / "out")
    (weights / "config.json").write_text((weights / "config.json").read_text() + "\n")
    run(few, tmp_path / "out", stage="propose", **changes)
    assert redone(before, tmp_path / "out") == {"propose"}


def test_clip_embeddings_run_through_the_stages(
    clip: Path, images: Path, tmp_path: Path, curated: tuple[Path, Summary]
) -> None:
    out = Path(shutil.copytree(curated[0], tmp_path / "out"))
    before = times(out)
    run(images, out, embedder="clip", clip=str(clip))
    assert redone(before, out) == {"embed", "cluster", "assign", "pack", "publish"}
    assert np.load(out / "shards" / "centers.npy").shape == (8, 24)


def test_records_hold_as_many_labels_as_are_wanted_and_else_stay_the_same(
    images: Path, copy: Path, curated: tuple[Path, Summary]
) -> None:
    before = times(copy)
    run(images, copy, labels_per_region=3)
    assert redone(before, copy) == {"assign", "pack", "publish"}
    one, three = (ShardedDataset(out / "shards") for out in (curated[0], copy))
    for index in range(len(one)):
        plain, rich = (parse_sample(shards.read(index).record).regions for shards in (one, three))
        assert [region._replace(others=()) for region in rich] == list(plain)
        assert all(len(region.labels) == 3 for region in rich if region.kind == "object")
        assert b'"labels"' not in one.read(index).record


def test_a_region_whose_embedding_is_not_finite_gets_no_label(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megaregion.curation.engines.lite0 import Lite0Embedder

    real = Lite0Embedder.embed

    def broken(self: Lite0Embedder, crops: Any) -> Any:
        vectors = real(self, crops)
        vectors[0, 3] = np.nan
        return vectors

    few = tmp_path / "few"
    few.mkdir()
    for number in (1, 2, 4, 10):
        shutil.copy2(images / f"scene-{number:02d}.jpg", few)
    monkeypatch.setattr(Lite0Embedder, "embed", broken)
    summary = run(few, tmp_path / "out", clusters=4)
    assert summary.counts["dropped: not embedded"] == 4
    assert summary.counts["object regions"] == summary.counts["kept"]
    labels = np.load(tmp_path / "out" / "stages" / "assign" / "00000" / "labels.npy")
    assert (labels == -1).sum() == 4


def test_without_any_text_the_dataset_has_no_text_classes(images: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number in (1, 2, 4, 10):
        shutil.copy2(images / f"scene-{number:02d}.jpg", few)
    run(few, tmp_path / "out", clusters=4, ocr="none")
    info = ShardedDataset(tmp_path / "out" / "shards").info
    assert (info.texts, info.text_classes, info.tokenizer_sha256) == (0, 0, None)


def test_a_manifest_of_another_layout_counts_as_missing(copy: Path) -> None:
    from megaregion.curation.stages.stage import Piece

    path = copy / "stages" / "ocr" / "00000" / "manifest.json"
    content = json.loads(path.read_text())
    assert Store(copy).read(Piece("ocr", 0)) is not None
    for broken in ({**content, "version": 99}, {**content, "extra": 1}, [], {"files": 3}):
        path.write_text(json.dumps(broken))
        assert Store(copy).read(Piece("ocr", 0)) is None
