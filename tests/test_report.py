"""Pages: the report of a run, its charts, and that nothing from outside becomes a part of the page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pages import Page, open_in_browser
from toy_scenes import write_run, write_scenes, write_shards

from megaregion.data.info import read_info
from megaregion.evaluation.encoders import CropEncoder, centred_pixels, raw_pixels
from megaregion.evaluation.network import open_run
from megaregion.evaluation.page import (
    COLUMNS,
    HEIGHT,
    WIDTH,
    Curve,
    History,
    Line,
    line_chart,
    nice_ticks,
    running_mean,
    thinned,
)  # fmt: skip
from megaregion.evaluation.pictures import Visuals, visualise
from megaregion.evaluation.report import curation_card, write_report
from megaregion.evaluation.study import Study, StudyConfig, evaluate

HOSTILE = "\"'><script>"
"""Ends a quoted value and a tag, and begins what must never run; a file's name may hold it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    dataset = write_shards(root / "shards", write_scenes(root / "scenes"))
    write_run(root / "run", dataset, read_info(dataset).text_classes)
    looks = [{"step": s, "region/knn": s / 50, "ocr/head_recall": s / 90} for s in (10, 20)]
    (root / "run" / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in looks))
    return root


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    config = StudyConfig(folder / "scenes", folder / "shards", seeds=2)
    others = [CropEncoder("curation", centred_pixels), CropEncoder("theirs", raw_pixels)]
    return evaluate(open_run(folder / "run"), config, others)


@pytest.fixture(scope="module")
def visuals(study: Study) -> Visuals:
    return visualise(study)


@pytest.fixture(scope="module")
def report(folder: Path, study: Study, visuals: Visuals) -> Path:
    write_report(study, visuals, folder / "run", folder / "report.html")
    return folder / "report.html"


def test_measures_that_the_scenes_do_not_allow_are_named(study: Study) -> None:
    assert not study.missing
    fewer = replace(study, tables=tuple(table for table in study.tables if table.key != "ocr"))
    assert fewer.missing == ["ocr"]


# ---- the page --------------------------------------------------------------------------------------


def test_the_page_is_whole_and_fetches_nothing(report: Path) -> None:
    page = Page(report)
    assert page.fetched
    assert all(place.startswith("data:") for place in page.fetched)
    assert "script" not in page.tags
    for heading in (
        "Beside honest baselines", "Every measure", "Naming regions", "What it sees", "Where a region looks",
        "Confusion of clusters", "How it learned", "While training", "Nearest neighbours",
        "What it reads", "Class by class", "The scenes", "All settings",
    ):  # fmt: skip
        assert heading in page.text
    assert not re.search(r"\$|\{\{|\{%|\{#", page.text), "a template's own signs"


def test_the_page_opens_in_a_browser_without_a_complaint(report: Path) -> None:
    assert "Nearest neighbours" in open_in_browser(report)


def test_samples_that_cannot_be_read_are_told(
    study: Study, visuals: Visuals, report: Path, tmp_path: Path
) -> None:
    assert "cannot be read" not in Page(report).text
    assert study.vocabulary is not None
    assert visuals.confusion is not None
    damaged = replace(study, vocabulary=replace(study.vocabulary, unreadable=3))
    confused = replace(visuals, confusion=replace(visuals.confusion, unreadable=2))
    write_report(damaged, confused, tmp_path / "none", tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    assert "2 of the samples that were drawn cannot be read" in text
    assert "3 samples of the training shards cannot be read" in text


def test_every_encoder_is_drawn_in_a_colour_that_the_page_knows(report: Path) -> None:
    page = report.read_text()
    dots = set(re.findall(r'class="dot ([^"]*)"', page))
    assert dots == {"trained", "untrained", "pixels", "curation", "other"}
    assert all(f".{style} {{ --tint:" in page for style in dots)


def test_names_words_keys_settings_and_paths_from_outside_never_become_tags(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes")
    dataset = write_shards(tmp_path / HOSTILE / "shards", scenes)
    for truth in scenes.glob("*/truth.jsonl"):
        lines = [json.loads(line) for line in truth.read_text().splitlines()]
        for line in lines:
            image = truth.parent / "images" / f"{line['key']}.jpg"
            line["key"] = f"key{HOSTILE}{line['key']}"
            image.rename(image.with_name(f"{line['key']}.jpg"))
            for thing in line["objects"]:
                thing["class"] = f"class{HOSTILE}{thing['class']}"
            for word in line["words"]:
                word["text"] = f"word{HOSTILE}{word['text']}"
        truth.write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"kept": 3, f"dropped: reason{HOSTILE}": 2}
    (tmp_path / HOSTILE / "summary.json").write_text(json.dumps({"counts": counts}))
    run = open_run(_run(tmp_path / "run", dataset))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, name=f"run{HOSTILE}"))
    other = CropEncoder(f"encoder{HOSTILE}", raw_pixels)
    study = evaluate(run, StudyConfig(scenes, dataset, seeds=1, measures=("region",)), [other])
    table = study.tables[0]
    columns = tuple(dataclasses.replace(column, title=f"column{HOSTILE}") for column in table.columns)
    texts = {name: f"{name}{HOSTILE}" for name in ("title", "told", "chance_is")}
    table = dataclasses.replace(table, columns=columns, notes={"trained": f"note{HOSTILE}"}, **texts)
    study = dataclasses.replace(study, tables=(table,), vocabulary=_Spells())
    write_report(study, visualise(study), tmp_path / "none", tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags
    for what in ("run", "key", "class", "word", "piece", "encoder", "reason", "column", "note", *texts):
        assert f"{what}{HOSTILE}" in page.text + " ".join(page.values), what
    assert "No step was logged." in page.text


class _Spells:
    """A vocabulary whose tokens are spelled as an attacker would."""

    unreadable = 3

    def pieces(self, tokens: tuple[int, ...]) -> list[str]:
        return [f"piece{HOSTILE}" for _ in tokens]


def _run(folder: Path, dataset: Path) -> Path:
    write_run(folder, dataset, read_info(dataset).text_classes)
    return folder


def test_the_page_shows_curations_summary_where_there_is_one(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    assert curation_card(shards) == ""
    counts = {"kept": 30, "dropped: too small": 10, "dropped: <odd>": 60, "text regions": 5}
    sizes = {"clusters": 3, "smallest": 1, "median": 9.5, "largest": 20, "empty": 0}
    (tmp_path / "summary.json").write_text(json.dumps({"counts": counts, "clusters": sizes}))
    card = curation_card(shards)
    assert "Object proposals</b> 100" in card
    assert "width:30.00%" in card
    assert card.index("&lt;odd&gt;") < card.index("too small")
    assert "9.5 in the median" in card
    (tmp_path / "summary.json").write_text("[")
    assert curation_card(shards) == ""


# ---- metrics and charts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [(1.0,), (2.0, 2.0, 2.0), (0.0, 0.0), (-3.0, 5e6, 1e-9), tuple(range(5000))]
)
def test_a_chart_keeps_every_point_inside_its_frame(values: tuple[float, ...]) -> None:
    curve = Curve(tuple(range(1, len(values) + 1)), values)
    places = _places(line_chart([Line(_smoothed(curve), "text", raw=curve)], "any"))
    assert places
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)


