"""The commands that the README files show, and the small place in which a test runs them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from curation_scenes import save_tiny_sam, scene
from launch import free_port, repository
from toy_scenes import write_run, write_scenes, write_shards

from megaregion.data.info import read_info

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:\$python )?tools/\w+\.py [^`]+)`")
SHELL = re.compile(r"^ *(\$python |make |torchrun |\. slurm/|megaregion )", re.MULTILINE)

CURATION = "--clusters 4 --vocab 384 --piece-images 4 --crop-side 96"
"""A command that names no workers has two; any number of them gives the same outcome."""
ALONE = f"{CURATION} --workers 0"
MODEL = "--model.image_size 48 --model.patch_size 8 --model.width 32 --model.heads 4 --model.mlp_width 64"
HEAD = "--model.depth 2 --model.region_layers 1 --head.embedding_dim 16 --optimizer.warmup_steps 1"
TRAIN = f"{MODEL} {HEAD} --data.workers 0 --train.global_batch 8 --train.micro_batch 4 --head.draw_images 8"

RUN = """
name: run
model: {image_size: 48, patch_size: 8, width: 32, depth: 2, heads: 4, mlp_width: 64, region_layers: 1}
data: {path: data/photos/shards, workers: 0, regions_per_image: 3}
head: {embedding_dim: 16}
optimizer: {warmup_steps: 1}
train: {steps: 12, global_batch: 4, micro_batch: 2, precision: fp32}
"""
"""A run of the reader's, RUN.yaml in the README."""


@dataclass(frozen=True)
class Smaller:
    """What makes a command small enough for a test; all that it says itself stays."""

    added: str = ""
    replaced: tuple[str, str] = ("", "")

    def of(self, command: str) -> str:
        """The command that is run."""
        assert self.replaced[0] in command
        return f"{command.replace(*self.replaced, 1)} {self.added}".rstrip()


SMALLER = {
    "$python tools/curate.py --images": Smaller(ALONE),
    "$python tools/curate.py --images photos --out data/photos --clusters": Smaller(
        f"{CURATION} --workers 2"
    ),
    "$python tools/atlas.py data/photos": Smaller("--tile 32"),
    "$python tools/atlas.py --synthetic": Smaller("--synthetic 60 --sheets 2 --tile 32"),
    "$python tools/make_scenes.py": Smaller("--train 6 --test 2"),
    "$python -m torch.distributed.run --standalone --nproc-per-node 8 tools/curate.py": Smaller(
        CURATION, ("--nproc-per-node 8", "--nproc-per-node 2")
    ),
    "$python tools/curate.py report --out data/public": Smaller(replaced=("data/public", "data/photos")),
    "$python -m torch.distributed.run --standalone --nproc-per-node 8 tools/pretrain.py": Smaller(
        f"{TRAIN} --data.path data/photos/shards --train.precision fp32 --train.steps 2",
        ("--nproc-per-node 8", "--nproc-per-node 2"),
    ),
    "$python -m torch.distributed.run --nproc-per-node 4": Smaller(f"{TRAIN} --train.steps 4 --stop-at 2"),
    "$python -m torch.distributed.run --nproc-per-node 2": Smaller(f"{TRAIN} --train.steps 4"),
    "$python tools/pretrain.py --config configs/vit_l14_64gpu.yaml": Smaller(
        "--data.path data/photos/shards --data.workers 0 --head.draw_images 0 --head.embedding_dim 16 "
        "--train.precision fp32 --train.steps 1 --train.global_batch 2 --train.micro_batch 2 "
        "--optimizer.warmup_steps 1"
    ),
    "$python tools/pretrain.py --config configs/vit_b16_1gpu.yaml": Smaller(
        "--data.workers 0 --head.draw_images 0 --head.embedding_dim 16 --train.precision fp32 "
        "--train.steps 1 --train.global_batch 2 --train.micro_batch 2 --optimizer.warmup_steps 1"
    ),
    "$python tools/convert_checkpoint.py from-hf openai/clip-vit-base-patch16 start/own": Smaller(
        replaced=("--image-size 224", "--image-size 32")
    ),
    "$python tools/pretrain.py --config RUN.yaml --data": Smaller("--name packed"),
    "$python tools/pretrain.py --config RUN.yaml --name annotated": Smaller(),
    "$python tools/pretrain.py --config RUN.yaml --train": Smaller("--name budget"),
    "$python tools/pretrain.py --config RUN.yaml --profile": Smaller("--name profile"),
    "$python tools/pretrain.py ...": Smaller(
        "--evaluate.every 6 --checkpoint.every 6", ("...", "--config RUN.yaml --name evaluated")
    ),
    "$python tools/plan.py run --config configs/vit_bigg14_64gpu.yaml": Smaller("--model.depth 12"),
    "$python tools/evaluate.py": Smaller("--limit 40 --map-side 96"),
    **{
        # What the curation encoder says of the same scenes was seen once.
        f"$python tools/evaluate.py runs/demo --scenes data/demo/scenes --{flag}": Smaller(
            "--limit 40 --map-side 96 --curation none"
        )
        for flag in ("images", "compare", "frames")
    },
    "tools/pretrain.py report": Smaller(replaced=("NAME", "photos")),
    "tools/benchmark.py plan": Smaller(
        "--model toy --batch 1 --steps 2 --threads 1", ("--case all", "--case 1 2-tensor")
    ),
}
"""The longest beginning of a command that stands here names its recipe; others run as they are."""

