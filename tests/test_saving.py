"""Saving beside training: what is written is the step's state, and no failed write costs more than itself."""

from __future__ import annotations

import json
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from launch import launch
from toy import newest_whole, toy_config, toy_dataset

from megaregion.checkpoint.format import step_folder
from megaregion.checkpoint.reader import CheckpointReader
from megaregion.checkpoint.saver import Retention, retire

EVERY_OTHER = {
    "train__steps": 5, "train__micro_batch": 4, "checkpoint__every": 2, "parallel__tensor": 2,
}  # fmt: skip
KINDS = {
    # ZeRO 0 gives live tensors, which the next step overwrites; ZeRO 3 gathers scattered ones.
    "zero0": {**EVERY_OTHER, "parallel__zero_stage": 0},
    "zero3": {**EVERY_OTHER, "parallel__zero_stage": 3, "parallel__tensor": 1},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_dataset(tmp_path_factory.mktemp("shards"))


def checkpoints(output: Path, name: str) -> Path:
    return output / name / "checkpoints"


def saved_steps(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.glob("step-*"))


def checksums(output: Path, name: str, step: int) -> dict[str, str]:
    manifest = CheckpointReader(step_folder(checkpoints(output, name), step)).manifest
    return {file: facts["sha256"] for file, facts in manifest["files"].items()}


def _two_ranks(dataset: str, output: str) -> None:
    from test_training import train

    from megaregion.checkpoint import saver as saving
    from megaregion.training.trainer import Trainer

    data, runs = Path(dataset), Path(output)
    for kind, changes in KINDS.items():
        train(toy_config(data, runs, f"{kind}-waits", **changes, checkpoint__asynchronous=False))
    staged = {"checkpoint__local": str(runs / "local"), **KINDS["zero0"]}
    train(toy_config(data, runs, "staged", **staged))

    write, step, passed = saving.write_pieces, Trainer.train_step, threading.Event()

    def late(folder: Path, rank: int, pieces: object, staging: Path | None) -> None:
        """The disk takes nothing of a save before training has taken the next step."""
        passed.wait(60)
        write(folder, rank, pieces, staging)

    def counted(self: Trainer, batches: object) -> object:
        values = step(self, batches)
        if self.state.step % 2 == 1:
            passed.set()
        else:
            passed.clear()
        return values

    saving.write_pieces, Trainer.train_step = late, counted
    for kind, changes in KINDS.items():
        train(toy_config(data, runs, f"{kind}-goes-on", **changes))
    Trainer.train_step = step

    def cramped(folder: Path, rank: int, pieces: object, staging: Path | None) -> None:
        """Rank 1 meets a full disk at step 2."""
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1 and "step-00000002" in folder.name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limit[1]))
        try:
            write(folder, rank, pieces, staging)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    saving.write_pieces = cramped
    train(toy_config(data, runs, "one-disk-full", **KINDS["zero0"]))


@pytest.fixture(scope="module")
def two_ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    launch(_two_ranks, 2, str(dataset), str(output))
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_beside_training_writes_the_bytes_of_its_own_step(kind: str, two_ranks: Path) -> None:
    for step in (2, 4, 5):
        assert checksums(two_ranks, f"{kind}-goes-on", step) == checksums(two_ranks, f"{kind}-waits", step)
    assert checksums(two_ranks, f"{kind}-waits", 2) != checksums(two_ranks, f"{kind}-waits", 4)


def test_staged_files_are_the_same_and_the_local_copies_are_gone(two_ranks: Path) -> None:
    assert checksums(two_ranks, "staged", 4) == checksums(two_ranks, "zero0-waits", 4)
    CheckpointReader(step_folder(checkpoints(two_ranks, "staged"), 4)).verify()
    assert [f for f in (two_ranks / "local").rglob("*") if f.is_file()] == []


def test_a_full_disk_on_one_rank_costs_that_save_alone(two_ranks: Path) -> None:
    folder = checkpoints(two_ranks, "one-disk-full")
    assert saved_steps(folder) == ["step-00000004", "step-00000005"]
    assert (folder / "latest").read_text() == "step-00000005\n"
    assert checksums(two_ranks, "one-disk-full", 5) == checksums(two_ranks, "zero0-waits", 5)


