"""Settings: contradictions are refused in one line that names the key, the value and the way out."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import repository
from toy import settings_of, toy_config

from megaregion.checkpoint.reader import config_from_dict
from megaregion.checks import batching, check_config, fitting_nodes
from megaregion.command_line import Parser
from megaregion.config import RunConfig, StageConfig
from megaregion.errors import UserError
from megaregion.settings import setting_names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__heads": 5}, "model.heads must divide model.width"),
        ({"parallel__tensor": 3}, r"parallel.tensor must divide model.heads 4, got 3; use one of 1, 2, 4"),
        (
            {"model__image_size": 33},
            "model.image_size must be a multiple of model.patch_size 8, got 33; use 32",
        ),
        ({"model__region_layers": 4}, "model.region_layers must lie in"),
        ({"head__text__sample_rate": 0.0}, r"head.text.sample_rate must lie in \(0, 1\], got 0.0; use 1.0"),
        ({"head__object__margin": 1.5}, "head.object.margin"),
        ({"parallel__zero_stage": 4}, r"parallel.zero_stage must lie in \[0, 3\], got 4"),
        ({"parallel__zero_stage": 0, "train__precision": "bf16"}, "zero_stage 0 with train.precision bf16"),
        ({"parallel__zero_stage": 3, "optimizer__name": "muon"}, "zero_stage 0, 1 or 2, got 3"),
        (
            {"model__width": 20, "model__heads": 1, "optimizer__name": "muon"},
            "model.width must be a multiple of optimizer.name muon.s 8, got 20; use 16",
        ),
        (
            {"distill__teacher": "dino", "data__packing": "native"},
            "distill.teacher needs data.packing square, got native",
        ),
        ({"data__crop_scale": (0.5, 0.2)}, "data.crop_scale"),
        ({"optimizer__warmup_steps": 4}, "optimizer.warmup_steps must lie in"),
        (
            {"stages": (StageConfig(32, 16), StageConfig(40, 20))},
            r"stages\[1\].from_image must be a multiple of train.global_batch 16 above 16, got 20; use 32",
        ),
        (
            {"stages": (StageConfig(32, 16, micro_batch=-1),)},
            r"stages\[0\].micro_batch must lie in",
        ),
        ({"stages": (StageConfig(33, 16),)}, r"stages\[0\].image_size .* got 33; use 32"),
        ({"train__fp8": True}, "train.fp8 needs train.precision bf16 and parallel.tensor 1, got fp32 and 1"),
        ({"train__activation_gib": -1.0}, "train.activation_gib"),
        ({"train__steps": 0}, r"train.steps must lie in \[1, 1e9\], got 0"),
    ],
)
def test_a_contradiction_is_refused_with_the_way_out(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(toy_config(Path("data"), Path("runs"), **changes))


def test_the_defaults_are_a_legal_run() -> None:
    check_config(RunConfig())


def test_a_global_batch_that_does_not_fit_the_ranks_names_those_that_work() -> None:
    config = toy_config(Path("data"), Path("runs"))
    with pytest.raises(UserError, match="sizes that work: 1, 2, 4, 8, 16"):
        batching(config, 3)
    assert [batching(config, ranks).micro_steps for ranks in (1, 2, 4, 8, 16)] == [8, 4, 2, 1, 1]


def test_the_micro_batch_adapts_where_it_does_not_divide_a_ranks_share() -> None:
    config = toy_config(Path("data"), Path("runs"), train__global_batch=60, train__micro_batch=8)
    assert [batching(config, ranks).micro_steps for ranks in (5, 6, 10, 15)] == [2, 2, 1, 1]
    assert [batching(config, ranks).micro_steps for ranks in (1, 2, 4)] == [10, 5, 3]
    larger = StageConfig(64, 60, micro_batch=4)
    assert [batching(config, ranks, larger).micro_batch for ranks in (1, 2, 4)] == [4, 3, 3]


def test_the_most_nodes_that_keep_the_global_batch_are_found() -> None:
    config = toy_config(Path("data"), Path("runs"), train__global_batch=48, parallel__tensor=2)
    assert [fitting_nodes(config, nodes, 2) for nodes in range(1, 9)] == [1, 2, 3, 4, 4, 6, 6, 8]
    with pytest.raises(UserError, match=r"parallel.tensor must divide the number of ranks 3"):
        fitting_nodes(config, 1, 3)


def test_the_64_gpu_run_fits_every_number_of_nodes_that_its_script_accepts() -> None:
    for file, least, most in (("vit_l14_64gpu", 4, 8), ("vit_b16_8gpu", 1, 1)):
        config = settings_of(["--config", str(repository() / "configs" / f"{file}.yaml")])
        for nodes in range(least, most + 1):
            assert fitting_nodes(config, nodes, 8) == nodes
            data_ranks = nodes * 8 // config.parallel.tensor
            for stage in (None, *config.stages):
                most = stage.micro_batch if stage and stage.micro_batch else config.train.micro_batch
                assert batching(config, data_ranks, stage).micro_batch >= most / 2, "tiny micro-batches"


def test_a_draw_that_does_not_fit_a_micro_step_is_refused() -> None:
    config = toy_config(Path("data"), Path("runs"), head__draw_images=5)
    with pytest.raises(UserError, match=r"head.draw_images must divide .* use 4"):
        batching(config, 2)


def test_a_draw_of_all_classes_fits_any_micro_step() -> None:
    config = toy_config(Path("data"), Path("runs"), head__draw_images=5, head__object__sample_rate=1.0)
    assert batching(config, 2).micro_batch == config.train.micro_batch
    config = settings_of(["--config", str(repository() / "configs" / "demo.yaml")])
    assert [batching(config, ranks).micro_steps for ranks in (1, 2)] == [2, 1]


def test_settings_survive_the_way_through_a_checkpoint() -> None:
    config = toy_config(Path("data"), Path("runs"), data__crop_scale=(0.25, 0.75))
    config = dataclasses.replace(config, stages=(StageConfig(48, 32, 0.1), StageConfig(64, 64)))
    assert config_from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_every_setting_has_a_sentence_in_the_help() -> None:
    parser = Parser()
    parser.add_settings(RunConfig())
    help_text = " ".join(parser.format_help().split())
    for name in setting_names(RunConfig()):
        assert f" --{name} " in help_text, name
    assert "Ranks that share one copy of the model" in help_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.widht", "5"], "unknown setting model.widht; did you mean model.width?"),
        (["--modle.width", "5"], "did you mean model.width?"),
        (["--model.width", "wide"], "model.width"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_an_unknown_or_unfit_flag_is_named_with_the_nearest_one(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        settings_of(arguments)


@pytest.mark.parametrize("content", ["model: {widht: 5}", "modle: {width: 5}"])
def test_an_unknown_key_in_a_file_is_named_with_the_nearest_one(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=r"did you mean model(\.width)?\?"):
        settings_of(["--config", str(file)])


def test_files_are_merged_in_order_and_flags_win(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("model: {width: 64, heads: 4}\noptimizer: {lr: 0.1, warmup_steps: 0}")
    two.write_text("model: {width: 32}")
    config = settings_of(["--config", str(one), "--config", str(two), "--optimizer.lr", "0.2"])
    assert (config.model.width, config.model.heads, config.optimizer.lr) == (32, 4, 0.2)


def test_stages_are_a_list_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "train: {global_batch: 8, steps: 9}\noptimizer: {warmup_steps: 0}\n"
        "stages:\n  - {image_size: 336, from_image: 80, lr_scale: 0.1}\n"
        "  - {image_size: 560, from_image: 160}\n"
        "model: {patch_size: 14}\n"
    )
    config = settings_of(["--config", str(file)])
    assert [config.stage(p).image_size for p in (0, 79, 80, 159, 160)] == [224, 224, 336, 336, 560]


def test_a_users_mistake_ends_with_one_line_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "tools/pretrain.py", "--model.widht", "5"],
        cwd=repository(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "megaregion: unknown setting model.widht; did you mean model.width?"