ELSEWHERE = {
    "make demo": "test_images_become_an_encoder_that_transformers_loads",
    "$python tools/replay.py": (
        "test_a_step_with_a_nan_weight_is_kept_and_its_replay_names_where_the_nan_begins"
    ),
    "pip install": "test_a_wheel_brings_commands_and_configs",
    "megaregion fit": (
        "test_photos_with_boxes_become_an_encoder_that_transformers_loads_and_each_tool_needs_its_extra_alone"
    ),
    "make test": "test_a_command_of_the_readme_runs",
    "make .venv/ready": "test_a_command_of_the_readme_runs",
    ". slurm/site.env && sbatch": "test_a_submitted_run_equals_the_one_of_torchrun_bit_for_bit",
    ". slurm/site.env && slurm/curate.sh": "test_job_arrays_on_slurm_give_the_dataset_of_one_run",
    ". slurm/site.env && MEGAREGION_CURATE_cluster": "test_job_arrays_on_slurm_give_the_dataset_of_one_run",
    "torchrun --nnodes 8": "test_a_submitted_run_equals_the_one_of_torchrun_bit_for_bit",
    "$python tools/evaluate.py runs/vit_b16_8gpu --annotations lvis": (
        "test_a_run_is_scored_by_tokens_patches_and_crops"
    ),
    "$python tools/evaluate.py runs/vit_b16_8gpu --folder-dataset": (
        "test_an_export_and_any_model_are_scored_without_a_run"
    ),
    "$python tools/evaluate.py runs/demo --annotations": "test_a_run_is_scored_by_tokens_patches_and_crops",
    "$python tools/evaluate.py photos-regions": "test_an_export_and_any_model_are_scored_without_a_run",
    "$python tools/evaluate.py facebook": "test_an_export_and_any_model_are_scored_without_a_run",
    "tools/benchmark.py annotated": "test_the_benchmark_of_annotated_images_runs_at_any_size",
    "tools/benchmark.py kmeans": "test_the_benchmarks_run_at_any_size_and_say_what_they_need",
    "tools/benchmark.py assign": "test_the_benchmarks_run_at_any_size_and_say_what_they_need",
    "tools/benchmark.py atlas": "test_a_synthetic_atlas_draws_only_what_the_view_needs",
    "$python tools/benchmark.py gpu": "test_a_device_is_compared_with_a_processor_in_fp32_and_in_bf16",
    "tools/benchmark.py head": "test_the_head_benchmark_runs_at_any_size",
    "tools/benchmark.py checkpoint": "test_the_checkpoint_benchmark_runs_at_any_size",
    "tools/benchmark.py loader": "test_the_loader_benchmark_runs_and_reads_nothing_in_vain",
    "$python tools/benchmark.py step": "test_the_step_benchmark_runs_at_any_size",
    "tools/benchmark.py step": "test_the_step_benchmark_runs_at_any_size",
    "tools/benchmark.py curation": "test_the_benchmarks_of_curation_run_at_any_size",
    "tools/benchmark.py index": "test_the_benchmarks_of_curation_run_at_any_size",
    "tools/benchmark.py scale": "test_the_benchmarks_of_curation_run_at_any_size",
    "tools/benchmark.py metadata": "test_the_metadata_benchmark_runs_at_a_thousandth_of_its_size",
    "tools/benchmark.py convert": "test_the_conversion_benchmark_runs_at_any_size",
    "$python tools/plan.py curate": "test_no_batch_of_curations_networks_waits_for_the_gpu",
    "tools/plan.py curate": "test_no_batch_of_curations_networks_waits_for_the_gpu",
    "$python tools/study.py": "test_a_study_ends_with_a_verdict_and_runs_nothing_twice",
    "tools/curate.py report --truth": "test_the_report_has_every_number_of_the_labels",
}
"""Commands that need a cluster, a whole demo or a form of their own, and the test that runs them."""


