"""`megaregion`: every tool by one command, from a wheel too, and `megaregion fit`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launch import repository
from packaging.requirements import Requirement
from PIL import Image
from readme import furnish

from megaregion.checks import check_batching, check_config
from megaregion.cli import COMMANDS, Given, Machine, choose, fit
from megaregion.command_line import run
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.settings import read_file, read_settings

PROJECT = tomllib.loads((repository() / "pyproject.toml").read_text())

TINY = """
model: {image_size: 48, width: 32, heads: 4, depth: 2, mlp_width: 64, region_layers: 1}
data: {workers: 0, regions_per_image: 3}
head: {embedding_dim: 16, draw_images: 8}
train: {steps: 2, global_batch: 4, micro_batch: 4}
optimizer: {warmup_steps: 1}
"""


def megaregion(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megaregion.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def test_every_tool_has_a_command() -> None:
    tools = {path.name for path in (repository() / "tools").glob("*.py")}
    reached = {tool.split()[0] for tool, _ in COMMANDS.values() if tool}
    assert tools - reached == {"config_reference.py", "demo.py"}


def test_an_unknown_command_is_refused_with_the_nearest_one() -> None:
    done = megaregion("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megaregion: no command trian; did you mean train?; megaregion --help lists them\n"


def test_a_package_is_in_the_wheel_and_every_requirement_is_pinned() -> None:
    packages = {".".join(path.parent.parts) for path in Path("megaregion").rglob("__init__.py")}
    beside = set(PROJECT["tool"]["setuptools"]["package-dir"])
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | beside

    def name(line: str) -> str:
        return re.split(r"[=<>;\s]", line)[0].lower()

    lines = (repository() / "requirements.txt").read_text().splitlines()
    pinned = {name(line) for line in lines if line and not line.startswith("#")}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(each for extra in extras for each in extra)]
    # trackio wants an older Pillow than the pinned one.
    assert {name(each) for each in wanted} - {"trackio"} == pinned


def test_a_wheel_brings_commands_and_configs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # pip builds in the tree.
    names = subprocess.run(["git", "ls-files"], cwd=repository(), capture_output=True, text=True, check=True)
    for file in map(Path, names.stdout.splitlines()):
        if (
            file.parts[0] not in ("tests", "slurm")
            and "assets" not in file.parts
            and (repository() / file).exists()
        ):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((repository() / file).read_bytes())
    there = tmp_path / "installed"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-build-isolation", f"--target={there}", source], check=True
    )
    assert (there / "bin" / "megaregion").is_file()
    plan = ["plan", "run", "--config", there / "megaregion" / "configs" / "demo.yaml", "--cluster", "h100x8"]
    done = megaregion(*plan, cwd=tmp_path, env={"PYTHONPATH": str(there)})
    assert done.returncode == 0, done.stderr
    assert "h100x8" in done.stdout


@pytest.mark.parametrize(
    ("images", "machine", "clusters", "config", "ranks", "steps", "stages"),
    [
        (60, Machine(2, 0), 4, "demo.yaml", 1, 200, [0.79]),
        (3_000, Machine(8, 0), 128, "demo.yaml", 4, 2_080, [0.79]),
        (10_000, Machine(12, 1), 512, "vit_b16_1gpu.yaml", 1, 977, []),
        (1_000_000, Machine(96, 6), 32_768, "vit_b16_1gpu.yaml", 4, 30_882, []),
    ],
)
def test_what_is_chosen_fits_data_and_machine(
    images: int, machine: Machine, clusters: int, config: str, ranks: int, steps: int, stages: list[float]
) -> None:
    chosen = choose(images, machine)
    assert (chosen.clusters, chosen.config, chosen.ranks) == (clusters, config, ranks)
    run = read_settings(read_file(RunConfig(), repository() / "configs" / config), chosen.settings)
    check_config(run)
    assert run.train.steps == steps
    assert [round(stage.from_image / steps / run.train.global_batch, 2) for stage in run.stages] == stages
    assert run.data.regions_per_image <= chosen.regions
    check_batching(run, ranks)


def test_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="3 images are too few to learn from; give at least 8"):
        choose(3, Machine(2, 0))


INSTALLED = """
import os, sys
from importlib.machinery import PathFinder

