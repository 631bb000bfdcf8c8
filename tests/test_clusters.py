"""Clusters at scale: hierarchical k-means, its stages, labels by probing, and what they would cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import benchmark.assign
import benchmark.kmeans
from benchmark.kmeans import gaussian_features
from benchmark.scenes import scene_features
from megaregion.command_line import Parser
from megaregion.curation.inputs.find import find_images
from megaregion.curation.kmeans import cost, features
from megaregion.curation.kmeans.features import Vectors, evenly
from megaregion.curation.kmeans.hierarchy import (
    Plan,
    climb,
    cluster,
    find_neighbours,
    gather,
    refine,
    share_out,
    split_large,
)
from megaregion.curation.kmeans.kmeans import find_centers, nearest, nearest_centers
from megaregion.curation.kmeans.probing import build_probing
from megaregion.curation.runner.pipeline import Pipeline
from megaregion.curation.settings import settings_from
from megaregion.curation.stages.embed import FEATURES, Embed
from megaregion.curation.stages.stage import Job
from megaregion.curation.stages.store import Output, Store
from megaregion.curation.types import unit
from megaregion.errors import UserError

IMAGES, PER_IMAGE, CHANNELS = 40, 30, 24
SETTINGS = {
    "clusters": 36, "piece_images": 10, "cluster_method": "cells", "first_level": 5, "refine_passes": 2,
    "cluster_iterations": 8,
}  # fmt: skip


def inertia(vectors: Vectors, centers: Vectors) -> float:
    return float((2 - 2 * nearest_centers(vectors, centers)[1]).sum())


# The steps


@pytest.mark.parametrize(
    ("spread", "limit", "most"), [(0.5, 1.05, 0), (1.0, 1.07, 0), (0.5, 1.03, 400), (1.0, 1.03, 400)]
)
def test_cells_with_refinement_come_near_flat_k_means_where_cells_alone_do_not(
    spread: float, limit: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaregion.curation.kmeans.hierarchy.WHOLE_CENTERS", most)
    vectors = gaussian_features(4000, 64, 400, spread)
    flat = inertia(vectors, find_centers(vectors, 400, 25, 0).centers)
    refined = cluster(vectors, Plan.of(400, 10, 0, 10), threads=1)
    alone = cluster(vectors, Plan.of(400, 10, 0, 0), threads=1)
    assert inertia(vectors, refined.centers) < limit * flat
    assert inertia(vectors, alone.centers) > 1.1 * flat
    assert (np.diff(refined.cosines) > -1e-6).all()
    assert np.allclose(np.linalg.norm(refined.centers, axis=1), 1, atol=1e-5)


def test_centers_depend_on_the_seed_but_not_on_the_number_of_threads() -> None:
    vectors = gaussian_features(1500, 32, 100, 0.7)
    one, three = (cluster(vectors, Plan.of(100, 8, 3, 3), threads).centers for threads in (1, 3))
    assert np.array_equal(one, three)
    assert not np.array_equal(one, cluster(vectors, Plan.of(100, 8, 4, 3), 1).centers)


def test_centers_are_shared_out_by_size_and_never_beyond_it() -> None:
    assert share_out(np.array([100, 50, 50, 0]), 8).tolist() == [4, 2, 2, 0]
    assert share_out(np.array([1, 1, 998]), 10).tolist() == [0, 0, 10]
    assert share_out(np.array([3, 2, 0, 7]), 12).tolist() == [3, 2, 0, 7]
    sizes = np.random.Generator(np.random.Philox(key=1)).integers(0, 90, 300)
    shares = share_out(sizes, 1000)
    assert shares.sum() == 1000
    assert (shares <= sizes).all()
    assert (np.abs(shares - sizes * 1000 / sizes.sum()) < 1).all()
    with pytest.raises(UserError, match="--clusters must be at most the 5 regions"):
        share_out(np.array([3, 2]), 6)


def test_empty_centers_take_half_of_the_largest_clusters() -> None:
    centers = unit(np.eye(5, 8, dtype=np.float32) + 0.01)
    vectors = unit(np.repeat(centers[:2], [30, 10], axis=0) + 0.001)
    moved = refine([vectors], np.repeat([0, 1], [30, 10]).astype(np.int32), centers, np.arange(5)[:, None], 1)
    outcome = gather(centers, [moved.sums])
    assert outcome.split == 2
    near = outcome.centers @ unit(vectors[[0, -1]]).T
    assert (near[[0, 2], 0] > 0.999).all()
    assert (near[[1, 3], 1] > 0.999).all()
    assert not np.array_equal(outcome.centers[0], outcome.centers[2])
    # One vector cannot be halved.
    assert split_large(centers.copy(), np.array([1, 1, 1, 0, 0])) == 0


def test_a_pass_in_small_chunks_and_pieces_is_the_pass_at_once() -> None:
    vectors = gaussian_features(900, 16, 60, 0.6)
    centers = find_centers(vectors, 60, 2, 0).centers
    near = find_neighbours(centers, centers, 6)
    labels = nearest_centers(vectors, centers)[0].astype(np.int32)
    at_once = refine([vectors], labels, centers, near, 6)
    chunked = refine(np.split(vectors, 9), labels, centers, near, 6)
    assert np.array_equal(at_once.labels, chunked.labels)
    assert np.allclose(at_once.sums.sums, chunked.sums.sums, atol=1e-4)
    halves = [refine([part], own, centers, near, 6).sums
              for part, own in zip(np.split(vectors, 2), np.split(labels, 2), strict=True)]  # fmt: skip
    assert np.allclose(gather(centers, halves).centers, gather(centers, [at_once.sums]).centers, atol=1e-5)
    assert refine([], labels[:0], centers, near, 6).labels.shape == (0,)


def test_a_vector_climbs_to_the_best_of_the_centers_around_its_own() -> None:
    vectors = gaussian_features(200, 16, 40, 0.6)
    centers = find_centers(vectors, 40, 2, 0).centers
    everything = np.tile(np.arange(40, dtype=np.int32), (40, 1))
    labels, cosines = climb(vectors, np.zeros(200, np.int32), centers, everything, 8)
    exact = nearest_centers(vectors, centers)
    assert np.array_equal(labels, exact[0])
    assert np.allclose(cosines, exact[1], atol=1e-6)


def test_evenly_spaced_rows_are_different_and_reach_across() -> None:
    assert evenly(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert evenly(3, 5).tolist() == [0, 1, 2]
    assert evenly(0, 5).tolist() == []


# Labels


@pytest.mark.parametrize("tile", [(3, 5), (1024, 4096)])
def test_nearest_centers_are_those_of_all_scores_whatever_the_tiles(
    tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaregion.curation.kmeans.kmeans.TILE", tile)
    rng = np.random.default_rng(0)
    vectors, centers = (unit(rng.standard_normal((n, 16), dtype=np.float32)) for n in (40, 23))
    scores = vectors @ centers.T
    for count in (1, 7, 23):
        labels, cosines = nearest(vectors, centers, count)
        assert np.allclose(cosines, -np.sort(-scores, axis=1)[:, :count], atol=1e-6)
        assert np.allclose(np.take_along_axis(scores, labels, axis=1), cosines, atol=1e-6)
        assert all(len(set(row)) == count for row in labels.tolist())


@pytest.mark.parametrize("tile", [(3, 5), (1024, 4096)])
def test_of_equally_near_centers_the_first_is_chosen(
    tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaregion.curation.kmeans.kmeans.TILE", tile)
    # Cosines of such unit vectors are multiples of 1/16, exact in whatever order one adds: many are equal.
    vectors, centers = (
        np.random.default_rng(n).choice([-0.25, 0.25], (n, 16)).astype(np.float32) for n in (40, 23)
    )
    cosines = vectors @ centers.T
    best = cosines.max(axis=1, keepdims=True)
    assert ((cosines == best).sum(axis=1) > 1).any(), "some vectors have several nearest centers"
    assert np.array_equal(nearest(vectors, centers, 1)[0], (cosines == best).argmax(axis=1)[:, None])


def test_probing_all_cells_is_exact_and_a_few_nearly_so() -> None:
    vectors = gaussian_features(4000, 32, 900, 0.5)
    probing = build_probing(find_centers(vectors, 900, 4, 0).centers, seed=0)
    exact = nearest_centers(vectors, probing.centers)
    for probes in (0, len(probing.cells), 10**6):
        assert all(np.array_equal(a, b) for a, b in zip(probing.find(vectors, probes), exact, strict=True))
    labels, cosines = probing.find(vectors, 8)
    assert (labels == exact[0]).mean() > 0.99
    assert np.allclose(cosines, np.einsum("nc,nc->n", vectors, probing.centers[labels]), atol=1e-5)
    assert probing.find(vectors[:0], 8)[0].shape == (0,)


def test_probing_keeps_every_center_once() -> None:
    centers = unit(np.random.Generator(np.random.Philox(key=2)).normal(size=(300, 8)).astype(np.float32))
    probing = build_probing(centers, seed=0, threads=2)
    assert sorted(map(tuple, probing.centers.tolist())) == sorted(map(tuple, centers.tolist()))
    assert probing.first[0] == 0
    assert probing.first[-1] == 300
    assert (np.diff(probing.first) >= 0).all()


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


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed needs no images: it hands out made_features, piece by piece."""
    rows = 10 * PER_IMAGE

    def work(self: Embed, number: int, output: Output) -> None:
        with output.file(FEATURES) as file:
            np.save(file, made_features()[number * rows : (number + 1) * rows], allow_pickle=False)

    monkeypatch.setattr(Embed, "needs", lambda self, number: [])
    monkeypatch.setattr(Embed, "settings", lambda self: {})
    monkeypatch.setattr(Embed, "prepare", lambda self: None)
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


