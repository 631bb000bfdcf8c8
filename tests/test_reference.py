from __future__ import annotations

import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

from megaregion.atlas.settings import AtlasSettings
from megaregion.config import RunConfig
from megaregion.curation.settings import CurationSettings
from megaregion.settings import sections, setting_names

TOOL = Path(__file__).parents[1] / "tools" / "config_reference.py"
PAGE = Path(__file__).parents[1] / "configs" / "README.md"


def page() -> str:
    return str(runpy.run_path(str(TOOL))["page"]())


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
    every = [*sections(RunConfig()), *sections(CurationSettings()), *sections(AtlasSettings())]
    settings = [setting for section in every for setting in section.settings]
    names = Counter(setting.key for setting in settings)
    assert len(names) > 130
    text = page()
    assert all(text.count(f"\n| `{name}` |") == times for name, times in names.items())
    assert all(setting.told.endswith(".") for setting in settings)
    assert {name for name in setting_names(RunConfig()) if name not in names} == {
        section.key for section in sections(RunConfig()) if section.key
    }


def test_a_default_of_a_nested_group_is_that_of_the_run() -> None:
    found = {setting.key: setting for section in sections(RunConfig()) for setting in section.settings}
    assert found["head.text.sample_rate"].default == RunConfig().head.text.sample_rate == 1.0
    assert found["head.object.sample_rate"].default == RunConfig().head.object.sample_rate == 0.1
    text = page()
    assert "| `head.text.sample_rate` | number in (0, 1] | `1` |" in text
    assert "| `data.crop_scale` | 2 values, each a number in [0.0001, 1] | `0.5 1` |" in text


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
