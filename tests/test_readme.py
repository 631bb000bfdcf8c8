"""Every command in the README exists, with every flag that it is given."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
from launch import repository

SHELL = re.compile(r"```\n(.*?)```", re.DOTALL)
TOOL = re.compile(r"(?:^|\s)(tools/\w+\.py)\b(.*)$")
STANDARD = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
"""Flags of torchrun, which stand before the tool."""


def commands() -> Iterator[tuple[str, str]]:
    """Tool and arguments of each command line in a code block or between backquotes."""
    text = (repository() / "README.md").read_text()
    blocks = SHELL.findall(text)
    inline = re.findall(r"`((?:\$python |python )?tools/[^`]+)`", text)
    for block in [*blocks, *inline]:
        for line in block.replace("\\\n", " ").splitlines():
            found = TOOL.search(line.split(" #")[0])
            # `kmeans | assign` names several parts in prose.
            if found and " | " not in found[2]:
                yield found[1], found[2]


@functools.cache
def help_of(tool: str, part: str) -> str:
    command = [sys.executable, "-W", "ignore", tool, *([part] if part else []), "--help"]
    done = subprocess.run(
        command, cwd=repository(), capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "COLUMNS": "400"},
    )  # fmt: skip
    assert done.returncode == 0, f"{tool} {part}: {done.stderr[-500:]}"
    return done.stdout


FOUND = sorted(set(commands()))


def test_the_readme_shows_commands() -> None:
    assert len(FOUND) > 25
    assert {tool for tool, _ in FOUND} >= {
        f"tools/{path.name}" for path in (repository() / "tools").glob("*.py")
    } - {"tools/demo.py", "tools/make_scenes.py"}


@pytest.mark.parametrize(("tool", "arguments"), FOUND, ids=lambda text: str(text).strip()[:60])
def test_a_command_of_the_readme_is_understood(tool: str, arguments: str) -> None:
    assert (repository() / tool).is_file()
    words = shlex.split(arguments)
    part = words[0] if words and re.fullmatch(r"[a-z][a-z-]*", words[0]) else ""
    known = help_of(tool, part)
    flags = {word.split("=")[0] for word in words if word.startswith("--") and len(word) > 2}
    unknown = {flag for flag in flags if not re.search(rf"{re.escape(flag)}(?![\w-])", known)}
    assert not unknown, f"{tool} {part} does not know {sorted(unknown)}"
