"""The quality report, the cap on large clusters, and the measures that both rest on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from curation_scenes import WORDS, run, scene, settings_from
from launch import tool

from benchmark.kmeans import gaussian_features
from megaregion.curation.report import nmi
from megaregion.curation.stages import balance
from megaregion.curation.stages.balance import keep_evenly
from megaregion.data.sample import parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError
from megaregion.schemas.curation import LATER

FEW = {"clusters": 4, "vocab": 384, "piece_images": 3, "samples_per_shard": 4, "crop_side": 96}


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten images, and the truth of eight of them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "images").mkdir()
    lines = []
    for number in range(10):
        scene(number).save(folder / "images" / f"s-{number}.jpg", quality=92)
        objects = [
            {"class": kind, "box": box}
            for kind, box in (("a", [17, 75, 72, 130]), ("b", [115, 95, 170, 150]))
        ]
        words = [{"text": WORDS[number // 2 % 4], "box": [20, 14, 95, 44]}] if number % 2 == 0 else []
        small = [{"text": "tiny", "box": [0, 0, 20, 8]}]
        record = {
            "key": f"s-{number}",
            "width": 192,
            "height": 192,
            "objects": objects,
            "words": words + small,
        }
        lines.append(json.dumps(record))
    (folder / "truth.jsonl").write_text("\n".join(lines[:8]) + "\n")
    run(folder / "images", folder / "out", **FEW)
    return folder


def report(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return tool("tools/curate.py", "report", "--out", folder / "out", *flags, warns=True)


def test_the_report_has_every_number_of_the_labels(curated: Path) -> None:
    done = report(curated, "--truth", str(curated))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads((curated / "out" / "report.json").read_text())
    summary, clusters, text, truth = (found[name] for name in ("summary", "clusters", "text", "truth"))
    assert clusters["regions"] == summary["counts"]["kept"]
    assert clusters["sizes"]["p0"] <= clusters["sizes"]["p50"] <= clusters["sizes"]["p100"]
    assert clusters["exact"] == 1.0
    assert 0 < clusters["distance"] < 2
    assert 1 <= clusters["effective"] <= 4
    assert 0 <= clusters["gini"] < 1
    assert 0 < clusters["stability"] <= 1
    assert 0 <= clusters["near_duplicates"] <= 1
    assert sum(text["confidence"].values()) == text["words"] == summary["counts"]["words found"]
    assert {name for name, _ in text["texts"]} == set(WORDS)
    assert sum(count for _, count in text["texts"]) == text["kept"] == 5
    assert (truth["images"], truth["objects"], truth["words"]) == (8, 16, 4)
    assert truth["recall"] >= 0.8
    assert truth["exact_words"] == 1.0
    for line in ("recall at IoU 0.5", "stability over two seeds", "most frequent texts", "background"):
        assert line in done.stdout


def test_a_report_needs_a_run_and_its_truth(curated: Path, tmp_path: Path) -> None:
    (tmp_path / "truth.jsonl").write_text(
        json.dumps({"key": "else", "width": 9, "height": 9, "objects": [], "words": []}) + "\n"
    )
    foreign = report(curated, "--truth", str(tmp_path))
    assert (foreign.returncode, foreign.stdout) == (2, "")
    assert "--truth holds none of the run's images" in foreign.stderr
    nothing = report(tmp_path)
    assert nothing.returncode == 2
    assert "holds no run of tools/curate.py" in nothing.stderr


def test_a_cap_keeps_exactly_so_many_regions_of_a_cluster_all_over_the_run(
    curated: Path, tmp_path: Path
) -> None:
    before = _labels(curated / "out" / "shards")
    sizes = np.bincount([label for image in before.values() for label in image], minlength=4)
    cap = int(sizes.max()) // 2
    summary = run(curated / "images", tmp_path / "out", **FEW, cluster_cap=cap)
    after = _labels(tmp_path / "out" / "shards")
    kept = np.bincount([label for image in after.values() for label in image], minlength=4)
    assert kept.tolist() == np.minimum(sizes, cap).tolist()
    assert summary.counts["dropped: over the cap"] == (sizes - kept).sum() > 0
    largest = int(sizes.argmax())
    touched = [
        key for key, image in before.items() if after.get(key, []).count(largest) < image.count(largest)
    ]
    assert touched != []
    assert {key for key in touched if key < "s-5"} not in (set(), set(touched)), "one end of the run lost all"


def test_what_is_left_out_adds_up_in_the_report_and_does_not_depend_on_the_pieces(
    curated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image lies there three times, with other bytes behind its end."""
    images = tmp_path / "images"
    images.mkdir()
    for file in (curated / "images").iterdir():
        (images / file.name).write_bytes(file.read_bytes())
    for number in (1, 2):
        (images / f"t-{number}.jpg").write_bytes((images / "s-3.jpg").read_bytes() + bytes(number))
    balanced = {**FEW, "near_duplicates": 0.995, "cluster_temperature": 0.3, "cluster_cap": 6}
    summary = run(images, tmp_path / "out", **balanced)
    done = tool("tools/curate.py", "report", "--out", tmp_path / "out", warns=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    told, clusters = found["balancing"], found["clusters"]
    assert told["before"] == clusters["regions"]
    assert told["before"] - told["after"] == sum(told["left_out"].values())
    assert told["after"] == sum(map(len, _labels(tmp_path / "out" / "shards").values()))
    assert {f"dropped: {why}": count for why, count in told["left_out"].items() if count} == {
        name: count for name, count in summary.counts.items() if name[9:] in told["left_out"]
    }
    not_packed = sum(summary.counts.get(f"dropped: {why}", 0) for why in LATER)
    assert summary.counts["kept"] - not_packed == summary.counts["object regions"] == told["after"]
    assert all(sum(counts) == 4 for counts in zip(*told["histogram"].values(), strict=True))
    assert told["left_out"]["near-duplicate"] >= 2
    assert any(kept.startswith("s-3 ") and "t-1 " in first for kept, first, _ in told["examples"])
    assert summary.counts["images near-duplicate"] >= 2
    for line in ("regions that are packed", "near-duplicate", "before > after"):
        assert line in done.stdout
    folder = tmp_path / "out" / "stages"
    whole = {path.name: path.read_bytes() for path in folder.glob("balance/00000/*.npy")}
    assert set(whole) == {"fates.npy", "starts.npy", "sizes.npy", "examples.npy"}
    assert len(list(folder.glob("duplicates/*/twins.npy"))) == 1
    monkeypatch.setattr(balance, "CLUSTERS", 1)
    monkeypatch.setattr("megaregion.curation.embeddings.rows_in", lambda memory, channels: 3)
    (folder / "balance" / "00000" / "manifest.json").unlink()
    for stage in ("duplicates", "balance"):
        run(images, tmp_path / "out", stage, **balanced)
    assert len(list(folder.glob("duplicates/*/twins.npy"))) == 4
    assert {path.name: path.read_bytes() for path in folder.glob("balance/00000/*.npy")} == whole
    assert not list(folder.glob("balance/.*near.npy"))


@pytest.mark.parametrize(("block", "tile"), [(1024, 2**16), (7, 3)])
def test_of_near_duplicates_the_first_stays_whatever_the_blocks(
    block: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "BLOCK", block)
    monkeypatch.setattr(balance, "TILE", tile)
    vectors = gaussian_features(300, 8, 40, 0.3)
    cosines, right = vectors @ vectors.T, np.full(300, -1)
    for row in range(300):
        near = np.flatnonzero((cosines[row, :row] >= 0.95) & (right[:row] < 0))
        right[row] = near[0] if len(near) else -1
    assert 100 < (right >= 0).sum() < 250
    assert np.array_equal(balance.find_twins(torch.from_numpy(vectors), 0.95), right)
    parts = [balance.find_twins(torch.from_numpy(part), 0.95) for part in np.split(vectors, [100])]
    both = balance.twins_within(torch.from_numpy(vectors), [100, 0, 200], 0.95)
    assert np.array_equal(both, [*parts[0], *np.where(parts[1] < 0, -1, parts[1] + 100)])


def test_a_temperature_draws_large_clusters_down_to_a_power_of_their_size() -> None:
    sizes = np.array([0, 1, 10, 10, 1000, 100_000])
    assert (balance.kept_shares(sizes, 1) == 1).all()
    assert np.allclose(sizes * balance.kept_shares(sizes, 0), [0, 1, 10, 10, 10, 10])
    assert np.allclose(sizes * balance.kept_shares(sizes, 0.5), [0, 1, 10, 10, 100, 1000])
    assert (balance.kept_shares(np.zeros(3, dtype=np.int64), 0.5) == 1).all()


def test_by_the_hierarchy_clusters_are_even_in_their_cell_and_cells_among_each_other(
    curated: Path, tmp_path: Path
) -> None:
    sizes, cell_of = np.array([10, 10, 15, 5, *[10] * 99, 900]), np.array([0, 0, 1, 1, *[2] * 100])
    kept = sizes * balance.nested_shares(sizes, cell_of, 0)
    assert np.allclose(np.bincount(cell_of, weights=kept), [20, 15, 20])
    assert np.allclose(kept[:4], [10, 10, 10, 5])
    assert np.allclose(kept[4:], 0.2)
    with pytest.raises(UserError, match="--balance-over cells needs --cluster-temperature T below 1"):
        settings_from({"balance_over": "cells"})
    out = Path(shutil.copytree(curated / "out", tmp_path / "out"))
    drawn = {**FEW, "first_level": 2, "cluster_temperature": 0.0}
    flat, nested = (
        run(curated / "images", out, **drawn, balance_over=over) for over in ("clusters", "cells")
    )
    assert 0 < nested.counts["object regions"] != flat.counts["object regions"] > 0


def test_keeping_evenly_does_not_depend_on_how_the_run_is_cut() -> None:
    rng = np.random.Generator(np.random.Philox(key=5))
    labels = rng.integers(-1, 6, 1000)
    sizes = np.bincount(labels[labels >= 0], minlength=7)
    caps = np.minimum(sizes, 100)
    whole = keep_evenly(labels, np.zeros_like(sizes), sizes, caps)
    assert np.bincount(labels[whole], minlength=7).tolist() == caps.tolist()
    seen = np.zeros_like(sizes)
    parts = [keep_evenly(part, seen, sizes, caps) for part in np.split(labels, [1, 1, 300, 999])]
    assert np.array_equal(np.concatenate(parts), whole)


def test_mutual_information_is_one_for_renamed_labels_and_zero_for_independent_ones() -> None:
    labels = np.repeat(np.arange(4), 50)
    assert nmi(labels, 7 - labels) == pytest.approx(1)
    assert nmi(labels, np.tile(np.arange(50), 4)) == pytest.approx(0, abs=1e-9)
    assert nmi(labels, labels // 2) == pytest.approx(2 / 3)
    assert nmi(labels, np.zeros_like(labels)) == pytest.approx(0)


@pytest.mark.parametrize(
    ("part", "flags", "goals"),
    [
        ("encoder", ["--scenes=3", "--width=64", "--repeats=1"], None),
        ("embed", ["--scenes=2", "--repeats=1", "--crop-side=64"], [0, 0]),
        ("ocr", ["--scenes=1"], [0, 0, 1.0]),
        pytest.param(
            "index", ["--megabytes=2", "--factor=2", "--folder=/tmp"], None, marks=pytest.mark.drill
        ),
        pytest.param("curation", ["--images=8", "--factor=2", "--clusters=4"], None, marks=pytest.mark.drill),
        pytest.param(
            "scale",
            ["--images=40", "--tar-images=10", "--piece-images=2", "--clusters=8", "--folder=/tmp"],
            None,
            marks=pytest.mark.drill,
        ),
    ],
)
def test_the_benchmarks_of_curation_run_at_any_size(
    part: str, flags: list[str], goals: list[float] | None, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    done = tool("tools/benchmark.py", part, *flags, f"--json={file}")
    assert done.returncode == 0, done.stderr
    cases = json.loads(file.read_text())["cases"]
    assert all(case["ours"] > 0 and case["peer"] > 0 for case in cases)
    assert goals is None or [case["goal"] for case in cases] == goals


def _labels(shards: Path) -> dict[str, list[int]]:
    dataset = ShardedDataset(shards)
    found = {}
    for index in range(len(dataset)):
        sample = dataset.read(index)
        regions = parse_sample(sample.record).regions
        found[sample.key] = [region.label for region in regions if region.label is not None]
    return found
