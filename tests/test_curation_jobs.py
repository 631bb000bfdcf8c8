"""Curation in shares: stages as jobs beside each other, on a real SLURM, and what tells how far they are."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from curation_scenes import contents, run, scene, settings_from, silent
from drill import Drill
from launch import repository

from megaregion.curation.pipeline import Share, curate_share, job_lines, open_job, recorded_run
from megaregion.curation.settings import CurationSettings
from megaregion.curation.stages import JOINED, LOOKING, NAMES
from megaregion.curation.status import read_progress, table
from megaregion.curation.workers import folder_held, held
from megaregion.errors import UserError
from megaregion.files import read_json

FEW = {"clusters": 4, "vocab": 384, "piece_images": 2, "samples_per_shard": 3, "crop_side": 96}
FLAGS = [part for key, value in FEW.items() for part in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(1, 8):
        scene(number).save(folder / f"scene-{number}.jpg", quality=92)
    (folder / "scene-8.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def at_once(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("at-once")
    run(images, out, **FEW)
    return out


def share(images: Path, out: Path, stage: str, number: int, of: int, **changes: object) -> tuple[int, int]:
    settings = settings_from({**FEW, **changes})
    pieces, done = curate_share(images, out, settings, silent, stage, Share(number, of), workers=0)
    return len(pieces), done


def test_shares_in_any_order_give_the_dataset_of_one_run(images: Path, at_once: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"has no list of the images in .* run tools/curate\.py --stage list"):
        share(images, out, "propose", 0, 3)
    run(images, out, stage="list", **FEW)
    with pytest.raises(UserError, match="--stage embed needs piece 0 of stage propose"):
        share(images, out, "embed", 0, 3)
    assert [share(images, out, JOINED, number, 3) for number in (2, 0, 1)] == [(2, 6), (1, 3), (1, 3)]
    for stage in NAMES:
        sizes = [share(images, out, stage, number, 3) for number in (2, 0, 1)]
        if stage in LOOKING:
            assert sizes == [(2, 0), (1, 0), (1, 0)], "a joined share left a piece"
        assert {done for pieces, done in sizes} <= {0, *(pieces for pieces, done in sizes)}
        assert share(images, out, stage, 1, 2)[1] == 0, "a finished piece was done again"
    assert contents(out / "shards") == contents(at_once / "shards")
    assert json.loads((out / "summary.json").read_text())["counts"]["samples"] == 7
    # Other settings before a stage make what it reads stale, also where its own settings are the same.
    with pytest.raises(UserError, match="needs piece 0 of stage propose"):
        share(images, out, "embed", 0, 3, max_area=0.5)
    with pytest.raises(UserError, match="needs piece 0 of stage"):
        share(images, out, "assign", 0, 3, clusters=3)


def test_a_share_that_reads_all_pieces_of_a_stage_looks_at_none_before_them(
    images: Path, at_once: Path, tmp_path: Path
) -> None:
    """Else whoever clusters or publishes a billion regions would hash what all stages have left."""
    out = shutil.copytree(at_once, tmp_path / "out")
    for path in out.glob("stages/*/*/candidates.jsonl"):
        path.write_bytes(b"x" * path.stat().st_size)
    for stage in ("cluster", "publish"):
        shutil.rmtree(out / "stages" / stage)
        assert share(images, out, stage, 0, 1) == (1, 1)
    assert contents(out / "shards") == contents(at_once / "shards")
    with pytest.raises(UserError, match="needs piece 0 of stage propose"):
        share(images, out, "embed", 0, 3)


def test_a_share_needs_a_stage_and_pieces_are_held_by_one_process(
    images: Path, at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--piece needs --stage"):
        share(images, at_once, "all", 0, 2)
    with folder_held(at_once, shared=True):
        assert share(images, at_once, "ocr", 0, 2)[1] == 0
        with pytest.raises(UserError, match=r"in use by a share of a run, process .* choose"):
            run(images, at_once, **FEW)
    with folder_held(at_once), pytest.raises(UserError, match="in use by process"):
        share(images, at_once, "ocr", 0, 2)
    monkeypatch.setattr("megaregion.curation.workers.PATIENCE", 0.3)
    stage = tmp_path / "stages" / "ocr"
    holder = (
        "import sys, time; from pathlib import Path; from megaregion.curation.workers import held\n"
        f"with held(Path({str(stage)!r}), 3, lambda: None): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, cwd=repository())
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with (
            pytest.raises(UserError, match=f"piece 3 of stage ocr is in use by process {process.pid} on "),
            held(stage, 3, lambda: None),
        ):
            pass
        with held(stage, 4, lambda: None):
            pass
    finally:
        process.kill()
        process.wait()
    with held(stage, 3, lambda: None):
        pass


def test_the_status_tells_done_running_failed_and_what_is_left(
    images: Path, at_once: Path, tmp_path: Path
) -> None:
    job = open_job(*_of(at_once))
    finished = table(read_progress(job, time.time()))
    assert [line.split()[-1] for line in finished.splitlines()[1:]] == ["done"] * finished.count("\n")
    out = tmp_path / "out"
    run(images, out, stage="list", **FEW)
    share(images, out, "propose", 0, 4)
    folder = out / "stages" / "propose"
    with pytest.raises(OSError, match="lost"), held(folder, 2, lambda: None):
        raise OSError("lost")
    dead = subprocess.Popen(["true"])
    dead.wait()
    with held(folder, 3, lambda: None) as tick:
        tick()
        while not (folder / ".notes" / "00003").exists():
            time.sleep(0.01)
        mine = (folder / ".notes" / "00003").read_text()
        (folder / ".notes" / "00001").write_text(
            mine.replace(f'"process": {_process(mine)}', f'"process": {dead.pid}')
        )
        [propose] = [p for p in read_progress(open_job(*_of(out)), time.time()) if p.stage == "propose"]
    assert (propose.pieces, propose.done, propose.running) == (4, 1, 1)
    assert "was killed after" in propose.failed[1]
    assert "OSError: lost (process" in propose.failed[2]
    assert propose.left is not None
    assert propose.left > 0
    text = table([propose])
    assert "failed: propose 2: OSError: lost" in text
    with pytest.raises(UserError, match="holds no run"):
        recorded_run(tmp_path)


def test_a_status_reads_a_manifest_once_and_notices_whatever_changes(
    at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(at_once, tmp_path / "out")
    opened: list[Path] = []

    def watched(path: Path | str) -> object:
        opened.append(Path(path))
        return read_json(path)

    monkeypatch.setattr("megaregion.curation.stages.stage.read_json", watched)
    monkeypatch.setattr("megaregion.curation.stages.stage.MANY", 3)

    def done() -> dict[str, int]:
        opened.clear()
        progress = read_progress(open_job(*_of(out)), time.time())
        return {each.stage: each.pieces - each.done for each in progress if each.done < each.pieces}

    def manifests() -> set[str]:
        return {path.parent.parent.name for path in opened if path.name == "manifest.json"}

    assert not done()
    assert manifests() == set(NAMES) - {"duplicates", "balance"}
    assert not done()
    assert manifests() == {"cluster", "tokenizer", "publish"}, "few are not worth a file"
    folder = out / "stages"
    (folder / "ocr" / "00001" / "words.jsonl").write_bytes(b"")
    (folder / "embed" / "00002" / "features.npy").unlink()
    changed = folder / "propose" / "00003" / "manifest.json"
    changed.write_text(changed.read_text().replace('"images": "', '"images": "0'))
    (folder / "assign" / ".finished.json").write_text("{")
    assert done() == {"ocr": 1, "embed": 1, "propose": 1}
    assert manifests() == {"propose", "assign", "cluster", "tokenizer", "publish"}


def test_a_job_begins_without_torch_which_few_stages_need() -> None:
    code = "import sys, megaregion.curation.pipeline; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository(), capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_every_stage_waits_for_what_it_reads() -> None:
    lines = [line.split() for line in job_lines(settings_from(FEW))]
    order = ["list", *(name for name, _, _ in lines)]
    for name, kind, earlier in lines:
        assert kind in ("one", "many")
        assert all(order.index(other) < order.index(name) for other in earlier.split(","))
    assert ["propose", "many", "list"] in lines
    joined = job_lines(settings_from(FEW), joined=True)
    assert joined[:3] == ["propose+ocr+embed many list", *joined[1:3]]
    assert joined[1:3] == ["cluster one propose+ocr+embed", "assign many propose+ocr+embed,cluster"]
    assert len(joined) == len(lines) - 2


def test_job_arrays_on_slurm_give_the_dataset_of_one_run(
    drill: Drill, images: Path, at_once: Path, tmp_path: Path
) -> None:
    command = [repository() / "slurm" / "curate.sh", "--images", images, "--out", tmp_path / "out", *FLAGS]
    environment = {
        **drill.cluster.environment, "MEGAREGION_HOME": str(repository()), "MEGAREGION_SHARES": "2",
        "MEGAREGION_PYTHON": sys.executable, "MEGAREGION_LOGS": str(tmp_path), "MEGAREGION_DECODE_ONCE": "1",
        "MEGAREGION_CURATE_cluster": "--nodes=2 --ntasks=2",
        "PYTHONPATH": str(repository()),
    }  # fmt: skip

    def submit(*changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, command), *changes], env=environment, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip

    refused = submit("--clusters", "0")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--clusters must lie in [1, 1e9]" in refused.stderr
    # A loaded machine's node may refuse a job; whoever submits again goes on where the first jobs stopped.
    for _ in range(2):
        submitted = submit()
        assert submitted.returncode == 0, submitted.stderr
        jobs = dict(line.split() for line in submitted.stdout.splitlines())
        assert list(jobs) == ["list", *(line.split()[0] for line in job_lines(settings_from(FEW), True))]
        last = drill.cluster.finish(list(jobs.values())[-1], 300)
        if last == "COMPLETED":
            break
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert last == "COMPLETED", logs
    found, alone = (contents(out / "shards") for out in (tmp_path / "out", at_once))
    # Another number of ranks changes the last bits of the centers.
    for each in (found, alone):
        del each["dataset.json"]
    centers = [np.load(io.BytesIO(each.pop("centers.npy"))) for each in (found, alone)]
    assert np.abs(centers[0] - centers[1]).max() < 1e-6, logs
    assert found == alone, logs
    summaries = [json.loads((out / "summary.json").read_text()) for out in (tmp_path / "out", at_once)]
    assert summaries[0]["counts"] == summaries[1]["counts"]
    assert summaries[0]["bad"] == {"scene-8.jpg": "not an image"}


def _of(out: Path) -> tuple[Path, Path, CurationSettings]:
    images, settings = recorded_run(out)
    return images, out, settings


def _process(holder: str) -> str:
    return str(json.loads(holder)["process"])
