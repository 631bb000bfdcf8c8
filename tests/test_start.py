"""Weights that exist become the start of a run: from-hf, and --init of tools/pretrain.py."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from export_runs import MODEL, convert, noise, write_run
from launch import launch, tool
from safetensors.torch import load_file, save_file
from toy import toy_config, toy_dataset

from megaregion.checkpoint.pretrained import Pretrained, open_pretrained
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.export import ExportOptions, export_checkpoint, write_start
from megaregion.models import RegionEncoder, initialise
from megaregion.models.initialisation import initial_value

SETTINGS = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
"""As the toy run's."""

TOPOLOGIES = [(1, 0), (1, 2), (1, 3), (2, 1), (2, 3)]
"""Tensor ranks of 2, and ZeRO stages."""


def mlcd_folder(folder: Path) -> Path:
    """Random weights, saved by transformers itself."""
    from transformers import CLIPImageProcessor, MLCDVisionConfig, MLCDVisionModel

    torch.manual_seed(5)
    model = MLCDVisionModel(MLCDVisionConfig(**SETTINGS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def clip_folder(folder: Path, whole: bool = False) -> Path:
    """CLIP's vision tower, alone or with its text tower."""
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(6)
    if whole:
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        CLIPModel(CLIPConfig(text_config=text, vision_config=SETTINGS)).save_pretrained(folder)
    else:
        CLIPVisionModel(CLIPVisionConfig(**SETTINGS)).save_pretrained(folder)
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_there_and_back_and_there_again_is_bit_identical(tmp_path: Path) -> None:
    for own in ({}, {"region_weights": "separate"}, {"region_start": "learned"}):
        here = tmp_path / "-".join(["run", *own])
        write_run(here / "run", 2, dataclasses.replace(MODEL, **own))
        for options in (ExportOptions(), ExportOptions(torch.bfloat16), ExportOptions(regions=True)):
            name = f"{options.dtype}-{options.regions}"
            export_checkpoint(here / "run", here / name / "one", options)
            write_start(here / name / "one", here / name / "start")
            export_checkpoint(here / name / "start", here / name / "two", options)
            for file in ("model.safetensors", "config.json", "preprocessor_config.json"):
                first, second = (here / name / each / file for each in ("one", "two"))
                assert first.read_bytes() == second.read_bytes(), f"{name} {file}"


def test_transformers_own_folder_comes_back_with_the_same_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mlcd_folder(tmp_path / "theirs")
    assert convert("from-hf", folder, tmp_path / "start", "--image-size", "64") == 0
    out = capsys.readouterr().out
    assert "64 px, patch 8 px" in out
    assert "--init" in out
    settings = yaml.safe_load((tmp_path / "start" / "model.yaml").read_text())
    assert settings["model"] | {"image_size": 64, "width": 32, "depth": 3} == settings["model"]
    export_checkpoint(tmp_path / "start", tmp_path / "back")
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    ours = {key.removeprefix("vision_model."): value for key, value in ours.items()}
    theirs = {key.removeprefix("vision_model."): value for key, value in theirs.items()}
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert convert("check", folder, tmp_path / "start") == 0


def begin_and_save(folder: str, dataset: str, output: str) -> None:
    """On every rank: begin with a folder under many topologies, and save at once."""
    from megaregion.errors import StopRequest
    from megaregion.parallel import topology
    from megaregion.training.trainer import Trainer

    for tensor, stage in TOPOLOGIES:
        config = toy_config(
            Path(dataset), Path(output), f"tp{tensor}-zero{stage}", parallel__tensor=tensor,
            parallel__zero_stage=stage, init=folder, train__steps=10, head__draw_images=0,
        )  # fmt: skip
        place = topology.join(tensor)
        (Path(output) / config.name).mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        trainer = Trainer(config, place, StopRequest(), begin=open_pretrained(Path(folder)).fill)
        assert trainer.state.finish()
        for group in (place.data_group, place.tensor_group):
            torch.distributed.destroy_process_group(group)


def test_every_topology_begins_with_the_same_weights_and_exports_the_same_bytes(tmp_path: Path) -> None:
    folder, dataset = mlcd_folder(tmp_path / "theirs"), toy_dataset(tmp_path / "shards")
    launch(begin_and_save, 2, str(folder), str(dataset), str(tmp_path / "runs"))
    write_start(folder, tmp_path / "start")
    export_checkpoint(tmp_path / "start", tmp_path / "expected")
    for tensor, stage in TOPOLOGIES:
        name = f"tp{tensor}-zero{stage}"
        export_checkpoint(tmp_path / "runs" / name, tmp_path / name)
        assert weights(tmp_path / name) == weights(tmp_path / "expected"), name


def pretrain(dataset: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    small = [
        "--data.workers=0", "--data.regions_per_image=3", "--head.embedding_dim=16", "--head.draw_images=1",
        "--train.global_batch=4", "--train.micro_batch=2", "--train.precision=fp32",
        "--optimizer.warmup_steps=0", "--optimizer.lr=1e-3", "--train.steps=10", "--name=run",
        f"--data.path={dataset}", f"--output={output}",
    ]  # fmt: skip
    return tool("tools/pretrain.py", *small, *flags)


def test_a_folder_of_transformers_trains_on_for_ten_steps_and_exports_back(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder, dataset = mlcd_folder(tmp_path / "theirs"), toy_dataset(tmp_path / "shards")
    write_start(folder, tmp_path / "start", image_size=40)
    flags = ("--config", str(tmp_path / "start" / "model.yaml"), "--model.region_layers=2")
    done = pretrain(dataset, tmp_path, *flags, f"--init={tmp_path / 'start'}", "--stop-at=6")
    assert done.returncode == 0, done.stderr
    # A restart goes on from its own checkpoint, even if what it began with is gone.
    shutil.move(tmp_path / "start", tmp_path / "moved")
    flags = ("--config", str(tmp_path / "moved" / "model.yaml"), "--model.region_layers=2")
    done = pretrain(dataset, tmp_path, *flags, f"--init={tmp_path / 'start'}", "--resume=auto")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))
    assert convert("to-hf", tmp_path / "run", tmp_path / "back", "--check") == 0
    before, after = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(tmp_path / "back")
    assert after.config.image_size == 40
    images = noise(1, 3, 40, 40)
    with torch.no_grad():
        moved = (before(images).pooler_output - after(images).pooler_output).abs().max()
    assert 1e-4 < moved < 1.0, "ten small steps move the features a little"
    # Other settings than the weights', and a start that is no run, are one line each.
    done = pretrain(dataset, tmp_path / "x", f"--init={folder}", "--model.width=48")
    assert done.returncode == 2
    assert "the weights in" in done.stderr
    assert "model.width 32 and not 48" in done.stderr
    shutil.copytree(tmp_path / "moved", tmp_path / "y" / "run")
    done = pretrain(dataset, tmp_path / "y", *flags, "--resume=auto")
    assert done.returncode == 2
    assert "holds an encoder to begin with and no run to go on with" in done.stderr


def test_own_region_weights_begin_as_copies_of_the_blocks(tmp_path: Path) -> None:
    source = write_run(tmp_path / "run").vit
    model = RegionEncoder(dataclasses.replace(MODEL, region_weights="separate", image_size=96), 8)
    initialise(model, seed=9)
    open_pretrained(tmp_path / "run").fill(model.vit)
    block = model.vit.blocks[-1]
    assert torch.equal(block.region.mlp.fc1.weight, source.blocks[-1].mlp.fc1.weight)
    assert torch.equal(block.attention.qkv.weight, source.blocks[-1].attention.qkv.weight)


@pytest.mark.parametrize("whole", [False, True])
def test_a_clip_tower_loses_its_positions_with_a_notice(
    tmp_path: Path, whole: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from megaregion.export.parity import load_transformer

    folder = clip_folder(tmp_path / "clip", whole)
    assert convert("from-hf", folder, tmp_path / "start") == 0
    out = capsys.readouterr().out
    assert "absolute positions are dropped" in out
    assert "left out" not in out
    vit = load_transformer(open_pretrained(tmp_path / "start"))
    assert vit.config.activation == "quick_gelu"
    theirs = {key.split("vision_model.")[-1]: t for key, t in load_file(folder / "model.safetensors").items()}
    assert torch.equal(vit.blocks[1].mlp.fc2.weight, theirs["encoder.layers.1.mlp.fc2.weight"])
    assert vit.class_pos_emb.abs().max() > 0
    assert convert("check", folder, tmp_path / "start") == 2
    assert "convert it with from-hf" in capsys.readouterr().err


def test_what_cannot_be_converted_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = mlcd_folder(tmp_path / "good")
    capsys.readouterr()  # transformers misses torchvision, and says so.
    config = json.loads((good / "config.json").read_text())
    tensors = load_file(good / "model.safetensors")
    first = next(iter(key for key in tensors if key.endswith("q_proj.weight")))

    def spoilt(name: str, settings: dict[str, Any] | None = None, **changed: torch.Tensor | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | (settings or {})))
        kept = {key: value for key, value in (tensors | changed).items() if value is not None}
        save_file(kept, folder / "model.safetensors")
        return folder

    def complaint(folder: Path, *flags: str) -> str:
        assert convert("from-hf", folder, tmp_path / "out", *flags) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert not (tmp_path / "out").exists()
        return lines[0]

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty is no HuggingFace folder (no config.json)" in complaint(empty)
    assert "nowhere is no HuggingFace folder" in complaint(tmp_path / "nowhere")
    assert "model_type siglip_vision_model, which is another architecture" in complaint(
        spoilt("siglip", {"model_type": "siglip_vision_model"})
    )
    assert "layout llava-onevision-1.5" in complaint(spoilt("llava", {"model_type": "rice_vit"}))
    assert "has the type I8, which is not supported" in complaint(
        spoilt("int8", **{first: tensors[first].to(torch.int8)})
    )
    assert "image_size must be a multiple of model.patch_size 8, got 36; use" in complaint(
        spoilt("size", {"image_size": 36})
    )
    assert "image_size must be one whole number, got [32, 64]" in complaint(
        spoilt("list", {"image_size": [32, 64]})
    )
    assert "hidden_act silu is not supported" in complaint(spoilt("act", {"hidden_act": "silu"}))
    assert "num_key_value_groups 2 is not supported" in complaint(spoilt("gqa", {"num_key_value_groups": 2}))
    assert "holds no tensor encoder.layers.0.self_attn.q_proj.weight" in complaint(
        spoilt("hole", **{first: None})
    )
    assert "belong to different models" in complaint(spoilt("shape", {"intermediate_size": 128}))
    assert "holds encoder.layers.2.layer_norm1.bias, but config.json names 2 layers" in complaint(
        spoilt("fewer", {"num_hidden_layers": 2})
    )
    assert "holds no tensor encoder.layers.3." in complaint(spoilt("more", {"num_hidden_layers": 4}))
    for value in (float("nan"), float("inf")):
        bad = tensors[first].clone()
        bad[0, 0] = value
        assert f"{first} holds values that are not finite" in complaint(spoilt(f"is-{value}", **{first: bad}))
    assert "model.norm_eps must lie in" in complaint(spoilt("eps", {"layer_norm_eps": -1}))
    assert "does not fit config.json" in complaint(spoilt("rows", **{first: tensors[first][:-1]}))
    assert "--image-size must be a multiple of the patch of 8 px, got 50; use 48" in complaint(
        good, "--image-size", "50"
    )
    missing = spoilt("missing")
    index = {"weight_map": {first: "model-00001-of-00002.safetensors"}}
    (missing / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors is missing; copy the folder again" in complaint(missing)
    (missing / "model.safetensors.index.json").unlink()
    (missing / "model.safetensors").rename(missing / "pytorch_model.bin")
    assert "pickles such as pytorch_model.bin are not read" in complaint(missing)
    cut = spoilt("cut")
    (cut / "model.safetensors").write_bytes(weights(good)[:-10])
    assert "cut/model.safetensors cannot be read" in complaint(cut)
    (cut / "config.json").write_text("{")
    assert "cut/config.json cannot be read" in complaint(cut)


def test_a_start_of_other_settings_names_them_all() -> None:
    model = RegionEncoder(dataclasses.replace(MODEL, width=32, norm_eps=1e-6), 8)
    start = dataclasses.replace(_nothing(), model=MODEL)
    with pytest.raises(UserError, match=r"model.width 64 and not 32, model.norm_eps 1e-05 and not 1e-06"):
        start.fill(model.vit)


def test_registers_begin_untrained_where_there_were_none_and_only_there(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "run").vit
    start, config = open_pretrained(tmp_path / "run"), dataclasses.replace(MODEL, registers=4)
    model = RegionEncoder(config, 8)
    initialise(model, 5)
    drawn = model.vit.register_tokens.detach().clone()
    start.fill(model.vit)
    assert torch.equal(model.vit.register_tokens, drawn)
    assert torch.equal(model.vit.class_embedding, whole.class_embedding)
    assert start.advice(RunConfig(model=config)) == ["they have no registers: the run's 4 begin untrained"]
    assert start.advice(RunConfig(model=MODEL)) == []
    for theirs, ours in ((4, 2), (4, 0)):
        start = dataclasses.replace(_nothing(), model=dataclasses.replace(MODEL, registers=theirs))
        other = RegionEncoder(dataclasses.replace(MODEL, registers=ours), 8)
        with pytest.raises(UserError, match=f"need model.registers {theirs} and not {ours}; set them"):
            start.fill(other.vit)


def test_a_query_of_region_tokens_is_taken_drawn_or_left_out_and_what_is_not_taken_is_told(
    tmp_path: Path,
) -> None:
    learned = dataclasses.replace(MODEL, region_start="learned")
    theirs = write_run(tmp_path / "learned", config=learned).vit.region_query
    write_run(tmp_path / "class")
    drawn = initial_value("vit.region_query", theirs.shape, learned, seed=5)
    for source, expected, told in (
        ("learned", theirs, []),
        ("class", drawn, ["they have no learned query of region tokens: the run's begins untrained"]),
    ):
        model, start = RegionEncoder(learned, 8), open_pretrained(tmp_path / source)
        initialise(model, 5)
        start.fill(model.vit)
        assert torch.equal(model.vit.region_query, expected)
        assert start.advice(RunConfig(model=learned)) == told
    start.fill(RegionEncoder(MODEL, 8).vit)
    [left] = open_pretrained(tmp_path / "learned").advice(RunConfig(model=MODEL))
    assert left == "their learned query of region tokens is left out: model.region_start is class"


def _nothing() -> Pretrained:
    class Source:
        folder = Path("somewhere")

    return Pretrained(Source(), MODEL, RunConfig().data)  # type: ignore[arg-type]
