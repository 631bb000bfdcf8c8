"""The stages of clusters: centers, labels, what is redone, old settings, and their benchmarks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curation_scenes import settings_from
from launch import Tool, free_port

from benchmark.kmeans import assign, gaussian_features, kmeans
from benchmark.part import Part
from benchmark.scenes import scene_features
from megaregion.command_line import Parser
from megaregion.curation.embeddings import unit
from megaregion.curation.inputs.find import find_images
from megaregion.curation.kmeans import Pass
from megaregion.curation.pipeline import Pipeline, record_run, recorded_run
from megaregion.curation.settings import CurationSettings
from megaregion.curation.stages.regions import FEATURES, Embed
from megaregion.curation.stages.stage import Job, Output, Store
from megaregion.errors import UserError
from megaregion.settings import read_file

IMAGES, PER_IMAGE, CHANNELS = 40, 30, 24
SETTINGS = {"clusters": 36, "piece_images": 10, "first_level": 5, "cluster_iterations": 8}


# The stages


def made_features() -> np.ndarray:
    """Embeddings of all images as embed leaves them: some without embedding, some broken."""
    found = gaussian_features(IMAGES * PER_IMAGE, CHANNELS, 36, 0.5).astype(np.float16)
    found[5] = 0
    found[7, 2] = np.nan
    found[611, 0] = np.inf
    return found


@contextmanager
def silent(stage: str, images: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


def without_images(change: Callable[..., None]) -> None:
    """Let embed read no piece before it."""
    change(Embed, "reads", ())
    change(Embed, "settings", lambda self: {})
    change(Embed, "prepare", lambda self: None)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed needs no images: it hands out made_features, piece by piece."""
    rows = 10 * PER_IMAGE

    def work(self: Embed, number: int, output: Output) -> None:
        with output.file(FEATURES) as file:
            np.save(file, made_features()[number * rows : (number + 1) * rows], allow_pickle=False)

    without_images(monkeypatch.setattr)
    monkeypatch.setattr(Embed, "work", work)


def run(out: Path, workers: int = 0, stop: str = "assign", **changes: Any) -> Pipeline:
    settings = settings_from(SETTINGS | changes)
    images = out.with_name(f"{out.name}-images")
    if not images.exists():
        images.mkdir()
        for number in range(IMAGES):
            (images / f"i{number:03d}.jpg").write_text(str(number))  # Nobody opens them.
    source = find_images(images, out / "stages", out, settings.image.piece_images)
    job = Job(settings, source, Store(out))
    pipeline = Pipeline(job, silent, workers)
    names = list(pipeline._stages)
    try:
        for name in names[names.index("embed") : names.index(stop) + 1]:
            pipeline.run(name)
    finally:
        pipeline.close()
    return pipeline