@pytest.mark.usefixtures("embedded")
def test_any_number_of_workers_and_any_kill_give_the_same_bytes(tmp_path: Path) -> None:
    alone, crew = tmp_path / "alone", tmp_path / "crew"
    run(alone)
    # Workers are other processes, in which embed still asks for images.
    run(crew, stop="embed")
    run(crew, workers=2)
    whole = written(alone)
    assert written(crew) == whole
    assert {name.split("/")[1] for name in whole} >= {"coarse", "route", "split", "gather-2", "refine-2"}
    before = manifests(alone)
    for name in ("split/00003", "refine-1/00001", "gather-2/00000"):
        (alone / "stages" / name / "manifest.json").unlink()
    (alone / "stages" / "route" / "00002" / "vectors.npy").write_bytes(b"half")
    run(alone)
    assert written(alone) == whole
    redone = {name for name, when in manifests(alone).items() if before[name] != when}
    assert redone == {
        f"stages/{n}" for n in ("split/00003", "refine-1/00001", "gather-2/00000", "route/00002")
    }


@pytest.mark.usefixtures("embedded")
def test_the_stages_find_centers_as_good_as_flat_ones_and_label_all_that_has_an_embedding(
    tmp_path: Path,
) -> None:
    pipeline = run(tmp_path / "cells", refine_passes=4)
    run(tmp_path / "flat", cluster_method="flat")
    vectors = features.to_unit(made_features())
    usable = vectors.any(axis=1)
    assert (~usable).sum() == 3
    centers, flat = (
        np.load(tmp_path / kind / "stages" / "cluster" / "00000" / "centers.npy")
        for kind in ("cells", "flat")
    )
    assert centers.shape == flat.shape == (36, CHANNELS)
    assert inertia(vectors[usable], centers) < 1.1 * inertia(vectors[usable], flat)
    for kind, used in (("cells", centers), ("flat", flat)):
        labels = labels_of(tmp_path / kind)
        assert (labels[~usable] == -1).all()
        assert np.array_equal(labels[usable], nearest_centers(vectors[usable], used)[0])
        assert not list((tmp_path / "flat" / "stages").glob("split/*"))
    routed = next(manifests for name, manifests in pipeline.finished() if name == "route")
    assert sum(manifest.counts.get("embeddings not finite", 0) for manifest in routed) == 2


