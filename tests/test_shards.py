"""Shards on disk: what is written is read back, by us and by plain webdataset; damage is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import OBJECT_CLASSES, TEXT_CLASSES, toy_dataset

from megaregion.data import shards
from megaregion.data.info import ShardEntry
from megaregion.data.sample import (
    RLE,
    BadSample,
    RegionRecord,
    SampleRecord,
    clip_regions,
    decode_mask,
    encode_mask,
    parse_sample,
)
from megaregion.data.shards import ShardedDataset
from megaregion.data.writer import ShardWriter, write_dataset
from megaregion.errors import UserError
from megaregion.files import file_sha256

MASK = np.zeros((48, 64), dtype=bool)
MASK[5:20, 3:9] = True
RECORD = SampleRecord(
    64,
    48,
    (
        RegionRecord("object", (3.0, 5.0, 9.5, 20.0), 3, (), 0.93, "", encode_mask(MASK), "dog", (7, 0)),
        RegionRecord("text", (0.0, 0.0, 30.0, 12.0), None, (5, 2, 5), 0.98, "AUSGANG «Ü»"),
    ),
    "a dog by the door",
)


def write_shard(folder: Path, name: str, keys: list[str]) -> ShardEntry:
    with ShardWriter(folder, name) as writer:
        for key in keys:
            writer.add(key, f"image of {key}".encode() * 100, RECORD)
    return writer.entry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    entries = [
        write_shard(tmp_path, f"shard-{s:05d}", [f"key{s}{i}" for i in range(n)]) for s, n in ((0, 3), (1, 2))
    ]
    write_dataset(tmp_path, entries, 8, 6)
    return tmp_path


def test_a_shard_reads_back_through_plain_webdataset(folder: Path) -> None:
    tars = sorted(map(str, folder.glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    dataset = ShardedDataset(folder)
    assert len(samples) == len(dataset) == 5
    for index, sample in enumerate(samples):
        assert (sample["__key__"], sample["jpg"], sample["json"]) == tuple(dataset.read(index))
        assert parse_sample(sample["json"]) == RECORD


def test_a_sample_is_read_with_one_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ShardedDataset(folder)
    dataset.read(4)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args) or pread(*args))
    assert dataset.read(3).key == "key10"
    assert len(reads) == 1


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    assert (
        write_shard(tmp_path / "a", "shard", ["x"]).sha256
        == write_shard(tmp_path / "b", "shard", ["x"]).sha256
    )


def test_counts_and_label_spaces_stand_in_dataset_json(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    assert (content["version"], content["samples"]) == (1, 5)
    assert content["regions"] == {"object": 5, "text": 5}
    assert (content["object_classes"], content["text_classes"]) == (8, 6)
    assert content["centers_sha256"] is None
    assert ShardedDataset(folder).info.to_dict() == content


def test_one_object_class_is_warned_of(folder: Path) -> None:
    info = ShardedDataset(folder).info
    assert info.notices() == []
    [notice] = replace(info, object_classes=1).notices()
    assert "its loss is 0" in notice
    assert replace(info, object_classes=1, objects=0).notices() == [], "text alone is no mistake"


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(tmp_path, "shard") as writer:
            writer.add("x", b"image", RECORD)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "x" * 96, "ü" * 48])
def test_a_key_that_cannot_name_a_member_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="key"), ShardWriter(tmp_path, "shard") as writer:
        writer.add(key, b"image", RECORD)


def test_a_key_is_accepted_only_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'x' is already in shard"):
        write_shard(tmp_path, "shard", ["x", "y", "x"])


def test_an_empty_shard_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"), ShardWriter(tmp_path, "shard"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_shard_with_a_label_outside_the_label_space_cannot_enter_a_dataset(tmp_path: Path) -> None:
    entry = write_shard(tmp_path, "shard", ["x"])
    with pytest.raises(UserError, match=r"shard\.tar has object label 7, outside the label space of 7"):
        write_dataset(tmp_path, [entry], 7, 6)
    with pytest.raises(UserError, match="text token 5"):
        write_dataset(tmp_path, [entry], 8, 5)


def test_centers_must_be_as_many_as_the_classes(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.zeros((9, 4), dtype=np.float32))
    with pytest.raises(UserError, match="must hold 8 centers"):
        write_dataset(tmp_path, [write_shard(tmp_path, "shard", ["x"])], 8, 6, tmp_path / "c.npy")


def test_a_dataset_survives_pickling(folder: Path) -> None:
    dataset = ShardedDataset(folder)
    dataset.read(0)
    assert pickle.loads(pickle.dumps(dataset)).read(4) == dataset.read(4)
    dataset.close()
    assert dataset.read(0).key == "key00"


def damage_nothing_written(folder: Path) -> None:
    (folder / "dataset.json").unlink()


def damage_version(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"version": 9}))


def damage_json(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"version": 1, "samples": 5}')


def damage_count(folder: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"samples": 6}))


def damage_half_written(folder: Path) -> None:
    os.truncate(folder / "shard-00001.tar", 4096)


def damage_empty(folder: Path) -> None:
    os.truncate(folder / "shard-00001.tar", 0)


def damage_missing(folder: Path) -> None:
    (folder / "shard-00001.index.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (damage_nothing_written, "dataset.json does not exist"),
        (damage_version, "version 9, this program reads version 1"),
        (damage_json, "dataset.json is damaged"),
        (damage_count, "names 6 samples, but its shards hold 5"),
        (damage_half_written, "shard-00001.tar is half-written.* 4096 bytes"),
        (damage_empty, "shard-00001.tar is empty"),
        (damage_missing, "shard-00001.index.npy does not exist"),
    ],
)
def test_a_damaged_dataset_is_refused_by_name(folder: Path, damage, text: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=text):
        ShardedDataset(folder)


def test_an_index_of_another_shard_is_refused(folder: Path) -> None:
    (folder / "shard-00001.index.npy").write_bytes((folder / "shard-00000.index.npy").read_bytes())
    with pytest.raises(UserError, match=r"shard-00001\.index\.npy must index 2 samples"):
        ShardedDataset(folder).read(4)


def test_an_index_that_points_between_members_is_refused(folder: Path) -> None:
    path = folder / "shard-00001.index.npy"
    np.save(path, np.load(path) - 64)
    with pytest.raises(UserError, match=r"shard-00001\.index\.npy does not fit its tar"):
        ShardedDataset(folder).read(4)


def test_a_shard_that_is_packed_anew_under_an_open_dataset_is_refused(tmp_path: Path) -> None:
    folder = toy_dataset(tmp_path / "shards", shards=2)
    dataset = pickle.loads(pickle.dumps(ShardedDataset(folder)))
    first, last = dataset.read(0), len(dataset) - 1
    for path in folder.glob("shard-*.tar"):
        # Of the same size, as shards of other labels may be.
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content.replace(b'"label": 1', b'"label": 2').replace(b'"label":1', b'"label":2'))
    assert dataset.read(0) == first, "what is open stays"
    for _ in range(2):
        with pytest.raises(UserError, match=r"shard-00001\.tar is not the file .* it was packed anew while"):
            dataset.read(last)


def test_a_copy_of_the_same_bytes_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toy_dataset(tmp_path, shards=2)
    dataset = ShardedDataset(folder)
    hashed: list[str] = []
    sha256 = shards.file_sha256
    monkeypatch.setattr(shards, "file_sha256", lambda path: hashed.append(path.name) or sha256(path))
    os.utime(folder / "shard-00001.tar", ns=(0, 0))
    for _ in range(3):
        assert dataset.read(len(dataset) - 1)
        dataset.close()
    assert hashed == ["shard-00001.tar"]


def test_a_shard_that_cannot_be_checked_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError("the storage failed")

    folder = toy_dataset(tmp_path, shards=2)
    dataset = ShardedDataset(folder)
    os.utime(folder / "shard-00001.tar", ns=(0, 0))
    monkeypatch.setattr(shards, "file_sha256", fail)
    last = len(dataset) - 1
    dataset.read_ahead([last])
    for _ in range(2):
        with pytest.raises(OSError, match="the storage failed"):
            dataset.read(last)


def test_an_index_that_is_a_pickle_is_not_opened(folder: Path) -> None:
    np.save(folder / "shard-00000.index.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"shard-00000\.index\.npy cannot be read"):
        ShardedDataset(folder).read(0)


def test_other_centers_or_another_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = toy_dataset(tmp_path, samples=4, shards=2)
    info = ShardedDataset(folder).info
    assert (info.object_classes, info.text_classes) == (OBJECT_CLASSES, TEXT_CLASSES)
    centers = folder / "centers.npy"
    np.save(centers, np.load(centers) + 1)
    with pytest.raises(UserError, match=r"centers\.npy is not the file that the dataset was packed with"):
        ShardedDataset(folder)
    assert len(ShardedDataset(folder, check_labels=False)) == 4
    (folder / "tokenizer.model").unlink()
    centers.write_bytes((folder / "centers-source.npy").read_bytes())
    with pytest.raises(UserError, match=r"tokenizer\.model does not exist"):
        ShardedDataset(folder)


def test_a_large_label_file_is_hashed_once_and_again_when_anyone_has_touched_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaregion.files.LARGE", 1000)
    folder = toy_dataset(tmp_path / "data", samples=4, shards=2)
    centers = folder / "centers.npy"
    hashed: list[str] = []

    def watched(path: Path) -> str:
        hashed.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("megaregion.files.file_sha256", watched)
    ShardedDataset(folder)
    assert hashed == ["tokenizer.model"], "the centers were hashed when the dataset was written"
    note = folder / ".centers.npy.sha256"
    note.write_text("{")
    ShardedDataset(folder)
    assert hashed[1:] == ["centers.npy", "tokenizer.model"]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    ShardedDataset(copy)
    assert hashed[3:] == ["centers.npy", "tokenizer.model"]
    state, content = centers.stat(), bytearray(centers.read_bytes())
    content[-1] ^= 1
    centers.write_bytes(content)
    os.utime(centers, ns=(state.st_atime_ns, state.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(UserError, match=r"centers\.npy is not the file that the dataset was packed with"):
            ShardedDataset(folder)


def test_verify_finds_a_flipped_bit_and_a_repeated_key(folder: Path) -> None:
    ShardedDataset(folder).verify()
    tar = folder / "shard-00000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.tar is not the file"):
        ShardedDataset(folder).verify()
    entries = [write_shard(folder, name, ["same"]) for name in ("a", "b")]
    write_dataset(folder, entries, 8, 6)
    with pytest.raises(UserError, match="'same' twice"):
        ShardedDataset(folder).verify()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xd8", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"width": 4, "height": 4}', "lacks 'regions'"),
        (b'{"width": 0, "height": 4, "regions": []}', "0 x 4"),
        (b'{"width": 4.0, "height": 4, "regions": []}', "4.0 where a whole number"),
        (
            b'{"width": 4, "height": 4, "regions": [{"kind": "face", "box": [0, 0, 1, 1]}]}',
            "unknown kind face",
        ),
        (b'{"width": 4, "height": 4, "regions": [{"kind": "object", "box": [0, 0, 1]}]}', "cannot be read"),
        (
            b'{"width": 4, "height": 4, "regions": [{"kind": "object", "box": [0, 0, NaN, 1], "label": 1}]}',
            "not finite",
        ),
        (
            b'{"width": 4, "height": 4, "regions": [{"kind": "object", "box": [0, 0, 1, 1], "label": -1}]}',
            "-1 where",
        ),
        (
            b'{"width": 4, "height": 4, "regions": [{"kind": "object", "box": [0, 0, 1, 1], "label": true}]}',
            "True where",
        ),
        (
            b'{"width": 4, "height": 4, "regions": [{"kind": "object", "box": [0, 0, 1, 1], "label": 1,'
            b' "labels": [2, 1]}]}',
            "do not begin with its label 1",
        ),
        (
            b'{"width": 4, "height": 4, "regions": [{"kind": "text", "box": [0, 0, 1, 1], "tokens": []}]}',
            "without tokens",
        ),
        (
            b'{"width": 4, "height": 4, "regions": [{"kind": "object", "box": [0, 0, 1, 1], "label": 1,'
            b' "mask": {"size": [2, 2], "counts": [4]}}]}',
            "mask of 2 x 2",
        ),
        (
            b'{"width": 2, "height": 2, "regions": [{"kind": "object", "box": [0, 0, 1, 1], "label": 1,'
            b' "mask": {"size": [2, 2], "counts": [5]}}]}',
            "do not add up",
        ),
    ],
)
def test_a_record_that_contradicts_itself_is_a_bad_sample(content: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        parse_sample(content)


def test_boxes_are_cut_to_the_image_and_dropped_outside_it() -> None:
    boxes = [(-5.0, 2.0, 10.0, 99.0), (64.0, 0.0, 70.0, 9.0), (7.0, 7.0, 7.0, 9.0), (9.0, 9.0, 4.0, 12.0)]
    record = SampleRecord(64, 48, tuple(RegionRecord("object", box, 1) for box in boxes))
    clipped, dropped = clip_regions(record)
    assert [region.box for region in clipped.regions] == [(0.0, 2.0, 10.0, 48)]
    assert dropped == 3
    with pytest.raises(BadSample, match="no region with area inside its 64 x 48 image"):
        clip_regions(SampleRecord(64, 48, record.regions[1:]))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda h: st.lists(st.lists(st.booleans(), min_size=h, max_size=h), min_size=1, max_size=9)
    )
)
def test_run_lengths_give_the_mask_back(rows: list[list[bool]]) -> None:
    mask = np.array(rows)
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)
    assert sum(encode_mask(mask).counts[1::2]) == mask.sum()


def test_run_lengths_are_those_of_coco() -> None:
    # Column-major, zeros first: a mask that starts with a one has a first run of no zeros.
    assert encode_mask(np.array([[1, 0], [1, 1]], dtype=bool)) == RLE((2, 2), (0, 2, 1, 1))
