"""evaluation.json: what is written is read again, old files too, and damage is one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaregion.errors import UserError
from megaregion.schemas.evaluation import (
    Column,
    Estimate,
    Evaluation,
    Table,
    markdown,
    read_evaluation,
    scalars,
    text,
    write_evaluation,
)

OLD = Path(__file__).parent / "fixtures" / "run" / "evaluation.json"

COLUMNS = (
    Column("knn", "test", 0.125, "Region 5-NN"),
    Column("train", "train", None, "Region 5-NN"),
    Column("linear", "linear probe", 0.1),
)
ROWS = {
    "trained": {
        "knn": Estimate(0.5, 0.4, 0.625, (0.25, 0.75)),
        "train": Estimate(1.0, 1.0, 1.0, (1.0,)),
        "linear": None,
    },
    "a|b": {"knn": None, "train": None, "linear": Estimate(0.0, 0.0, 0.0, (0.0,))},
}
TABLE = Table("region", "Naming regions", "8 objects.", COLUMNS, ROWS, "most frequent", {"a|b": "odd name"})
WHOLE = Evaluation(
    run="toy", step=40, split="val", tables=(TABLE,), test_regions=8, test_words=4, gallery_regions=24,
    gallery_words=12, gallery_scenes=12, classes=3, seeds=2, seconds={"read": 0.5},
    demo_peak_memory_bytes=300_000_000,
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation.json"
    write_evaluation(path, WHOLE)
    return path


def test_what_is_written_is_read_again(file: Path) -> None:
    assert read_evaluation(file) == WHOLE


def test_a_file_of_version_0_1_0_gives_its_summary_and_its_tables() -> None:
    old = json.loads(OLD.read_text())
    found = read_evaluation(OLD)
    assert [table.key for table in found.tables] == ["summary", *(table["key"] for table in old["measures"])]
    for row in old["rows"]:
        for column in found.table("summary").columns:
            cell = found.table("summary").rows[row["encoder"]][column.key]
            assert (None if cell is None else cell.mean) == row[column.key]
        first = found.table("summary").rows[row["encoder"]]["region_knn"]
        assert first is not None
        assert [first.low, first.high] == row["region_knn_interval"]
    assert found.table("summary").columns[0].chance == old["region_prior"]
    assert found.table("summary").notes == {"pixels": "raw"}
    for table in old["measures"]:
        for encoder, cells in table["rows"].items():
            for key, cell in cells.items():
                own = found.table(table["key"]).rows[encoder][key]
                ends = None if own is None else (own.mean, own.low, own.high, list(own.seeds))
                assert ends == (None if cell is None else tuple(cell.values()))
    # Numbers that had no interval then have none now.
    assert "| trained | 100.0 [100.0, 100.0] | 100.0 | 0.0 |" in markdown(found.tables)


def change(*way: str | int, to: object) -> Callable[[Any], None]:
    def do(content: Any) -> None:
        for key in way[:-1]:
            content = content[key]
        content[way[-1]] = to

    return do


def drop(*way: str | int) -> Callable[[Any], None]:
    def do(content: Any) -> None:
        for key in way[:-1]:
            content = content[key]
        del content[way[-1]]

    return do


CELL = ("tables", 0, "rows", "trained", "knn")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (drop("run"), "lacks run"),
        (change("step", to=None), "step must be a finite number, got null"),
        (change("step", to=1.5), "step must be a whole number of at least 0, got 1.5"),
        (change("step", to=True), "step must be a finite number, got true"),
        (change("split", to=3), "split must be a text, got 3"),
        (change("tables", to={}), "tables must be a list, got {}"),
        (change("tables", to=None), "tables must be a list, got null"),
        (change("tables", 0, to="x"), 'tables[0] must be an object, got "x"'),
        (drop("tables", 0, "columns", 1, "title"), "lacks tables[0].columns[1].title"),
        (change("tables", 0, "columns", 0, "chance", to="a"), "tables[0].columns[0].chance must be a finite"),
        (drop(*CELL), "lacks tables[0].rows.trained.knn"),
        (drop(*CELL, "low"), "lacks tables[0].rows.trained.knn.low"),
        (change(*CELL, "high", to=None), "tables[0].rows.trained.knn.high must be a finite number, got null"),
        (change(*CELL, "mean", to=10**400), "tables[0].rows.trained.knn.mean must be a finite number"),
        (change(*CELL, "mean", to=float("nan")), "tables[0].rows.trained.knn.mean must be a finite number"),
        (change(*CELL, "seeds", to=[[]]), "tables[0].rows.trained.knn.seeds[0] must be a finite number"),
        (change("seconds", "read", to=[0] * 99), "seconds.read must be a finite number, got [0, 0"),
    ],
)
def test_a_damaged_value_is_named_with_its_file_and_its_key(
    file: Path, damage: Callable[[Any], None], reason: str
) -> None:
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_evaluation(file)
    assert reason in str(error.value)
    assert str(error.value).startswith(str(file))
    assert str(error.value).endswith("write it anew with tools/evaluate.py")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"run": "toy", "step": 1e400}']
)
def test_a_file_that_is_no_evaluation_is_one_clear_line(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.json.*write it anew"):
        read_evaluation(file)
    with pytest.raises(UserError, match=r"absent\.json cannot be read"):
        read_evaluation(file.with_name("absent.json"))


@pytest.mark.parametrize("interval", [[0.5], [0, 1, 2], None, {"low": 0}])
def test_an_old_interval_that_is_no_pair_is_named(file: Path, interval: object) -> None:
    content = json.loads(OLD.read_text())
    content["rows"][1]["region_knn_interval"] = interval
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"rows\[1\]\.region_knn_interval must be"):
        read_evaluation(file)


def test_the_groups_of_a_table_stand_over_their_columns() -> None:
    lines = text([TABLE]).splitlines()
    assert lines[0].index("Region 5-NN") > lines[1].index("test") - len("50.0 [40.0, 62.5]")
    assert lines[0].index("Region 5-NN") + len("Region 5-NN") == lines[1].index("train") + len("train")
    assert "50.0 [40.0, 62.5]" in lines[2]
    assert "[" not in text([TABLE], intervals=False)


def test_markdown_keeps_its_columns_whatever_an_encoder_is_called() -> None:
    page = markdown([TABLE], level=3)
    assert page.startswith("### Naming regions\n\n8 objects.\n\n| encoder | Region 5-NN, test |")
    assert "| a\\|b | - | - | 0.0 [0.0, 0.0] |" in page
    assert "| most frequent | 12.5 |  | 10.0 |" in page
    assert "a|b: odd name" in page


def test_scalars_are_the_means_of_one_encoder() -> None:
    assert scalars([TABLE], "trained") == {"region/knn": 0.5, "region/train": 1.0}
    assert scalars([TABLE], "absent") == {}
