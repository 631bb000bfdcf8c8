"""Checkpoints on disk: any box of any tensor comes back, and damage is recognised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy import newest_whole

from megaregion.checkpoint.format import Piece, publish, step_folder, write_pieces
from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint, find_checkpoint
from megaregion.checkpoint.saver import Retention, retire
from megaregion.errors import UserError
from megaregion.parallel.tensor_parallel import Placement


def write(checkpoints: Path, step: int, cuts: list[slice] | None = None) -> torch.Tensor:
    """A checkpoint of one 7 x 6 tensor, written by one rank a cut; returns the tensor."""
    full = torch.arange(42, dtype=torch.float32).reshape(7, 6) + step
    unfinished = checkpoints / f"step-{step:08d}.unfinished"
    unfinished.mkdir(parents=True)
    for rank, cut in enumerate(cuts or [slice(0, 7)]):
        rows = range(7)[cut]
        write_pieces(unfinished, rank, [Piece("matrix", (7, 6), (rows.start, 0), full[cut])])
    publish(unfinished, step_folder(checkpoints, step), {"step": step, "position": step * 8})
    return full


@pytest.mark.parametrize(
    "cuts", [None, [slice(0, 4), slice(4, 7)], [slice(0, 3), slice(3, 6), slice(6, 7), slice(7, 7)]]
)
def test_any_box_comes_back_from_any_cut(tmp_path: Path, cuts: list[slice] | None) -> None:
    full = write(tmp_path, 5, cuts)
    reader = CheckpointReader(step_folder(tmp_path, 5))
    assert torch.equal(reader.read("matrix"), full)
    for top in range(7):
        for left in range(6):
            box = reader.read("matrix", (top, left), (7 - top, min(2, 6 - left)))
            assert torch.equal(box, full[top:, left : left + 2])


def test_a_partition_that_cuts_rows_is_saved_as_boxes_that_make_up_the_tensor(tmp_path: Path) -> None:
    full = torch.arange(3 * 4 * 5, dtype=torch.float32).reshape(3, 4, 5)
    place = Placement((3, 4, 5), (0, 1, 0), (3, 3, 5))  # This tensor rank's part.
    own, unfinished = place.shard(full).flatten(), tmp_path / "step-00000001.unfinished"
    unfinished.mkdir()
    write_pieces(unfinished, 0, [Piece("cube", (3, 4, 5), (0, 0, 0), full[:, :1])])
    for rank, (start, stop) in enumerate([(0, 7), (7, 8), (8, 8), (8, 42), (42, 45)], start=1):
        boxes = list(place.boxes(start, own[start:stop]))
        assert len(boxes) <= 5, "at most a part of a row, whole rows and a part again in each direction"
        assert all(part.shape == box.shape for box, part in boxes)
        write_pieces(
            unfinished, rank, [Piece("cube", box.full_shape, box.offset, part) for box, part in boxes]
        )
    publish(unfinished, step_folder(tmp_path, 1), {"step": 1, "position": 0})
    assert torch.equal(CheckpointReader(step_folder(tmp_path, 1)).read("cube"), full)


def test_a_scalar_tensor_comes_back(tmp_path: Path) -> None:
    unfinished = tmp_path / "step-00000001.unfinished"
    unfinished.mkdir()
    write_pieces(unfinished, 0, [Piece("scalar", (), (), torch.tensor(3.5))])
    publish(unfinished, step_folder(tmp_path, 1), {"step": 1, "position": 0})
    assert CheckpointReader(step_folder(tmp_path, 1)).read("scalar") == 3.5


def test_a_missing_part_is_an_error_and_not_garbage(tmp_path: Path) -> None:
    write(tmp_path, 5, [slice(0, 3), slice(5, 7)])
    reader = CheckpointReader(step_folder(tmp_path, 5))
    with pytest.raises(DamagedCheckpoint, match="12 of 42 values of matrix are missing"):
        reader.read("matrix")


@pytest.mark.parametrize(("true", "false"), [(b'"shape": [7, 6]', b'"shape": [6, 7]'), (b'"F32"', b'"I32"')])
def test_a_file_that_holds_another_tensor_than_the_manifest_says_is_damaged(
    tmp_path: Path, true: bytes, false: bytes
) -> None:
    write(tmp_path, 5)
    reader = CheckpointReader(step_folder(tmp_path, 5))
    file = step_folder(tmp_path, 5) / reader.files()[0]
    content = file.read_bytes()
    assert content.count(true) == 1
    file.write_bytes(content.replace(true, false))
    with pytest.raises(DamagedCheckpoint, match=r"the manifest says F32 \[7, 6\]"):
        reader.read("matrix")


def test_flipped_bytes_are_recognised_and_the_older_checkpoint_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 5)
    write(tmp_path, 6)
    damaged = step_folder(tmp_path, 6) / "rank-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 0xFF
    damaged.write_bytes(content)
    found = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 5


@pytest.mark.parametrize("harm", ["no manifest", "cut manifest", "cut file", "lost file"])
def test_a_damaged_folder_is_skipped_for_the_older_one(tmp_path: Path, harm: str) -> None:
    write(tmp_path, 5)
    write(tmp_path, 6)
    folder = step_folder(tmp_path, 6)
    manifest, tensors = folder / "manifest.json", folder / "rank-00000.safetensors"
    if harm == "no manifest":
        manifest.unlink()
    elif harm == "cut manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif harm == "cut file":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    else:
        tensors.unlink()
    found = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 5


def test_nothing_whole_is_found_in_an_empty_folder(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "missing") is None


def test_old_checkpoints_are_deleted_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    retire(tmp_path, Retention(last=2))
    assert sorted(f.name for f in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]


def test_a_user_may_name_the_run_the_checkpoints_or_one_step(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    write(checkpoints, 1)
    write(checkpoints, 2)
    newest = step_folder(checkpoints, 2)
    assert find_checkpoint(tmp_path / "run") == newest
    assert find_checkpoint(checkpoints) == newest
    assert find_checkpoint(step_folder(checkpoints, 1)) == step_folder(checkpoints, 1)
    (checkpoints / "latest").write_text("step-99999999\n")
    assert find_checkpoint(checkpoints) == newest
    with pytest.raises(UserError, match="no finished checkpoint"):
        find_checkpoint(tmp_path)


def test_an_interrupted_write_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    unfinished = tmp_path / "step-00000001.unfinished"
    unfinished.mkdir()
    write_pieces(unfinished, 0, [Piece("matrix", (2,), (0,), torch.zeros(2))])
    assert newest_whole(tmp_path) is None
    with pytest.raises(UserError):
        find_checkpoint(tmp_path)


def test_the_manifest_is_plain_json_with_shapes_and_checksums(tmp_path: Path) -> None:
    write(tmp_path, 5, [slice(0, 4), slice(4, 7)])
    manifest = json.loads((step_folder(tmp_path, 5) / "manifest.json").read_text())
    assert manifest["step"] == 5
    assert manifest["tensors"]["matrix"]["shape"] == [7, 6]
    assert [p["offset"] for p in manifest["tensors"]["matrix"]["pieces"]] == [[0, 0], [4, 0]]
    assert all(len(f["sha256"]) == 64 for f in manifest["files"].values())
