"""Every command of the README files runs, in its order and as it is printed; only sizes are added."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launch import repository, tool
from readme import Smaller, commands, elsewhere, furnish, pages, python_blocks, recipe

FOUND = commands()
HERE = [(command, how) for command in FOUND if (how := recipe(command)) is not None]
LINK = re.compile(r"\]\(([^)]+)\)")
NAMED = re.compile(r"`([\w/]+\.py)`")
"""A Python file between backquotes."""
SLOW = "--compile"
"""What takes more than a minute at any size: `make drills` runs it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("reader")
    return folder, furnish(folder)


def run(command: str, place: tuple[Path, dict[str, str]]) -> str:
    folder, environment = place
    words = shlex.split(command.removeprefix("$python "))
    if words[0].endswith(".py") or words[:2] == ["-m", "torch.distributed.run"]:
        done = tool(*words, cwd=folder, environment=environment, forks="tools/benchmark.py" in words)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_readme_shows_every_tool() -> None:
    assert len(FOUND) > 35
    tools = {f"tools/{path.name}" for path in (repository() / "tools").glob("*.py")}
    assert tools - {tool for tool in tools if any(tool in command for command in FOUND)} == {"tools/demo.py"}


def test_a_command_that_is_run_elsewhere_has_its_test() -> None:
    tests = "\n".join(path.read_text() for path in (repository() / "tests").glob("test_*.py"))
    for command in FOUND:
        if recipe(command) is None:
            assert re.search(rf"^def {elsewhere(command)}\(", tests, re.MULTILINE), command


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(repository())))
def test_a_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(repository())))
def test_a_file_that_a_page_names_is_there(page: Path) -> None:
    named = NAMED.findall(page.read_text())
    places = (page.parent, repository(), repository() / "megaregion")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


@pytest.mark.parametrize(
    ("command", "how"),
    [
        pytest.param(command, how, id=command[:70], marks=[pytest.mark.drill] if SLOW in command else [])
        for command, how in HERE
    ],
)
def test_a_command_of_the_readme_runs(command: str, how: Smaller, place: tuple[Path, dict[str, str]]) -> None:
    run(how.of(command), place)


def test_the_code_for_regions_gives_a_row_for_each_box(place: tuple[Path, dict[str, str]]) -> None:
    folder, _ = place
    code, _ = python_blocks()  # The other is run by tests/test_exported_model.py.
    (folder / "regions.py").write_text(code + "\nprint(tuple(regions.shape))")
    assert run("$python regions.py", place).endswith("(2, 16)\n")
