"""The recipes of slurm/container/: linted, and one image in two languages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launch import repository
from spython.main.parse.parsers import SingularityParser
from spython.main.parse.writers import DockerWriter

ROOT = repository()
FOLDER = ROOT / "slurm" / "container"
APPTAINERS = ("DL3020", "DL3025", "DL3059")
"""Rules for a Dockerfile that a person writes: ADD for COPY, a shell in CMD, several RUN in a row."""


def lint(file: Path, *ignored: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    flags = [word for rule in ignored for word in ("--ignore", rule)]
    done = subprocess.run([hadolint, *flags, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def recipe() -> object:
    """Apptainer's definition as it is understood."""
    (one,) = SingularityParser(str(FOLDER / "megaregion.def")).recipe.values()
    return one


def test_the_dockerfile_is_clean() -> None:
    lint(FOLDER / "Dockerfile")


def test_the_apptainer_definition_is_clean(recipe: object, tmp_path: Path) -> None:
    recipe.test = None  # type: ignore[attr-defined]  # Docker has no such section.
    file = tmp_path / "Dockerfile"
    file.write_text(DockerWriter({"image": recipe}).convert())
    lint(file, *APPTAINERS)


def test_both_begin_with_one_image_and_run_the_same_commands(recipe: object) -> None:
    docker = (FOLDER / "Dockerfile").read_text()
    cuda = next(line for line in docker.splitlines() if line.startswith("ARG CUDA=")).partition("=")[2]
    assert recipe.fromHeader == f"nvidia/cuda:{cuda}-base-ubuntu24.04"  # type: ignore[attr-defined]
    joined = " ".join(docker.replace("\\\n", " ").split())
    for command in recipe.install[:2]:  # type: ignore[attr-defined]
        assert " ".join(command.split()) in joined


def test_apptainer_gets_every_file_that_a_checkout_has(recipe: object) -> None:
    copied = dict(line.split() for line in recipe.files)  # type: ignore[attr-defined]
    assert all((ROOT / source).exists() for source in copied)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kept = {Path(line).parts[0] for line in tracked.splitlines()}
    assert kept - set(copied) == {".ci", ".gitignore", "Makefile", "tests"}
