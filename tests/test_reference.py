from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest

from megaregion.config import HeadConfig, RunConfig, setting_names
from megaregion.reference import groups, page, sentences

TOOL = Path(__file__).parents[1] / "tools" / "config_reference.py"
PAGE = Path(__file__).parents[1] / "configs" / "README.md"


def run_tool(*arguments: object) -> int:
    saved, sys.argv = sys.argv, [str(TOOL), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = saved
    return int(ended.value.code or 0)


def test_the_reference_in_the_repository_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run tools/config_reference.py"


def test_every_setting_stands_in_the_reference_once_with_a_sentence() -> None:
    settings = [setting for group in groups() for setting in group.settings]
    names = [setting.key for setting in settings]
    known = setting_names()
    leaves = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]
    assert sorted(names) == sorted(leaves)
    assert all(setting.told.endswith(".") for setting in settings)
    assert not any("typing" in setting.kind or "<class" in setting.kind for setting in settings)


def test_a_default_of_a_nested_group_is_that_of_the_run() -> None:
    found = {setting.key: setting for group in groups() for setting in group.settings}
    assert found["head.text.sample_rate"].default == f"`{RunConfig().head.text.sample_rate}`"
    assert found["head.object.sample_rate"].default == f"`{HeadConfig().sample_rate}`"
    assert found["data.crop_scale"].kind == "2 numbers"
    assert set(sentences(HeadConfig)) == {field.name for field in dataclasses.fields(HeadConfig)}


def test_the_tool_writes_the_page_and_notices_an_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "README.md"
    assert run_tool("--out", out) == 0
    assert out.read_text() == page()
    assert run_tool("--out", out, "--check") == 0
    out.write_text("old")
    assert run_tool("--out", out, "--check") == 2
    assert "not up to date" in capsys.readouterr().err
    assert out.read_text() == "old"
