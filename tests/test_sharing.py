"""Pytests that share a suite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from launch import repository

TESTS = "import time\n" + "".join(f"def test_{name}(): time.sleep(0.1)\n" for name in "abc")


def start(folder: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "pytest", "-v", "-p", "sharing", "-p", "no:cacheprovider", "--rootdir=.",
        "--share=taken", ".",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(repository() / "tests")}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_pytests_that_share_a_folder_run_every_test_once(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for number in range(8):
        (tmp_path / f"test_{number}.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(
        "import pytest\n@pytest.fixture(scope='session')\ndef drill(): pass\n"
    )
    for number in (2, 6):
        (tmp_path / f"test_{number}.py").write_text(TESTS.replace("test_b()", "test_b(drill)"))
    both = [start(tmp_path) for _ in range(2)]
    ran = [re.findall(r"^(\S+::\S+) PASSED", one.communicate(timeout=100)[0], re.M) for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert len(list((tmp_path / "taken").glob(".whole-*"))) == 2
    assert len(ran[0] + ran[1]) == len({*ran[0], *ran[1]}) == 24
    assert all(len(one) % 3 == 0 for one in ran), "the tests of a file stay together"
    on_cluster = [sum(name.startswith(("test_2", "test_6")) for name in one) for one in ran]
    assert sorted(on_cluster) == [0, 6], "the files of a pretend cluster stay together"


def test_a_pytest_that_a_test_ends_leaves_no_mark_of_success(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "test_0.py").write_text("import os\ndef test_a(): os._exit(0)\ndef test_b(): pass\n")
    assert start(tmp_path).wait(timeout=100) == 0
    assert not list((tmp_path / "taken").glob(".whole-*"))