def test_lines_of_runs_of_unequal_length_stay_inside_one_frame() -> None:
    curves = {"a": Curve((1, 2, 3), (5.0, 4.0, 1.0)), "b": Curve((2, 400), (-3.0, 9.0))}
    curves["c"] = Curve((7,), (2.0,))
    places = _places(line_chart([Line(curve, "run0", name) for name, curve in curves.items()], "any"))
    assert len(places) == 6
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)


def test_a_chart_of_one_line_tells_its_values_and_a_chart_of_many_their_names() -> None:
    curve = Curve((1, 2), (0.5, 0.25))
    alone = line_chart([Line(curve, "text")], "any")
    assert ">0.25</text>" in alone
    assert "<title>step 1: 0.5</title>" in alone
    both = line_chart([Line(curve, "run0", "<a>"), Line(curve, "run1", "b")], "any")
    assert "<title>&lt;a&gt;: 0.25 at step 2</title>" in both
    assert 'class="hover"' not in both


def _places(svg: str) -> list[tuple[float, float]]:
    drawn = " ".join(re.findall(r'points="([^"]*)"', svg))
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in drawn.split())]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.37, 0.38), (-5, 12), (3, 3), (0, 0), (1e-6, 2e-3), (0, 12345)]
)
def test_ticks_are_round_and_enclose_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[0] >= 0 or low < 0
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def _smoothed(curve: Curve) -> Curve:
    return Curve(curve.steps, tuple(running_mean(np.array(curve.values)).tolist()))


def test_the_running_mean_covers_the_last_twentieth_of_the_steps() -> None:
    assert running_mean(np.array([1.0, 5.0, 3.0])).tolist() == [1.0, 5.0, 3.0]
    assert running_mean(np.arange(100.0))[-1] == pytest.approx(97)


def test_a_thinned_curve_keeps_its_ends_and_every_spike_at_its_step() -> None:
    steps, values = np.arange(0, 2_000_000, 2), np.sin(np.arange(1_000_000) / 1e5)
    spikes = {123_457: 9.0, 500_001: -7.0, 999_998: 5.0}
    for place, value in spikes.items():
        values[place] = value
    curve = thinned(steps, values)
    assert len(curve.steps) <= 2 * COLUMNS + 2
    assert curve.steps[0] == 0
    assert curve.steps[-1] == 1_999_998
    drawn = dict(zip(curve.steps, curve.values, strict=True))
    assert {2 * place: drawn[2 * place] for place in spikes} == {2 * p: v for p, v in spikes.items()}
    few = thinned(steps[:COLUMNS], values[:COLUMNS])
    assert few.values == tuple(values[:COLUMNS])


def test_a_history_keeps_the_later_attempt_alone_and_counts_what_is_not_finite() -> None:
    history = History()
    assert history.add([{"step": s, "loss": float(s), "odd": "text"} for s in range(1, 9)]) == 0
    assert history.add([{"step": 5, "loss": 50.0}, {"loss": 1.0}, {"step": "6", "loss": 1.0}]) == 2
    again = [{"step": 6, "loss": None}, {"step": 7, "loss": math.nan}, {"step": 6, "loss": 60}, {"step": 7}]
    assert history.add([*again, {"step": 8, "loss": 10**400}, {"step": 9, "loss": 1e300}]) == 0
    steps, values = history.curve("loss")
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert values.tolist() == [1, 2, 3, 4, 50, 60]
    assert history.steps.tolist() == [*range(1, 10)]
    assert history.not_finite["loss"] == 2
    assert "odd" not in history.columns