tools = {"curate.py": "curate", "atlas.py": "curate", "evaluate.py": "curate", "pretrain.py": "train"}
used = [extra for word in sys.orig_argv for tool, extra in tools.items() if word.endswith(f"tools/{tool}")]
# Workers that a tool starts have what it has.
extra = os.environ["EXTRA"] = used[0] if used else os.environ.get("EXTRA", "")
hidden = set(os.environ[f"WITHOUT_{extra}"].split())

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""
"""sitecustomize.py of processes that see what an install with the one extra has that their tool needs."""


def not_installed(extra: str) -> str:
    """Modules of this environment that `pip install .[EXTRA]` alone would not bring."""
    extras = PROJECT["project"]["optional-dependencies"]
    todo, brought = [*PROJECT["project"]["dependencies"], *extras.get(extra, ())], {"megaregion"}
    while todo:
        wanted = Requirement(todo.pop())
        name = wanted.name.lower().replace("_", "-")
        if name in brought or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        brought.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            todo += metadata.requires(name) or []
    modules = metadata.packages_distributions().items()
    return " ".join(
        module
        for module, owners in modules
        if not {name.lower().replace("_", "-") for name in owners} & brought
    )


def test_photos_with_boxes_become_an_encoder_that_transformers_loads_and_each_tool_needs_its_extra_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(INSTALLED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    for extra in ("", "curate", "train"):
        monkeypatch.setenv(f"WITHOUT_{extra}", without := not_installed(extra))
        known = {
            "deepspeed": "train",
            "megatron": "train",
            "rapidocr": "curate",
            "faiss": "curate",
            "pytest": "",
        }
        assert set(known) & set(without.split()) == {name for name in known if known[name] != extra} | {
            "pytest"
        }
    furnish(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    folder = fit("photos", "mine", Given(annotations="coco.json", config="tiny.yaml"))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    out = model(torch.zeros(1, 3, 48, 48), boxes=torch.tensor([[[0.0, 0.0, 40.0, 30.0]]]))
    assert out.region_features.shape == (1, 1, 16)
    told = capfd.readouterr().out
    assert "12\n" in told
    assert "4 of objects, 384 of text" in told
    assert (
        "coco/" in (folder / "README.md").read_text() or "model-index" in (folder / "README.md").read_text()
    )
    assert (tmp_path / "mine" / "atlas" / "index.html").is_file()
    assert yaml.safe_load((tmp_path / "mine" / "fit.yaml").read_text())["parallel"] == {"tensor": 1}


def test_what_is_not_installed_is_named_with_what_brings_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: import_module("nowhere"))
    assert ended.value.code == 2
    assert (
        'megaregion: nowhere is not installed; pip install ".[train,curate]" has it'
        in capsys.readouterr().err
    )
    with pytest.raises(ModuleNotFoundError):
        run(lambda: import_module("megaregion.nowhere"))


@pytest.fixture
def nine(tmp_path: Path) -> Path:
    """A folder with nine photos in which nothing is to be seen."""
    (tmp_path / "photos").mkdir()
    for number in range(9):
        Image.fromarray(np.full((8, 8, 3), 9 * number, np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


def test_a_fit_that_begins_with_an_encoder_learns_slower_and_a_dry_run_does_nothing_but_list(
    nine: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(nine)
    fit("photos", "mine", Given(init="rice"), dry_run=True)
    *_, start, train, export = capfd.readouterr().out.split("\n# ")
    assert start.endswith("tools/convert_checkpoint.py from-hf rice mine/start-rice\n")
    assert "--config mine/start-rice/model.yaml --init mine/start-rice --data.path mine/data/shards" in train
    assert "to-hf mine/run mine/encoder --regions --check" in export
    assert yaml.safe_load(Path("mine/fit.yaml").read_text())["optimizer"]["lr"] == 1e-4
    assert {path.name for path in Path("mine").iterdir()} == {"data", "fit.yaml"}


def test_a_step_that_fails_ends_a_fit_and_says_which(nine: Path) -> None:
    done = megaregion("fit", "--images", "photos", "--out", "mine", cwd=nine)
    assert done.returncode == 2
    assert re.search(r"megaregion: stopped in step 'curate' \(exit code 2\)", done.stderr)


def test_opencv_without_selective_search_says_how_to_bring_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    from megaregion.curation.engines.boxes import SelectiveSearch

    monkeypatch.delattr(cv2, "ximgproc")
    with pytest.raises(
        UserError, match="pip install --force-reinstall --no-deps opencv-contrib-python-headless"
    ):
        SelectiveSearch((96,))