def test_the_manifest_knows_the_mean_loss_since_the_save_before(two_ranks: Path) -> None:
    lines = (two_ranks / "zero0-waits" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    manifest = CheckpointReader(step_folder(checkpoints(two_ranks, "zero0-waits"), 4)).manifest
    assert manifest["loss"] == pytest.approx((losses[2] + losses[3]) / 2)


def _rank_that_never_comes(output: str) -> None:
    from dataclasses import replace

    from megaregion.checkpoint.fence import Fence
    from megaregion.checkpoint.format import Piece
    from megaregion.checkpoint.saver import Save, Saver
    from megaregion.parallel import topology
    from megaregion.schemas.run import Events

    folder = Path(output)
    place = replace(topology.join(1), world_size=2)
    saver = Saver(place, Fence(folder, 0, ""), Events(folder, False), Retention(last=1), others_seconds=0.2)
    assert saver.prepare(folder, 3)
    saver.start(Save(folder, 3, [Piece("one", (2,), (0,), torch.ones(2))], {"step": 3, "position": 0}))
    assert not saver.wait()
    assert saved_steps(folder) == []

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="can't start new thread"):
        saver.start(Save(folder, 4, [], {}))
    saver.settle(seconds=1)


def test_a_save_without_the_other_ranks_files_fails_in_time_and_one_without_a_thread_at_once(
    tmp_path: Path,
) -> None:
    launch(_rank_that_never_comes, 1, str(tmp_path))


def test_the_retention_rule_keeps_last_multiples_and_best() -> None:
    losses: dict[int, float | None] = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 5.0, 60: 4.0}
    assert Retention(last=1).kept(losses, [60]) == {60}
    assert Retention(last=1, every=20).kept(losses, [60]) == {20, 40, 60}
    assert Retention(last=2, best=2).kept(losses, [60, 50]) == {60, 50, 20, 30}


def test_unfinished_folders_go_once_a_newer_checkpoint_is_finished(tmp_path: Path) -> None:
    from test_checkpoint import write

    for name in ("step-00000001.unfinished-000001", "step-00000002", "step-00000009.unfinished-000002"):
        (tmp_path / name).mkdir()
    retire(tmp_path, Retention(last=1))
    assert len(saved_steps(tmp_path)) == 3, "something was deleted though nothing is finished"
    write(tmp_path, 5)
    retire(tmp_path, Retention(last=1))
    assert saved_steps(tmp_path) == ["step-00000005", "step-00000009.unfinished-000002"]