def pages() -> list[Path]:
    """Every page that people write, the top one first; config_reference.py writes the one in configs/."""
    root = repository()
    rooms = ("slurm", "tools", "tools/benchmark", "megaregion", *sorted(_rooms(root)))
    return [
        root / "README.md",
        root / "configs/own_images.md",
        root / "configs/vit_b16_8gpu.md",
        *(root / room / "README.md" for room in rooms),
    ]


def _rooms(root: Path) -> Iterator[str]:
    return (f"megaregion/{page.parent.name}" for page in root.glob("megaregion/*/README.md"))


def commands() -> list[str]:
    """Every command of the pages once, in order: those of their blocks, then those between backquotes."""
    return list(dict.fromkeys([*_of_blocks(), *_between_backquotes()]))


def recipe(command: str) -> Smaller | None:
    """How to run a command; None for one that another test runs."""
    if _longest(command, ELSEWHERE):
        return None
    return SMALLER.get(_longest(command, SMALLER), Smaller())


def elsewhere(command: str) -> str:
    """The test that runs a command."""
    return ELSEWHERE[_longest(command, ELSEWHERE)]


def python_blocks() -> list[str]:
    """The pages' Python code."""
    return [code for language, code in FENCE.findall(_text()) if language == "python"]


def furnish(folder: Path) -> dict[str, str]:
    """Put into a folder what the README's commands read; returns the environment to run them in."""
    for name in ("tools", "configs", "slurm"):
        shutil.copytree(repository() / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "slurm" / "site.env").unlink(missing_ok=True)
    for number in range(12):
        kind = folder / "photos" / ("garden", "street")[number % 2]
        kind.mkdir(parents=True, exist_ok=True)
        scene(number + 1).save(kind / f"{number:02d}.jpg", quality=90)
    _annotate(folder / "photos", folder / "coco.json")
    for public, part in (("public/coco", "train2017"), ("coco", "val2017")):
        shutil.copytree(folder / "photos", folder / public / part)
        (folder / public / "annotations").mkdir()
        shutil.copy(folder / "coco.json", folder / public / "annotations" / f"instances_{part}.json")
    shutil.copy(folder / "photos" / "garden" / "00.jpg", folder / "photo.jpg")
    shutil.copytree(folder / "photos" / "garden", folder / "video")
    scenes = write_scenes(folder / "data" / "demo" / "scenes")
    shards = write_shards(folder / "data" / "demo" / "curated" / "shards", scenes)
    for name in ("demo", "other"):
        config = write_run(folder / "runs" / name, shards, read_info(shards).text_classes)
        settings = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))))
        (folder / "runs" / name / "config.yaml").write_text(settings)
    (folder / "RUN.yaml").write_text(RUN)
    _write_encoders(folder)
    return {
        **os.environ,
        "PYTHONPATH": str(repository()),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "PET_MASTER_PORT": str(free_port()),
        "python": sys.executable,
    }


def _annotate(photos: Path, path: Path) -> None:
    """Boxes of two classes in every photo, as COCO writes them."""
    names = sorted(photo.relative_to(photos).as_posix() for photo in photos.rglob("*.jpg"))
    images = [{"id": n, "file_name": name, "width": 192, "height": 192} for n, name in enumerate(names)]
    boxes = [(1, [12, 70, 70, 70]), (2, [110, 90, 70, 70])]
    rows = [
        {"id": 2 * n + kind, "image_id": n, "category_id": kind, "bbox": box, "area": 4900, "iscrowd": 0}
        for n in range(len(names))
        for kind, box in boxes
    ]
    classes = [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}]
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": classes}))


def _write_encoders(folder: Path) -> None:
    """Random weights under the names of released ones, saved by transformers itself."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        MLCDVisionConfig,
        MLCDVisionModel,
    )

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    rice, clip = folder / "rice-vit-large-patch14-560", folder / "openai" / "clip-vit-base-patch16"
    MLCDVisionModel(MLCDVisionConfig(**size, image_size=56, patch_size=14)).save_pretrained(rice)
    CLIPVisionModel(CLIPVisionConfig(**size, image_size=32, patch_size=16)).save_pretrained(clip)
    save_tiny_sam(folder / "sam2-small")
    for where, side in ((rice, 56), (clip, 32)):
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(where)


def _of_blocks() -> Iterator[str]:
    for language, block in FENCE.findall(_text()):
        if language or not SHELL.search(block):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(line.split("# ")[0].split())
            if command and not command.startswith("python="):
                yield command


def _between_backquotes() -> Iterator[str]:
    # `kmeans | assign` names several parts in prose.
    return (found for found in INLINE.findall(_text()) if " | " not in found)


def _longest(command: str, beginnings: Iterable[str]) -> str:
    return max((one for one in beginnings if command.startswith(one)), key=len, default="")


def _text() -> str:
    return "\n".join(page.read_text() for page in pages())
