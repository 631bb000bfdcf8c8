"""Several pytests share one suite: each takes the next test file that no other has taken.

`make test` starts two, for much of the suite waits for processes that it has started. Files that need a
pretend cluster stay together: to start it takes longer than most files. A file is never split, for pytest
would keep its module open for a test that another process has taken.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

LONGEST = (
    "test_slurm", "test_readme", "test_training", "test_demo", "test_benchmark", "test_gpu_step",
    "test_guard", "test_heads_distributed", "test_curation", "test_saving", "test_run", "test_study",
    "test_cli", "test_clusters", "test_export", "test_atlas", "test_background", "test_start", "test_fuzz",
)  # fmt: skip
"""Files that are taken first, so that no pytest is left alone with one of them at the end."""
CLUSTERS = {"drill", "binding"}
"""Fixtures that start a pretend cluster."""
MINE: set[str] = set()
"""What this process has taken."""
ON_CLUSTERS: set[str] = set()
"""Files that need a pretend cluster."""
REPORTED: set[str] = set()
"""Tests of this process that have ended."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=_folder,
        metavar="FOLDER",
        help="leave files to other pytests that name the same folder",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ON_CLUSTERS.update(
        item.path.stem for item in items if not CLUSTERS.isdisjoint(getattr(item, "fixturenames", ()))
    )
    if config.getoption("share"):
        items.sort(key=_turn)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """True, which tells pytest that the test is done with, where another process has taken it."""
    folder: Path | None = item.config.getoption("share")
    if folder is None or _group(item) in MINE:
        return None
    try:
        (folder / _group(item)).mkdir()
    except FileExistsError:
        return True
    MINE.add(_group(item))
    return None


def pytest_runtest_logfinish(nodeid: str) -> None:
    REPORTED.add(nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave a mark where all tests of what was taken have ended; `make test` asks for one of each pytest.

    A test that ends the process, as os._exit(0) does, would take its file along and look like success.
    """
    folder: Path | None = session.config.getoption("share")
    if folder is not None and all(i.nodeid in REPORTED for i in session.items if _group(i) in MINE):
        (folder / f".whole-{os.getpid()}").touch()


def _folder(text: str) -> Path:
    # An empty name would be this folder, in which what is taken stays taken: the next suite would be empty.
    if not Path(text).is_dir() or not text:
        raise argparse.ArgumentTypeError(f"must be a folder that is there, got {text!r}")
    return Path(text)


def _group(item: pytest.Item) -> str:
    return "cluster" if item.path.stem in ON_CLUSTERS else item.path.stem


def _turn(item: pytest.Item) -> int:
    group = "test_slurm" if _group(item) == "cluster" else _group(item)
    return LONGEST.index(group) if group in LONGEST else len(LONGEST)
