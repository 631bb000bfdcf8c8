"""The study in small: one claim from composed scenes to its verdict, by the same commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from launch import tool

import study

CONFIG = """
model: {image_size: 32, patch_size: 8, width: 16, depth: 2, heads: 2, mlp_width: 32, region_layers: 1}
data: {regions_per_image: 4, workers: 0}
head: {embedding_dim: 16, object: {loss: softmax, margin: 0.0, scale: 16, sample_rate: 1.0}}
optimizer: {warmup_steps: 1}
parallel: {zero_stage: 0}
train: {steps: 2, global_batch: 8, micro_batch: 8, precision: fp32}
"""
SMALL = "--only supervision --workers 1 --seeds 1 --train-scenes 30 --test-scenes 8 --curation=--clusters=4"


def test_a_study_ends_with_a_verdict_and_runs_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[str] = []

    def call(command: Iterable[object], log: Path | None = None) -> None:
        """The same commands, by processes that have imported torch already."""
        words = list(map(str, command))
        called.append(words[0])
        done = tool(*words)
        assert done.returncode == 0, done.stdout + done.stderr

    monkeypatch.setattr(study, "call", call)
    few = dataclasses.replace(study.LABELS["image-64"], flags=f"{study.GIVEN} --ocr none --clusters 3")
    monkeypatch.setitem(study.LABELS, "image-64", few)
    (tmp_path / "small.yaml").write_text(CONFIG)
    out = tmp_path / "study"
    words = ["study", "--out", str(out), "--config", str(tmp_path / "small.yaml"), *SMALL.split()]
    monkeypatch.setattr("sys.argv", words)
    study.main()
    assert called == ["tools/make_scenes.py", *["tools/curate.py"] * 4, *["tools/pretrain.py"] * 3]
    found = json.loads((out / "study.json").read_text())
    rows = found["tables"][0]["rows"]
    assert list(rows) == ["objects", "image, K = 256", "image, K = 64"]
    assert rows["objects"]["compute"]["mean"] == 1 > rows["image, K = 64"]["compute"]["mean"] > 0.8
    assert {claim["verdict"] for claim in found["claims"]} == {"undecided"}, "one seed decides nothing"
    given = json.loads((out / "image.json").read_text())
    assert {tuple(row["bbox"]) for row in given["annotations"]} == {(0, 0, 256, 256)}
    assert given["categories"] == [{"id": 1, "name": "region"}], "the truth's classes stay behind"
    page = (out / "study.md").read_text()
    assert "objects over image, K = 64" in page
    assert "Not run: regions, clusters" in page

    called.clear()
    study.main()
    assert "tools/pretrain.py" not in called
    assert (out / "study.md").read_text() == page
    assert "3 runs of 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("better", "than", "said"),
    [
        ((0.31, 0.30, 0.32), (0.20, 0.21, 0.20), "agrees"),
        ((0.20, 0.21, 0.20), (0.31, 0.30, 0.32), "disagrees"),
        ((0.31, 0.20, 0.30), (0.20, 0.31, 0.29), "undecided"),
        ((0.31, 0.30), (0.20, 0.21), "undecided"),
    ],
)
def test_a_trend_is_decided_by_the_interval_of_paired_differences(
    better: tuple[float, ...], than: tuple[float, ...], said: str
) -> None:
    assert study.verdict(better, than)[0] == said


def test_the_interval_of_three_values_is_students() -> None:
    found = study.interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - found.mean == pytest.approx(4.30265 / 3**0.5, rel=1e-4)


def test_arms_of_the_same_settings_share_their_runs(tmp_path: Path) -> None:
    config = Path(study.__file__).parents[1] / "configs" / "study.yaml"
    arms = {arm.name: arm for trend in study.TRENDS.values() for arm in trend.arms}
    alike = (
        "objects",
        "K = 256",
        "rho = 1.0",
        "softmax, m = 0.0",
        "2 layers",
        "shared",
        "class token",
        "box",
        "1 label",
    )
    folders = {study.Task(arms[name], 0, tmp_path, config, "", 1, None).folder for name in alike}
    assert len(folders) == 1
    others = {study.Task(arm, 0, tmp_path, config, "", 1, None).folder for arm in arms.values()}
    assert len(others) == len(arms) - len(alike) + 1


def test_trends_without_a_claim_leave_no_empty_table() -> None:
    assert study.lines_of([]) == ""


def test_every_arm_has_labels_and_settings_that_a_run_takes(tmp_path: Path) -> None:
    config = Path(study.__file__).parents[1] / "configs" / "study.yaml"
    for trend in study.TRENDS.values():
        names = [arm.name for arm in trend.arms]
        assert all({claim.better, claim.than} <= set(names) for claim in trend.claims)
        for arm in trend.arms:
            assert arm.labels in study.LABELS
            assert study.compute_of(study.Task(arm, 0, tmp_path, config, "", 1, None)) > 0
