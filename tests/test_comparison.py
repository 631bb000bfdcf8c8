"""Runs side by side, and models of other makers as rows of the tables."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from pages import Page, open_in_browser
from PIL import Image
from toy_scenes import RUN, write_run, write_scenes, write_shards

from megaregion.data.info import read_info
from megaregion.errors import UserError
from megaregion.evaluation.encoders import BoxedImage, load_huggingface
from megaregion.evaluation.measures import share
from megaregion.evaluation.network import open_run
from megaregion.evaluation.runs import Run, open_runs, tables
from megaregion.export.huggingface import export_checkpoint
from megaregion.schemas.evaluation import Column, Estimate, Evaluation, Table, write_evaluation

TOOL = Path(__file__).parents[1] / "tools" / "report.py"


def run_tool(*arguments: object) -> int:
    saved, sys.argv = sys.argv, [str(TOOL), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = saved
    return int(ended.value.code or 0)


def leave_run(folder: Path, accuracy: float, lr: float, told: str = "8 objects") -> Path:
    """A run's folder as training and evaluation leave it."""
    (folder / "pictures").mkdir(parents=True)
    settings = {"name": folder.name, "seed": 0, "optimizer": {"lr": lr, "beta1": 0.9}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [{"step": s, "loss": 5 / s + lr, "images_per_second": 10.0} for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    looks = [{"step": s, "region/knn": accuracy * s / 20, "seconds": 1.0} for s in (10, 20)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in looks))
    right = np.arange(40) < 40 * accuracy
    columns = (Column("knn", "5-NN", 0.1),)
    table = Table("region", "Naming regions", told, columns, {"trained": {"knn": share(right, range(40))}})
    evaluation = Evaluation(folder.name, 20, "test", (table,), 40, 0, 90, 0, 45, 3, seeds=1)
    write_evaluation(folder / "evaluation.json", evaluation)
    for kind in ("map", "frame"):
        Image.new("RGB", (30, 20), (90, 30, 200)).save(folder / "pictures" / f"scene-1.{kind}.jpg")
    return folder


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    return [leave_run(tmp_path / "first", 0.5, 1e-3), leave_run(tmp_path / "second", 0.75, 2e-3)]


def read_runs(folders: list[Path]) -> list[Run]:
    return [run.read() for run in open_runs(folders)]


def test_a_comparison_has_a_row_for_each_run_with_its_own_numbers(
    two_runs: list[Path], tmp_path: Path
) -> None:
    table = tables(read_runs(two_runs))[0]
    means = {name: cells["knn"].mean for name, cells in table.rows.items() if cells["knn"]}
    assert means == {"first": 0.5, "second": 0.75}
    assert table.notes == {}
    other = leave_run(tmp_path / "third", 0.5, 1e-3, told="9 objects")
    notes = tables(read_runs([*two_runs, other]))[0].notes
    assert notes == {"third": "asked otherwise: 9 objects"}


def test_a_run_that_was_not_evaluated_or_logged_is_a_gap_and_no_error(
    two_runs: list[Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("name: bare\n")
    out = tmp_path / "page.html"
    assert run_tool(*two_runs, bare, "--out", out) == 0
    assert "Not evaluated: bare" in out.read_text()
    assert tables(read_runs([*two_runs, bare]))[0].rows["bare"] == {"knn": None}


def test_the_page_of_two_runs_fetches_nothing_and_opens_without_a_complaint(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert run_tool(*two_runs, "--out", out) == 0
    assert "Naming regions" in capsys.readouterr().out
    page = out.read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count('<img src="data:image/jpeg') == 3
    assert "optimizer.lr" in page
    assert "optimizer.beta1" not in page
    assert "While training" in page
    assert "What differs" in open_in_browser(out)


def test_mistakes_are_one_line_and_exit_code_2(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run_tool(tmp_path / "empty", "--out", tmp_path / "page.html") == 2
    assert run_tool(two_runs[0], two_runs[0], "--out", tmp_path / "page.html") == 2
    assert run_tool(two_runs[0], "--out", tmp_path / "absent" / "page.html") == 2
    (two_runs[1] / "evaluation.json").write_text("{")
    assert run_tool(*two_runs, "--out", tmp_path / "page.html") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4
    assert all(line.startswith("megaregion: ") for line in lines)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluation.json", None),
        ("evaluation.json", "[]"),
        ("evaluation.json", "null"),
        ("evaluation.json", "1e400"),
        ("evaluation.json", '{"run": "toy", "measures": 5}'),
        ("config.yaml", "5"),
        ("config.yaml", "{"),
        ("pictures/scene-1.map.jpg", "no picture"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_in_one_line(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str | None
) -> None:
    if content is None:
        (two_runs[1] / file).unlink()
        (two_runs[1] / file).mkdir()
    else:
        (two_runs[1] / file).write_text(content)
    assert run_tool(*two_runs, "--out", tmp_path / "page.html") == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"megaregion: {two_runs[1] / file}")
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(("content", "lines"), [("[]\n", 1), ("5\n5\n", 2), ("x\n{}\n", 2)])
def test_lines_of_metrics_that_cannot_be_read_are_counted_and_leave_a_gap(
    two_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, lines: int
) -> None:
    (two_runs[1] / "metrics.jsonl").write_text(content)
    assert run_tool(*two_runs, "--out", tmp_path / "page.html") == 0
    told = f"{two_runs[1]}: {lines} lines cannot be read; the page goes without them"
    assert capsys.readouterr().err == f"megaregion: {told}\n"
    assert f"{lines} lines of {two_runs[1]} could not be read" in (tmp_path / "page.html").read_text()


def test_runs_of_one_name_are_told_apart_by_as_much_of_their_path_as_that_takes(tmp_path: Path) -> None:
    for folder in ("a/x/run", "b/x/run", "b/other"):
        leave_run(tmp_path / folder, 0.5, 1e-3)
    runs = read_runs([tmp_path / folder for folder in ("a/x/run", "b/x/run", "b/other")])
    assert [run.name for run in runs] == ["a/x/run", "b/x/run", "other"]


def test_names_settings_and_tables_from_outside_never_become_tags(tmp_path: Path) -> None:
    hostile = "\"'><script>"
    runs = [leave_run(tmp_path / f"run{number}{hostile}", 0.5, 1e-3) for number in range(2)]
    settings = {f"key{hostile}": f"value{hostile}"}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(settings))
    found = Estimate(0.5, 0.4, 0.6, (0.5,))
    columns = (Column("knn", f"column{hostile}", 0.1),)
    for number, run in enumerate(runs):
        table = Table(
            "region",
            f"title{hostile}",
            f"told{number}{hostile}",
            columns,
            {"trained": {"knn": found}},
            f"chance{hostile}",
        )
        evaluation = Evaluation(run.name, 20, "test", (table,), 40, 0, 90, 0, 45, 3, seeds=1)
        write_evaluation(run / "evaluation.json", evaluation)
        for kind in ("map", "frame"):
            picture = run / "pictures" / f"scene-1.{kind}.jpg"
            picture.rename(picture.with_name(f"frame{hostile}.{kind}.jpg"))
    assert run_tool(*runs, "--out", tmp_path / "page.html") == 0
    page = Page(tmp_path / "page.html")
    assert "script" not in page.tags
    shown = page.text + " ".join(page.values)
    for what in ("run0", "run1", "key", "value", "column", "title", "told0", "told1", "chance", "frame"):
        assert f"{what}{hostile}" in shown, what


def test_a_runs_own_export_is_compared_as_the_run_itself(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path / "shards", write_scenes(tmp_path / "scenes"))
    write_run(tmp_path / "run", dataset, read_info(dataset).text_classes)
    export_checkpoint(tmp_path / "run", tmp_path / "exported")
    theirs, ours = load_huggingface(str(tmp_path / "exported")), open_run(tmp_path / "run").trained()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 70, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels[:, ::-1].copy())]
    assert theirs.name == "exported"
    assert np.allclose(theirs.images(images), ours.images(images), atol=1e-4)
    for a, b in zip(theirs.maps(images), ours.maps(images), strict=True):
        assert np.allclose(a, b, atol=1e-4)
    boxes = np.array([[0, 0, 70, 60], [5, 5, 40, 30]], np.float32)
    regions = theirs.encode([BoxedImage(image, boxes) for image in images]).region
    assert regions.shape == (4, RUN.model.width)
    assert np.allclose(regions[0], theirs.maps(images)[0].mean((0, 1)), atol=1e-5)
    assert theirs.names_images
    assert not theirs.crops().names_images
    crops = theirs.crops().encode([BoxedImage(images[0], boxes[:1])]).region
    assert np.allclose(crops, theirs.images(images[:1]), atol=1e-5)


def test_a_model_that_cannot_be_compared_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded"):
        load_huggingface(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"cannot be loaded"):
        load_huggingface(str(tmp_path))