@pytest.mark.usefixtures("embedded")
def test_no_more_rows_than_the_memory_setting_allows_are_worked_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = features.to_unit

    def watched(rows: Any) -> Vectors:
        seen.append(len(rows))
        return real(rows)

    def few(memory: int, channels: int) -> int:
        return 50 * memory

    for module in ("cells", "assign"):
        monkeypatch.setattr(f"megaregion.curation.stages.{module}.to_unit", watched)
    monkeypatch.setattr(features, "to_unit", watched)
    monkeypatch.setattr("megaregion.curation.stages.cells.rows_in", few)
    monkeypatch.setattr("megaregion.curation.stages.assign.rows_in", few)
    # The sample that coarse takes is bounded by the number of cells.
    run(tmp_path / "a", stop="coarse", chunk_memory=1)
    seen.clear()
    run(tmp_path / "a", chunk_memory=1)
    assert max(seen) == 50
    assert sum(seen) > 4 * IMAGES * PER_IMAGE


@pytest.mark.usefixtures("embedded")
def test_very_many_centers_are_labelled_by_probing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaregion.curation.stages.cluster.ALL", 30)
    run(tmp_path, assign_probes=4)
    few = labels_of(tmp_path)
    run(tmp_path, assign_probes=0)
    assert (few == labels_of(tmp_path)).mean() > 0.98
    centers = np.load(tmp_path / "stages" / "cluster" / "00000" / "centers.npy")
    vectors = features.to_unit(made_features())
    assert np.array_equal(labels_of(tmp_path)[10:20], nearest_centers(vectors[10:20], centers)[0])


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("method", ["flat", "cells"])
def test_more_centers_than_regions_are_refused_before_anything_is_written(
    tmp_path: Path, method: str
) -> None:
    with pytest.raises(UserError, match=r"--clusters must be at most the .* use fewer clusters"):
        run(tmp_path, clusters=IMAGES * PER_IMAGE + 1, cluster_method=method, first_level=4)
    assert not list(tmp_path.glob("stages/cluster/*/centers.npy"))


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"refine_passes": 13}, r"--refine-passes must lie in \[0, 12\]"),
        ({"clusters": 10, "first_level": 11}, "--first-level must be at most --clusters 10"),
        ({"assign_probes": -1}, r"--assign-probes must lie in \[0, 1e9\], got -1"),
        ({"chunk_memory": 0}, r"--chunk-memory must lie in \[1, 1e6\], got 0"),
    ],
)
def test_a_setting_of_the_clusters_that_cannot_be_is_refused(change: dict[str, Any], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        settings_from(change)


def test_chunks_run_on_over_the_ends_of_files() -> None:
    parts = [np.eye(n, 4, dtype=np.float16) for n in (3, 0, 4, 1)]
    found = list(features.chunks(parts, 3))
    assert [len(chunk) for chunk in found] == [3, 3, 2]
    assert np.array_equal(np.concatenate(found), np.concatenate(parts).astype(np.float32))
    assert list(features.chunks([], 3)) == []


# What it costs


def test_the_fit_finds_the_speeds_that_runs_were_made_with() -> None:
    runs = []
    for count, clusters in ((10_000, 500), (50_000, 2_000), (200_000, 20_000)):
        work = cost.work_of(count, 128, Plan.of(clusters, 10, 0, 8), 16)
        seconds = sum((w.products + w.lone_products) / 50e9 + w.elements * 2e-9 for w in work)
        runs.append((work, seconds))
    found = cost.fit(runs, threads=2)
    assert found.rate == pytest.approx(50e9, rel=1e-6)
    assert found.handling == pytest.approx(2e-9, rel=1e-6)
    assert found.error < 1e-6


def test_the_projection_counts_disk_and_grows_with_the_regions() -> None:
    plan, fitted = Plan.of(1_000_000, 20, 0, 10), cost.Fit(50e9, 2e-9, 2, 0.0)
    small, large = (
        cost.project(cost.work_of(count, 768, plan, 16), fitted, 100e9, cost.Fleet())
        for count in (1_000_000_000, 2_000_000_000)
    )
    assert large["route"] == pytest.approx(2 * small["route"])
    # What depends on the centers alone does not grow.
    assert small["10 passes"] < large["10 passes"] < 2 * small["10 passes"]
    slow = cost.project(cost.work_of(2_000_000_000, 768, plan, 16), fitted, 100e9, cost.Fleet(disk=1e9))
    assert sum(slow.values()) > 5 * sum(large.values())


@pytest.mark.parametrize(("part", "cases"), [(benchmark.kmeans, 6), (benchmark.assign, 5)])
def test_the_benchmarks_run_at_any_size_and_say_what_they_need(
    part: ModuleType, cases: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser()
    part.add_arguments(parser)
    small = ["--case=mixture", "--vectors=2000", "--components=64", "--passes=2"]
    report = part.measure(parser.parse_args(small), torch.device("cpu"))
    report.write_json(tmp_path / "out.json")
    assert len(json.loads((tmp_path / "out.json").read_text())["cases"]) == cases
    assert ("modelled: coarse" in capsys.readouterr().out) == (part is benchmark.kmeans)
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
