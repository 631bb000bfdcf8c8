"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from megaregion.files import locked, new_file, new_folder, partial_name, write_text


def test_a_failing_write_keeps_the_old_file_and_leaves_no_part(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "old")

    def write_half():
        with new_file(file) as stream:
            stream.write(b"ne")
            assert file.read_text() == "old"
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_keeps_the_old_file_and_leaves_no_part(tmp_path, monkeypatch):
    file = tmp_path / "latest"
    file.write_text("step-00000001")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "step-00000002")
    assert file.read_text() == "step-00000001"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_written_once_refuses_to_replace_another(tmp_path):
    file = tmp_path / "claim"
    write_text(file, "first", shared=True, once=True)
    with pytest.raises(FileExistsError):
        write_text(file, "second", shared=True, once=True)
    assert file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]


def test_names_of_processes_that_write_the_same_file_differ(tmp_path):
    file = tmp_path / "latest"
    assert partial_name(file, shared=True) != partial_name(file, shared=True)
    assert partial_name(file) == partial_name(file) == tmp_path / ".latest.partial"


def test_a_new_folder_replaces_the_old_one_only_if_it_was_filled(tmp_path):
    folder = tmp_path / "site"
    with new_folder(folder) as partial:
        (partial / "page").write_text("old")

    def fill_half():
        with new_folder(folder) as partial:
            (partial / "page").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill_half()
    assert (folder / "page").read_text() == "old"
    with new_folder(folder) as partial:
        (partial / "other").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["other"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_new_folder_for_once_leaves_what_somebody_put_there_meanwhile(tmp_path):
    def fill():
        with new_folder(tmp_path / "site", shared=True, once=True) as partial:
            (partial / "page").write_text("ours")
            (tmp_path / "site").mkdir(exist_ok=True)
            (tmp_path / "site" / "page").write_text("theirs")

    with pytest.raises(OSError, match="not empty"):
        fill()
    assert (tmp_path / "site" / "page").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_lock_is_held_by_one_alone_or_by_many_who_share_it(tmp_path):
    file = tmp_path / ".lock"
    with locked(file) as held:
        assert held
        with locked(file, wait=False) as second:
            assert not second
    with locked(file, shared=True) as held, locked(file, wait=False, shared=True) as second:
        assert held
        assert second
        with locked(file, wait=False) as alone:
            assert not alone