def written(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.npy")}


def manifests(out: Path) -> dict[str, int]:
    return {p.parent.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in out.rglob("manifest.json")}


def labels_of(out: Path) -> np.ndarray:
    return np.concatenate([np.load(p) for p in sorted(out.glob("stages/assign/*/labels.npy"))])


def exact_labels(out: Path, vectors: np.ndarray) -> np.ndarray:
    centers = np.load(out / "stages" / "cluster" / "00000" / "centers.npy")
    return (vectors.astype(np.float64) @ centers.T.astype(np.float64)).argmax(axis=1)


@pytest.mark.usefixtures("embedded")
def test_any_number_of_workers_and_any_kill_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, crew = tmp_path / "alone", tmp_path / "crew"
    run(alone)
    # Workers are other processes, in which embed still asks for images.
    run(crew, stop="embed")
    run(crew, workers=2)
    whole = written(alone)
    assert written(crew) == whole
    before = manifests(alone)
    (alone / "stages" / "cluster" / "00000" / "manifest.json").unlink()
    (alone / "stages" / "assign" / "00002" / "labels.npy").write_bytes(b"half")
    run(alone)
    assert written(alone) == whole
    redone = {name for name, when in manifests(alone).items() if before[name] != when}
    assert redone == {"stages/cluster/00000", "stages/assign/00002"}
    killed = tmp_path / "killed"
    kept = killed / "stages" / "cluster" / ".00000-passes.npz"

    def die(last: Pass, path: Path, key: str) -> None:
        save(last, path, key)
        numbers.append(last.number)
        if len(numbers) == 1:
            raise KeyboardInterrupt

    numbers, save = list[int](), Pass.save
    monkeypatch.setattr(Pass, "save", die)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert kept.exists()
    run(killed)
    assert numbers[:2] == [1, 2]
    assert written(killed) == whole
    assert not kept.exists()


@pytest.mark.usefixtures("embedded")
def test_every_region_with_an_embedding_gets_the_nearest_of_all_centers(tmp_path: Path) -> None:
    pipeline = run(tmp_path / "a")
    vectors = unit(made_features())
    usable = vectors.any(axis=1)
    assert (~usable).sum() == 3
    labels = labels_of(tmp_path / "a")
    assert (labels[~usable] == -1).all()
    assert np.array_equal(labels[usable], exact_labels(tmp_path / "a", vectors)[usable])
    [clustered] = next(manifests for name, manifests in pipeline.finished() if name == "cluster")
    assert clustered.counts["embeddings not finite"] == 2


@pytest.mark.usefixtures("embedded")
def test_a_region_gets_as_many_of_the_nearest_centers_as_are_wanted_in_their_order(tmp_path: Path) -> None:
    out, vectors = tmp_path / "a", unit(made_features())
    run(out)
    alone, usable = written(out), vectors.any(axis=1)
    centers = np.load(out / "stages" / "cluster" / "00000" / "centers.npy").astype(np.float64)
    order = np.argsort(-(vectors.astype(np.float64) @ centers.T), axis=1, kind="stable")
    for wanted in (4, 99):
        run(out, labels_per_region=wanted)
        assert {name: content for name, content in written(out).items() if "others" not in name} == alone
        others = np.concatenate([np.load(p) for p in sorted(out.glob("stages/assign/*/others.npy"))])
        assert np.array_equal(others[usable], order[usable, 1:wanted])
        assert (others[~usable] == -1).all()
    run(out)
    assert written(out) == alone


@pytest.mark.usefixtures("embedded")
def test_no_more_rows_than_the_memory_setting_allows_are_worked_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(rows: Any) -> Any:
        seen.append(len(rows))
        return unit(rows)

    for module in ("embeddings", "kmeans"):
        monkeypatch.setattr(f"megaregion.curation.{module}.unit", watched)
    monkeypatch.setattr("megaregion.curation.embeddings.rows_in", lambda memory, channels: 50 * memory)
    # The sample of the first level is bounded by the number of cells.
    monkeypatch.setattr("megaregion.curation.kmeans.CELL_SAMPLE", 5)
    run(tmp_path / "a", chunk_memory=1)
    assert max(seen) == 50
    assert sum(seen) > 3 * IMAGES * PER_IMAGE


@pytest.mark.usefixtures("embedded")
def test_more_centers_than_regions_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--clusters must be at most the .* use fewer clusters"):
        run(tmp_path, clusters=IMAGES * PER_IMAGE + 1)
    assert not list(tmp_path.glob("stages/cluster/*/centers.npy"))


@pytest.mark.usefixtures("embedded")
def test_two_ranks_of_torchrun_do_the_stage_together_and_give_the_labels_of_one(tmp_path: Path) -> None:
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    run(alone)
    run(ranks, stop="embed")
    images = tmp_path / "ranks-images"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    # Embed asks for no image there either.
    start = (
        "import runpy, sys; from test_clusters import without_images; without_images(setattr);"
        f"sys.argv = ['curate.py', '--images', {str(images)!r}, '--out', {str(ranks)!r}, *{flags!r}];"
        "sys.argv += ['--stage', 'cluster'];"
        "runpy.run_path('tools/curate.py', run_name='__main__')"
    )
    port, processes = str(free_port()), []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*sys.path, "tests"]),
        }  # fmt: skip
        processes.append(Tool("-c", start, environment=environment))
    done = [process.wait(timeout=120) for process in processes]
    assert [rank.returncode for rank in done] == [0, 0], done
    assert "cluster 0 of 1: pieces 0 to 0, 1 done now" in done[0].stdout
    run(ranks)
    assert np.array_equal(labels_of(ranks), labels_of(alone))
    one, two = (np.load(out / "stages" / "cluster" / "00000" / "centers.npy") for out in (alone, ranks))
    assert np.abs(one - two).max() < 1e-6