def test_a_damaged_manifest_counts_as_one_without_loss(tmp_path: Path) -> None:
    from test_checkpoint import write

    for step in (1, 2, 3):
        write(tmp_path, step)
    (step_folder(tmp_path, 1) / "manifest.json").write_text("{")
    retire(tmp_path, Retention(last=1, best=1))
    assert saved_steps(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("harm", ["step-00000009\n", "", "../elsewhere\n", "\udcff"])
def test_a_latest_that_points_nowhere_is_reported_and_the_newest_is_used(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from test_checkpoint import write

    from megaregion.checkpoint.reader import find_checkpoint

    write(tmp_path, 5)
    (tmp_path / "latest").write_bytes(harm.encode(errors="surrogateescape"))
    assert find_checkpoint(tmp_path) == step_folder(tmp_path, 5)
    assert len([r for r in caplog.records if "taking the newest finished checkpoint" in r.message]) == 1


def test_a_changed_number_in_the_manifest_is_recognised(tmp_path: Path) -> None:
    from test_checkpoint import write

    write(tmp_path, 5)
    write(tmp_path, 6)
    manifest = step_folder(tmp_path, 6) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"position": 48', '"position": 49'))
    found = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 5


def _resume_where_nothing_is_whole(dataset: str, output: str) -> None:
    from test_training import train

    from megaregion.errors import UserError

    runs = Path(output)
    config = toy_config(Path(dataset), runs, "lost", train__steps=2, checkpoint__every=1)
    train(config)
    folders = [step_folder(checkpoints(runs, "lost"), step) for step in (1, 2)]
    (folders[0] / "rank-00000.safetensors").write_bytes(b"")
    manifest = folders[1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match=r"holds checkpoints, but none is whole \(.*has no version 1\)"):
        train(config, resume_from=checkpoints(runs, "lost"))
    for folder in folders:
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"none is whole \(.*step-00000002 has no manifest.json\)"):
        train(config, resume_from=checkpoints(runs, "lost"))
    assert saved_steps(checkpoints(runs, "lost")) == ["step-00000001", "step-00000002"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_over_them(
    dataset: Path, tmp_path: Path
) -> None:
    launch(_resume_where_nothing_is_whole, 1, str(dataset), str(tmp_path))


def test_a_damaged_checkpoint_never_takes_the_place_of_one_that_can_be_read(tmp_path: Path) -> None:
    from test_checkpoint import write

    for step in (4, 6, 9):
        write(tmp_path, step)
    (step_folder(tmp_path, 9) / "rank-00000.safetensors").write_bytes(b"cut")
    write(tmp_path, 8)
    retire(tmp_path, Retention(last=2))
    assert saved_steps(tmp_path) == ["step-00000006", "step-00000008", "step-00000009"]
    for step in (10, 11):
        write(tmp_path, step)
    retire(tmp_path, Retention(last=2))
    assert saved_steps(tmp_path) == ["step-00000010", "step-00000011"], "a damaged one stayed for ever"


def test_nothing_is_deleted_where_no_checkpoint_can_be_read(tmp_path: Path) -> None:
    from test_checkpoint import write

    for step in (1, 2):
        write(tmp_path, step)
        (step_folder(tmp_path, step) / "rank-00000.safetensors").unlink()
    (tmp_path / "step-00000001.unfinished-000001").mkdir()
    retire(tmp_path, Retention(last=1))
    assert len(saved_steps(tmp_path)) == 3


def test_a_checkpoint_that_the_run_wrote_itself_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_checkpoint import write

    for step in (1, 2):
        write(tmp_path, step)
    monkeypatch.setattr(CheckpointReader, "verify", None)
    retire(tmp_path, Retention(last=1), {step_folder(tmp_path, 2)})
    assert saved_steps(tmp_path) == ["step-00000002"]


def _last_save_fails(dataset: str, output: str) -> None:
    from test_training import train

    from megaregion.checkpoint import saver as saving
    from megaregion.errors import StopRequest, UserError
    from megaregion.parallel import topology
    from megaregion.training import state
    from megaregion.training.trainer import Trainer

    write, runs = saving.write_pieces, Path(output)

    def refusing(*names: str, step: int = 3) -> None:
        def full(folder: Path, rank: int, pieces: object, staging: Path | None) -> None:
            if any(name in str(folder) for name in names) and f"step-{step:08d}" in folder.name:
                raise OSError(28, "No space left on device")
            write(folder, rank, pieces, staging)

        saving.write_pieces = full

    state.MEMORY = runs / "memory"
    for asynchronous in (True, False):
        for name, refused in (
            ("beside", ["checkpoints"]),
            ("in-memory", ["checkpoints", "-memory/"]),
            ("nowhere", ["checkpoints", "-memory/", "/memory/"]),
        ):
            run = f"{name}-{asynchronous}"
            refusing(*(part.replace("-memory", run) for part in refused))
            config = toy_config(
                Path(dataset), runs, run, checkpoint__every=2, checkpoint__asynchronous=asynchronous
            )
            with pytest.raises(UserError) as told:
                train(config)
            (runs / run / "told").write_text(str(told.value))
            saving.write_pieces = write
            for place in (runs / run / "rescue", runs / "memory" / f"megaregion-{run}-rescue"):
                if (folder := step_folder(place, 3)).exists():
                    folder.rename(step_folder(checkpoints(runs, run), 3))
                    train(config, resume_from=checkpoints(runs, run))

    refusing("checkpoints", "memory", "rescue", step=1)
    stop = StopRequest()
    stop.received = "SIGTERM"
    config = toy_config(Path(dataset), runs, "signalled")
    (runs / "signalled").mkdir()
    with pytest.raises(UserError, match=r"of step 1, could not be saved .* no other place took it"):
        Trainer(config, topology.join(1), stop).run()


@pytest.fixture(scope="module")
def unsaved(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unsaved")
    launch(_last_save_fails, 1, str(dataset), str(output))
    return output


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("name", "copy"),
    [("beside", "{}/rescue/step-00000003"), ("in-memory", "memory/megaregion-{}-rescue/step-00000003")],
)
def test_a_last_save_that_fails_leaves_a_copy_elsewhere_and_names_it(
    name: str, copy: str, asynchronous: bool, unsaved: Path
) -> None:
    run = f"{name}-{asynchronous}"
    told = (unsaved / run / "told").read_text()
    assert f"of step 3, could not be saved in {checkpoints(unsaved, run)} ([Errno 28] No space" in told
    assert f"a copy is in {unsaved / copy.format(run)}: move it there and use --resume auto" in told
    CheckpointReader(step_folder(checkpoints(unsaved, run), 3)).verify()
    assert (unsaved / run / "DONE").exists(), "the copy was moved there, and the run went on from it"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_that_saved_its_end_nowhere_does_not_call_itself_trained(
    asynchronous: bool, unsaved: Path
) -> None:
    run = unsaved / f"nowhere-{asynchronous}"
    assert "no other place took it" in (run / "told").read_text()
    assert not (run / "DONE").exists()
    assert saved_steps(run / "checkpoints") == ["step-00000002"]


def test_a_signalled_run_that_could_not_save_does_not_end_as_one_that_did(unsaved: Path) -> None:
    events = (unsaved / "signalled" / "events.jsonl").read_text()
    assert '"event": "stop"' not in events
    assert saved_steps(unsaved / "signalled" / "checkpoints") == []
