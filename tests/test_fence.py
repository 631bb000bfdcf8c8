"""One owner per run folder: an orphan publishes nothing, whenever it wakes up."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from launch import Tool
from test_checkpoint import write
from test_run import command, metrics, pretrain
from toy import newest_whole, toy_dataset

from megaregion.checkpoint.fence import Fence, claim, read_claim, refusal
from megaregion.checkpoint.format import Piece, publish, step_folder, unfinished_folder, write_pieces
from megaregion.checkpoint.reader import find_checkpoint
from megaregion.errors import FENCED_EXIT, Fenced


def publish_as(checkpoints: Path, step: int, fence: Fence, at_the_last_moment: object = None) -> None:
    """Save a step as one incarnation; the last moment lies between its look at the fence and the rename."""
    unfinished = unfinished_folder(checkpoints, step, fence.number)
    unfinished.mkdir(parents=True)
    write_pieces(unfinished, 0, [Piece("one", (2,), (0,), torch.full((2,), float(fence.number)))])

    def check() -> None:
        fence.check()
        if callable(at_the_last_moment):
            at_the_last_moment()

    facts = {"step": step, "position": 0, "incarnation": fence.number}
    publish(unfinished, step_folder(checkpoints, step), facts, check)


def owner(checkpoints: Path, token: str = "host:1:2.5") -> Fence:
    return Fence(checkpoints, claim(checkpoints, token).number, token)


def newest(checkpoints: Path) -> int | None:
    found = newest_whole(checkpoints)
    return None if found is None else found.step


def test_starts_are_numbered_and_list_what_was_published(tmp_path: Path) -> None:
    write(tmp_path, 5)
    assert claim(tmp_path, "7.0").number == 1
    second = claim(tmp_path, "7.1")
    assert second.number == 2
    assert list(second.published) == ["step-00000005"]
    assert read_claim(tmp_path / "fence", 2) == second
    assert sorted(f.name for f in (tmp_path / "fence").iterdir()) == ["000001.json", "000002.json"]


def test_claims_at_one_moment_get_numbers_of_their_own(tmp_path: Path) -> None:
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: numbers.append(claim(tmp_path, f"host:{n}:0").number))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_an_orphan_publishes_nothing(tmp_path: Path) -> None:
    orphan = owner(tmp_path)
    publish_as(tmp_path, 1, orphan)
    new = owner(tmp_path)
    with pytest.raises(Fenced, match=r"incarnation 1 .* saves nothing: incarnation 2 has taken over"):
        publish_as(tmp_path, 2, orphan)
    assert newest(tmp_path) == 1
    publish_as(tmp_path, 3, new)
    assert newest(tmp_path) == 3


def test_an_orphan_that_looked_just_before_the_claim_is_ignored_by_every_reader(tmp_path: Path) -> None:
    orphan = owner(tmp_path)
    publish_as(tmp_path, 1, orphan)
    publish_as(tmp_path, 9, orphan, at_the_last_moment=lambda: claim(tmp_path, "7.1"))
    assert (tmp_path / "latest").read_text() == "step-00000009\n"
    assert newest(tmp_path) == 1
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 1)
    reason = refusal(step_folder(tmp_path, 9))
    assert reason == "incarnation 1 published it after incarnation 2 had taken over the run"
    third = claim(tmp_path, "7.2")
    assert list(third.published) == ["step-00000001"]
    assert newest(tmp_path) == 1


def test_an_orphan_cannot_replace_the_owners_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    orphan = owner(tmp_path)
    publish_as(tmp_path, 1, orphan)

    def the_new_owner_gets_there_first() -> None:
        publish_as(tmp_path, 9, owner(tmp_path))

    with pytest.raises(Fenced, match="incarnation 2 has published step-00000009"):
        publish_as(tmp_path, 9, orphan, the_new_owner_gets_there_first)
    found = newest_whole(tmp_path)
    assert found is not None
    assert (found.step, found.manifest["incarnation"], found.read("one")[0]) == (9, 2, 2)


def test_the_owner_replaces_its_own_and_older_checkpoints_of_a_step(tmp_path: Path) -> None:
    publish_as(tmp_path, 9, owner(tmp_path))
    new = owner(tmp_path)
    publish_as(tmp_path, 9, new)
    publish_as(tmp_path, 9, new)
    found = newest_whole(tmp_path)
    assert found is not None
    assert found.manifest["incarnation"] == 2
    assert [f.name for f in tmp_path.glob("step-*")] == ["step-00000009"]


@pytest.mark.parametrize(
    ("token", "of_the_owner", "refused"),
    [
        ("7.0", "7.1", True), ("7.9", "7.10", True), ("7.1", "7.1", False), ("7.2", "7.1", False),
        ("8.0", "7.1", False), ("host:1:2.5", "7.1", False), ("host:1:2.0", "host:1:2.5", False),
    ],
)  # fmt: skip
def test_an_earlier_restart_of_the_owners_job_is_refused(
    token: str, of_the_owner: str, refused: bool, tmp_path: Path
) -> None:
    claim(tmp_path, of_the_owner)
    if refused:
        with pytest.raises(Fenced, match=rf"{token} started late: {of_the_owner}, a later restart"):
            claim(tmp_path, token)
    else:
        assert claim(tmp_path, token).number == 2


def test_checkpoints_from_before_the_first_claim_are_used(tmp_path: Path) -> None:
    write(tmp_path, 5)
    assert refusal(step_folder(tmp_path, 5)) is None
    owner(tmp_path)
    owner(tmp_path)
    assert newest(tmp_path) == 5


def test_a_run_that_was_taken_over_ends_with_one_line_and_exit_code_86(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = toy_dataset(tmp_path / "shards")
    started = Tool(*command(dataset, tmp_path, "--train.steps=1000000", "--checkpoint.every=1000000")[3:])
    started.wait_for("step ")
    checkpoints = tmp_path / "run" / "checkpoints"
    claim(checkpoints, "7.3")
    ended = started.wait()
    assert ended.returncode == FENCED_EXIT, ended
    lines = [line for line in ended.stderr.splitlines() if line.startswith("megaregion:")]
    assert len(lines) == 1
    assert "saves nothing: incarnation 2 has taken over the run" in lines[0]
    assert not list(checkpoints.glob("step-*"))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "ready"]
    assert metrics(tmp_path), "it had taken steps"

    monkeypatch.setenv("MEGAREGION_FENCE", "7.2")
    late = pretrain(dataset, tmp_path, "--train.steps=1")
    assert late.returncode == FENCED_EXIT, late.stderr
    assert "7.2 started late: 7.3, a later restart of the same job" in late.stderr