@pytest.mark.usefixtures("embedded")
def test_a_folder_of_the_cells_before_is_done_again_and_never_mixed(tmp_path: Path) -> None:
    run(tmp_path / "new")
    out = tmp_path / "old"
    run(out)
    manifest = out / "stages" / "cluster" / "00000" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "key": "of version 2", "recipes": {}}))
    np.save(out / "stages" / "cluster" / "00000" / "cells.npy", np.zeros(3))
    run(out)
    assert written(out) == written(tmp_path / "new")
    (out / "run.json").write_text(json.dumps({"images": "x", "settings": {"cluster": {"refine_passes": 10}}}))
    with pytest.raises(
        UserError, match=r"run.json: cluster.refine_passes is no setting any more: .*, or curate again"
    ):
        recorded_run(out)
    record_run(out, tmp_path, settings_from(SETTINGS))
    assert recorded_run(out)[1].cluster.clusters == 36


@pytest.mark.parametrize("name", ["cluster_method", "refine_passes", "assign_probes"])
def test_a_setting_that_is_gone_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    flag = name.replace("_", "-")
    with pytest.raises(UserError, match=f"^{name} is no setting any more: .*; leave it out$"):
        settings_from({name: 3})
    parser = Parser()
    parser.add_settings(CurationSettings(), flat=True)
    with pytest.raises(UserError, match=f"^{flag} is no setting any more: .*; leave it out$"):
        parser.parse_args([f"--{flag}", "3"])
    (tmp_path / "a.yaml").write_text(f"cluster:\n  {name}: 3\n")
    with pytest.raises(UserError, match=rf"a.yaml: cluster\.{name} is no setting any more"):
        read_file(CurationSettings(), tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"cluster_iterations": 0}, r"--cluster-iterations must lie in \[1, 10000\]"),
        ({"clusters": 10, "first_level": 11}, "--first-level must be at most --clusters 10"),
        ({"chunk_memory": 0}, r"--chunk-memory must lie in \[1, 1e6\], got 0"),
    ],
)
def test_a_setting_of_the_clusters_that_cannot_be_is_refused(change: dict[str, Any], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        settings_from(change)


# The benchmarks


@pytest.mark.parametrize(("part", "cases"), [(kmeans, 4), (assign, 3)])
def test_the_benchmarks_run_at_any_size_and_say_what_they_need(
    part: Part, cases: int, tmp_path: Path
) -> None:
    parser = Parser()
    part.add_flags(parser)
    small = ["--case=mixture", "--vectors=2000", "--components=64"]
    report = part.measure(parser.parse_args(small), torch.device("cpu"))
    report.write_json(tmp_path / "out.json")
    assert len(json.loads((tmp_path / "out.json").read_text())["cases"]) == cases
    with pytest.raises(UserError, match=r"--components must lie in \[16, 1e9\], got 9"):
        parser.parse_args(["--components=9"])
    with pytest.raises(UserError, match="--components must be at most --vectors 20, got 64"):
        part.measure(parser.parse_args(["--components=64", "--vectors=20"]), torch.device("cpu"))


def test_embeddings_of_scenes_are_made_once_and_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lite0.npy"
    made = scene_features(path, 20)
    assert made.shape == (20, 1280)
    assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    changed = path.stat().st_mtime_ns
    assert np.array_equal(scene_features(path, 10), made[:10])
    assert path.stat().st_mtime_ns == changed
    with pytest.raises(UserError, match=r"has shape \(20, 1280\), 30 rows are needed"):
        scene_features(path, 30)
    path.write_text("no array")
    with pytest.raises(UserError, match=r"is no \.npy file"):
        scene_features(path, 10)
