"""to-hf: a checkpoint of any topology as a folder that other libraries load."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_runs import MODEL, convert, noise, pieces, write_run
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from toy_scenes import write_run as write_toy_run
from toy_scenes import write_scenes, write_shards

import convert_checkpoint
from megaregion.checkpoint.format import publish, write_pieces
from megaregion.checkpoint.pretrained import open_pretrained
from megaregion.config import ModelConfig, RegionStart, RunConfig
from megaregion.data.info import read_info
from megaregion.errors import UserError
from megaregion.evaluation.network import open_run
from megaregion.evaluation.study import StudyConfig, evaluate
from megaregion.export import ExportOptions, export_checkpoint
from megaregion.export.layouts import LAYOUTS
from megaregion.export.parity import load_transformer
from megaregion.models import RegionEncoder, VisionTransformer, initialise
from megaregion.schemas.evaluation import write_evaluation


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_loaded_export_gives_our_features_at_any_size(tmp_path: Path, activation: str) -> None:
    from transformers import AutoModel, MLCDVisionModel

    vit = write_run(tmp_path / "run", ranks=2, config=dataclasses.replace(MODEL, activation=activation)).vit
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    theirs, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(theirs, MLCDVisionModel)
    assert not any(report.values()), report
    for size in ((64, 64), (96, 96), (48, 80)):
        images = noise(2, 3, *size)
        with torch.no_grad():
            tokens, output = vit(images).image, theirs(pixel_values=images)
            pooled = vit.pool(tokens[:, 0])
        torch.testing.assert_close(output.last_hidden_state, tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.pooler_output, pooled, atol=1e-5, rtol=1e-5)


def test_the_command_offers_every_layout() -> None:
    assert tuple(LAYOUTS) == convert_checkpoint.FORMATS


def test_a_tensor_parallel_checkpoint_exports_to_the_same_bytes(tmp_path: Path) -> None:
    weights = []
    for ranks in (1, 2, 4):
        write_run(tmp_path / f"run{ranks}", ranks)
        export_checkpoint(tmp_path / f"run{ranks}", tmp_path / f"out{ranks}")
        weights.append((tmp_path / f"out{ranks}" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


def test_the_processor_resizes_crops_and_normalises_as_in_training(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    write_run(tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = RunConfig().data
    expected = (pixels / 255.0 - np.array(data.mean)) / np.array(data.std)
    values = processor(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(values[0].transpose(1, 2, 0), expected, atol=1e-5)
    wide = Image.fromarray(np.tile(pixels, (2, 3, 1)))
    assert processor(images=wide, return_tensors="np")["pixel_values"].shape == (1, 3, 64, 64)


def test_the_code_of_the_model_card_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = write_run(tmp_path / "run").vit
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    [load] = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    scope: dict[str, object] = {"image": Image.fromarray(np.full((80, 96, 3), 90, dtype=np.uint8))}
    monkeypatch.chdir(tmp_path / "out")
    exec(load, scope)
    with torch.no_grad():
        ours = vit(scope["pixels"]).image
    torch.testing.assert_close(scope["features"].last_hidden_state, ours, atol=1e-5, rtol=1e-5)


def test_the_card_tells_the_run_and_its_licence(tmp_path: Path) -> None:
    write_run(tmp_path / "run", ranks=2)
    export_checkpoint(tmp_path / "run", tmp_path / "out", ExportOptions(license="cc-by-4.0"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for told in (
        "license: cc-by-4.0", "run `little`, step 12", "1,234 images, 37 object clusters", "cccccccccccc",
        "12 of 100,000", "1.5 (mean", "2 tensor x 1 data", "has not been evaluated",
    ):  # fmt: skip
        assert told in card, told


def test_every_table_of_a_real_evaluation_arrives_in_the_card_with_its_intervals(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path / "shards", write_scenes(tmp_path / "scenes"))
    run = tmp_path / "run"
    write_toy_run(run, dataset, read_info(dataset).text_classes)
    evaluation = evaluate(open_run(run), StudyConfig(tmp_path / "scenes", dataset, seeds=2)).evaluation()
    write_evaluation(run / "evaluation.json", evaluation)
    export_checkpoint(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Measured at step 40 on the `test` split" in card
    sections = dict(re.findall(r"### (.*?)\n(.*?)(?=\n###|\Z)", card, re.S))
    assert list(sections) == [table.title for table in evaluation.tables]
    intervals = 0
    for table in evaluation.tables:
        lines = re.findall(r"^\| (.*) \|$", sections[table.title], re.M)
        shown = {name: cells for name, *cells in (line.split(" | ") for line in lines)}
        for encoder, cells in table.rows.items():
            for told, cell in zip(shown[encoder], cells.values(), strict=True):
                ends = None if cell is None else [100 * end for end in (cell.mean, cell.low, cell.high)]
                assert told == ("-" if ends is None else "{:.1f} [{:.1f}, {:.1f}]".format(*ends))
                intervals += cell is not None
    assert intervals > 50


def test_an_evaluation_that_cannot_be_read_ends_an_export_only_if_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    bad = tmp_path / "run" / "evaluation.json"
    for content, reason in (("{}", "lacks run"), ("[]", "must be an object, got []")):
        bad.write_text(content)
        with pytest.raises(UserError, match=rf"--evaluation: .*{re.escape(reason)}"):
            export_checkpoint(tmp_path / "run", tmp_path / "x", ExportOptions(evaluation=bad))
    assert convert("to-hf", tmp_path / "run", tmp_path / "x", "--evaluation", bad) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    export_checkpoint(tmp_path / "run", tmp_path / "y")
    assert "could not be read" in (tmp_path / "y" / "README.md").read_text()


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"region_weights": "separate"}, "weights of their own"),
        ({"region_start": "learned"}, "a query of their own"),
    ],
)
def test_what_region_tokens_have_of_their_own_stays_behind_and_the_card_says_so(
    tmp_path: Path, own: dict[str, Any], told: str
) -> None:
    from transformers import AutoModel

    vit = write_run(tmp_path / "run", config=dataclasses.replace(MODEL, **own)).vit
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    theirs, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    images = noise(1, 3, 64, 64)
    with torch.no_grad():
        output = theirs(pixel_values=images).last_hidden_state
        torch.testing.assert_close(output, vit(images).image, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert told in card
    assert ("no loss has read" in card) == ("region_start" in own)


def test_bf16_export_holds_the_rounded_weights(tmp_path: Path) -> None:
    from transformers import AutoModel

    write_run(tmp_path / "run")
    exported = export_checkpoint(tmp_path / "run", tmp_path / "out", ExportOptions(torch.bfloat16))
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rounded = load_transformer(open_pretrained(exported.checkpoint), torch.bfloat16)
    assert torch.equal(model.post_layernorm.weight.float(), rounded.post_norm.weight)


def test_the_command_line_tells_what_it_wrote_and_checks_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", ranks=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    for number, source in enumerate((tmp_path / "run", checkpoints, checkpoints / "step-00000012")):
        assert convert("to-hf", source, tmp_path / f"out{number}", "--dtype", "bf16", "--check") == 0
        out = capsys.readouterr().out
        assert str(checkpoints / "step-00000012") in out
        assert "64 px, patch 16 px" in out
        assert "features equal to" in out


def test_a_wrong_export_does_not_pass_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import megaregion.export.layouts as layouts

    write_run(tmp_path / "run")
    right = layouts.mlcd_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            layouts,
            "mlcd_tensors",
            lambda *a: ((key, t.flip(0) if "q_proj" in key else t) for key, t in right(*a)),
        )
        assert convert("to-hf", tmp_path / "run", tmp_path / "out", "--check") == 2
    assert "do not use it" in capsys.readouterr().err


def test_mistakes_end_in_one_clear_line_and_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", ranks=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    run, out = tmp_path / "run", tmp_path / "out"
    file = run / "checkpoints" / "step-00000012" / "rank-00001.safetensors"
    whole = file.read_bytes()

    def complaint(source: Path, target: Path) -> str:
        assert convert("to-hf", source, target) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    assert "nowhere holds no finished checkpoint" in complaint(tmp_path / "nowhere", out)
    assert "empty holds no finished checkpoint" in complaint(tmp_path / "empty", out)
    assert "full exists and is not empty" in complaint(run, tmp_path / "full")
    assert "precious.txt is a file" in complaint(run, tmp_path / "full" / "precious.txt")
    assert "cannot be written" in complaint(run, tmp_path / "full" / "precious.txt" / "out")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "rank-00001.safetensors does not match its checksum" in complaint(run, out)
    file.write_bytes(whole[:-1])
    assert re.search(r"rank-00001.safetensors should have \d+ bytes", complaint(run, out))
    file.unlink()
    assert "rank-00001.safetensors should have" in complaint(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "run"]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_registers_are_refused_where_a_format_has_no_place_for_them(tmp_path: Path, layout: str) -> None:
    write_run(tmp_path / "run", config=dataclasses.replace(MODEL, registers=4))
    with pytest.raises(UserError, match=r"model.registers 4 of .* no place in .*--regions"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", ExportOptions(layout=layout))
    assert not (tmp_path / "out").exists()


def test_registers_pass_the_check_and_no_class_of_transformers_leaves_them_out_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel

    write_run(tmp_path / "run", config=dataclasses.replace(MODEL, registers=4))
    assert convert("to-hf", tmp_path / "run", tmp_path / "out", "--regions", "--check") == 0
    assert "4 registers" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    model = RegionEncoder(MODEL, embedding_dim=32)
    initialise(model, seed=0)
    unfinished = tmp_path / "run" / "checkpoints" / "new.tmp"
    unfinished.mkdir(parents=True)
    write_pieces(unfinished, 0, pieces(model, 0, 2))
    facts = {"step": 1, "position": 0, "config": dataclasses.asdict(RunConfig(model=MODEL)), "dataset": {}}
    publish(unfinished, tmp_path / "run" / "checkpoints" / "step-00000001", facts)
    with pytest.raises(UserError, match=r"of body\S+blocks\.0\.attention\.qkv\.weight are missing"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")


def test_a_full_disk_leaves_no_half_written_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megaregion.export.huggingface as huggingface

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_run(tmp_path / "run")
    monkeypatch.setattr(huggingface, "write_json", full)
    with pytest.raises(UserError, match=r"out cannot be written: .*No space left"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_empty_folder_may_be_the_target(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}


def test_conversion_needs_neither_engine_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('deepspeed', 'megatron', 'transformers')));"
        "from pathlib import Path; from megaregion.export import export_checkpoint, write_start;"
        "export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]));"
        "write_start(Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    write_run(tmp_path / "run", ranks=2)
    paths = [str(tmp_path / name) for name in ("run", "out", "back")]
    subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert (tmp_path / "back" / "model.yaml").exists()


def test_several_files_hold_the_same_weights_as_one(tmp_path: Path) -> None:
    from transformers import AutoModel

    write_run(tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "one")
    export_checkpoint(tmp_path / "run", tmp_path / "many", ExportOptions(shard_bytes=50_000))
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = load_file(tmp_path / "one" / "model.safetensors"), {}
    for name in files:
        many.update(load_file(tmp_path / "many" / name))
    assert set(index["weight_map"]) == set(one) == set(many)
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    _, report = AutoModel.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not any(report.values()), report


def llava_patches(weights: dict[str, Tensor], config: dict[str, object], images: Tensor) -> Tensor:
    """Patch features as LLaVA-OneVision-1.5's tower computes them, written from its description."""
    heads, patch, eps = int(config["num_heads"]), int(config["patch_size"]), float(config["layer_norm_eps"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = F.conv2d(images, weights["visual.patch_embed.proj.weight"], stride=patch)
    rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((weights["visual.class_embedding"].expand(len(x), 1, -1), x), dim=1)
    x = norm(x, "visual.pre_layernorm")
    width = x.shape[-1] // heads
    frequencies = 1.0 / 10000 ** (torch.arange(0, width // 2, 2) / (width // 2))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    angles = (places[:, :, None] * frequencies).flatten(1)
    angles = torch.cat((weights["visual.class_pos_emb"], angles)).repeat(1, 2)

    def turn(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        return y * angles.cos()[:, None] + torch.cat((-second, first), dim=-1) * angles.sin()[:, None]

    for index in range(int(config["depth"])):
        name = f"visual.blocks.{index}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        query, key, value = qkv.reshape(*x.shape[:2], 3, heads, width).permute(2, 0, 1, 3, 4)
        query, key, value = (y.transpose(1, 2) for y in (turn(query), turn(key), value))
        weight = (query @ key.transpose(2, 3) / width**0.5).softmax(-1)
        x = x + linear((weight @ value).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + linear(hidden, f"{name}.mlp.fc2")
    return x[:, 1:]


def test_the_llava_layout_gives_our_patch_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit = write_run(tmp_path / "run", ranks=2).vit
    assert convert("to-hf", tmp_path / "run", tmp_path / "out", "--format", "llava-onevision-1.5") == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "rice_vit"
    images = noise(2, 3, 64, 96)
    with torch.no_grad():
        expected = vit(images).image[:, 1:]
    torch.testing.assert_close(llava_patches(weights, config, images), expected, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    for told in ("patch merger", "multiples of 32 work", "Set `text_hidden_size` there"):
        assert told in card, told
    capsys.readouterr()
    for flag in ("--regions", "--check"):
        flags = ("--format", "llava-onevision-1.5", flag)
        assert convert("to-hf", tmp_path / "run", tmp_path / "out2", *flags) == 2
        assert f"{flag} " in capsys.readouterr().err
    write_run(tmp_path / "other", config=dataclasses.replace(MODEL, rope_theta=100.0))
    with pytest.raises(UserError, match=r"model.rope_theta 100 .* cannot be written"):
        export_checkpoint(tmp_path / "other", tmp_path / "x", ExportOptions(layout="llava-onevision-1.5"))


def test_the_llava_layout_fits_the_llm_that_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    llm = tmp_path / "llm.json"
    flags = ("--format", "llava-onevision-1.5", "--llm", llm)
    for number, content in enumerate(({"hidden_size": 96}, {"text_config": {"hidden_size": 96}})):
        llm.write_text(json.dumps(content))
        out = tmp_path / f"out{number}"
        assert convert("to-hf", tmp_path / "run", out, *flags) == 0
        assert json.loads((out / "config.json").read_text())["text_hidden_size"] == 96
        assert "feeds an LLM of width 96" in (out / "README.md").read_text()
    assert convert("to-hf", tmp_path / "run", tmp_path / "x", *flags[2:]) == 2
    assert "--llm is not for --format mlcd" in capsys.readouterr().err
    for content in ("{}", "[]", "{", '{"hidden_size": "wide"}'):
        llm.write_text(content)
        assert convert("to-hf", tmp_path / "run", tmp_path / "x", *flags) == 2
        assert "llm.json says no hidden_size" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


SHAPES = {
    "S/16": ModelConfig(width=384, depth=12, heads=6, mlp_width=1536),
    "B/16": ModelConfig(width=768, depth=12, heads=12, mlp_width=3072),
    "L/14": ModelConfig(patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096),
}

SIZES = ((224, 224), (336, 336), (448, 336))
"""Heights and widths of images."""


def parity(folder: Path, config: ModelConfig, ranks: int) -> None:
    """All features of an exported checkpoint in transformers within 1e-5 of ours, relative to the largest.

    Features that no norm follows grow with depth (to about 5 here), and the roundings of two orders of the
    same sums with them.
    """
    from transformers import AutoModel

    vit: VisionTransformer = write_run(folder / "run", ranks, config).vit
    export_checkpoint(folder / "run", folder / "out")
    theirs = AutoModel.from_pretrained(folder / "out").eval()
    for height, width in SIZES:
        images = noise(1, 3, height, width)
        with torch.no_grad():
            tokens, output = vit(images).image, theirs(pixel_values=images)
            pooled = vit.pool(tokens[:, 0])
        found = {
            "patches": (output.last_hidden_state - tokens)[:, 1:],
            "class": (output.last_hidden_state - tokens)[:, 0],
            "pooled": output.pooler_output - pooled,
        }
        largest = max(1.0, float(tokens.abs().max()))
        for name, difference in found.items():
            assert difference.abs().max() <= 1e-5 * largest, f"{name} at {height} x {width}"


@pytest.mark.parametrize("shape", list(SHAPES))
def test_widths_and_sizes_of_real_encoders_equal_transformers(tmp_path: Path, shape: str) -> None:
    config = SHAPES[shape]
    parity(tmp_path, dataclasses.replace(config, depth=1, region_layers=1), ranks=2)


@pytest.mark.drill
@pytest.mark.parametrize("shape", list(SHAPES))
def test_real_encoders_of_full_depth_equal_transformers(tmp_path: Path, shape: str) -> None:
    parity(tmp_path, SHAPES[shape], ranks=2)


def test_check_compares_any_two_encoders_on_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    write_run(tmp_path / "other", config=dataclasses.replace(MODEL, norm_eps=1e-2))
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    export_checkpoint(tmp_path / "run", tmp_path / "bf16", ExportOptions(torch.bfloat16))
    (tmp_path / "photos").mkdir()
    for name, side in (("a.png", 70), ("b.jpg", 33)):
        Image.fromarray(np.full((side, 50, 3), side, dtype=np.uint8)).save(tmp_path / "photos" / name)
    photos = ("--images", tmp_path / "photos")
    assert convert("check", tmp_path / "run", tmp_path / "out", *photos) == 0
    out = capsys.readouterr().out
    assert "on 2 images" in out
    assert [line.split("  ")[0] for line in out.splitlines() if " x " in line] == [
        "64 x 64",
        "80 x 80",
        "80 x 64",
    ]
    assert convert("check", tmp_path / "out", tmp_path / "other") == 2
    assert "differ from those of" in capsys.readouterr().err
    assert convert("check", tmp_path / "out", tmp_path / "bf16") == 2
    assert convert("check", tmp_path / "out", tmp_path / "bf16", "--tolerance", "0.1") == 0
    capsys.readouterr()
    assert convert("check", tmp_path / "out", tmp_path / "photos") == 2
    assert "photos holds no finished checkpoint" in capsys.readouterr().err
    assert convert("check", tmp_path / "run", tmp_path / "out", "--images", tmp_path / "run") == 2
    assert "--images: " in capsys.readouterr().err


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which a call raised this process's memory at most."""
    from benchmark.memory import PeakMemory

    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.now()
    work()
    return memory.peak() - before


def test_memory_holds_one_parameter_and_not_the_model(tmp_path: Path) -> None:
    config = ModelConfig(
        image_size=32, patch_size=16, width=512, depth=6, heads=8, mlp_width=4096, region_layers=1
    )
    write_run(tmp_path / "run", config=config, drawn=False)
    largest = 4 * config.width * config.mlp_width
    exported = None

    def export() -> None:
        nonlocal exported
        exported = export_checkpoint(tmp_path / "run", tmp_path / "out", ExportOptions(torch.bfloat16))

    peak = peak_of(export)
    assert exported is not None
    assert 4 * exported.parameters > 10 * largest
    assert peak < 5 * largest


def test_the_conversion_benchmark_runs_at_any_size(tmp_path: Path) -> None:
    from benchmark.convert import measure_conversion

    cases = list(measure_conversion(tmp_path, "little", MODEL, ranks=2))
    assert [case.unit for case in cases] == ["s", "MB"] * 3
    assert all(case.ours > 0 and case.goal == 0 for case in cases)


NEW = ("accelerate==1.15.0",)
OLD = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2", *NEW)
"""The last release of the 4 series with what it pins, and what device_map needs."""


def installed(folder: Path, *packages: str) -> Path:
    """A folder with packages of the index, to stand in front of this environment's."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *packages], check=True, timeout=600)
    return folder


def python(*words: object, first: Sequence[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with some folders in front of the others."""
    paths = os.pathsep.join(filter(None, (*map(str, first), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *map(str, words)], env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


@pytest.mark.drill
def test_transformers_4_and_5_load_what_was_exported_in_every_way_and_with_right_frequencies(
    tmp_path: Path,
) -> None:
    images = noise(2, 3, 64, 96)
    torch.save(images, tmp_path / "images.pt")
    sought = {}
    for name, registers in (("regions", 0), ("plain", 0), ("registers", 4)):
        start: RegionStart = "learned" if registers else "class"
        config = dataclasses.replace(MODEL, registers=registers, region_start=start)
        vit = write_run(tmp_path / "runs" / name, ranks=2, config=config).vit
        options = ExportOptions(regions=name != "plain", shard_bytes=99_999)
        export_checkpoint(tmp_path / "runs" / name, tmp_path / name, options)
        with torch.no_grad():
            tokens = vit(images).image
            sought[name] = {"tokens": tokens, "pooled": vit.pool(tokens[:, 0])}
    for release, packages in (("5.", NEW), ("4.57.", OLD)):
        first = installed(tmp_path / release, *packages)
        for folder, expected in sought.items():
            words = [tmp_path / folder, tmp_path / "images.pt", tmp_path / "out.pt"]
            done = python(Path(__file__).with_name("loaded_export.py"), *words, first=[first])
            assert done.returncode == 0, done.stderr
            found = torch.load(tmp_path / "out.pt", weights_only=True)
            assert found.pop("version").startswith(release)
            assert len(found) == (8 if folder == "plain" else 9)
            expected.update({name: each for name, each in found["usual"].items() if name not in expected})
            for way, features in found.items():
                assert features["frequencies"].dtype == torch.float32
                bound = 0.03 if "float16" in way else 1e-5
                for name, feature in features.items():
                    off = float((feature - expected[name]).abs().max() / expected[name].abs().max())
                    most = 1e-7 if name == "frequencies" else bound
                    assert off <= most, (release, folder, way, name, off)


PEERS = ("llavaction==0.0.1", "nemo-automodel==0.7.0")
"""A copy of LLaVA-NeXT, and NVIDIA's port of LLaVA-OneVision-1.5."""


@pytest.mark.drill
def test_llava_next_and_the_rice_tower_of_llava_onevision_give_the_exports_features(tmp_path: Path) -> None:
    vit = write_run(tmp_path / "run", ranks=2).vit
    export_checkpoint(tmp_path / "run", tmp_path / "plain")
    (tmp_path / "llm.json").write_text('{"hidden_size": 96}')
    llava = ("--format", "llava-onevision-1.5", "--llm", tmp_path / "llm.json")
    assert convert("to-hf", tmp_path / "run", tmp_path / "tower", *llava) == 0
    images = noise(2, 3, 64, 96)
    torch.save(images, tmp_path / "images.pt")
    from transformers import AutoModel

    with torch.no_grad():
        patches = vit(images).image[:, 1:]
        states = AutoModel.from_pretrained(tmp_path / "plain")(
            images, output_hidden_states=True
        ).hidden_states
    packages = installed(tmp_path / "peers", *PEERS)
    for release, first in (("5.", []), ("4.57.", [installed(tmp_path / "4.57.", *OLD)])):
        script = Path(__file__).with_name("peers_export.py")
        done = python(script, packages, tmp_path / "out.pt", first=first)
        assert done.returncode == 0, done.stderr
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        # It reads the last but one layer in bfloat16.
        off = (found["llava_next"] - states[-2][:, 1:]).abs().max() / states[-2].abs().max()
        assert off < 0.03, (release, off)
        if release == "5.":
            torch.testing.assert_close(found["rice"], patches, atol=1e-5, rtol=0)
            assert "MLCD tower" in found["as_clip"]


MATTER = (
    "save_load", "hidden_states_output", "attention_outputs", "retain_grad_hidden_states_attentions",
    "training", "training_gradient_checkpointing", "training_gradient_checkpointing_use_reentrant_true",
    "can_init_all_missing_weights", "init_weights_can_init_buffers", "can_be_initialized_on_meta",
    "batching_equivalence", "load_with_mismatched_shapes", "model_outputs_equivalence",
    "can_capture_specific_layers_hidden_states", "can_set_attention_dynamically", "bc_torch_dtype",
)  # fmt: skip
"""Tests of transformers that must not skip an encoder, without their ``test_``."""


@pytest.mark.drill
def test_the_model_tests_of_transformers_pass_on_an_export(tmp_path: Path) -> None:
    """Those of its source distribution, which holds what all models' tests share but no model's own file."""
    from transformers import __version__

    source = f"transformers=={__version__}"
    fetch = ["pip", "download", "-q", "--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", *fetch, "-d", tmp_path, source], check=True, timeout=600)
    with tarfile.open(tmp_path / f"transformers-{__version__}.tar.gz") as archive:
        tests = [each for each in archive if each.name.split("/")[1:2] == ["tests"]]
        archive.extractall(tmp_path, tests, filter="data")
    (tmp_path / f"transformers-{__version__}" / "tests").rename(theirs := tmp_path / "theirs")
    # Left out of it are generation, which is not for an encoder, and exporters, of which ONNX is tested here.
    for module, name in (("exporters/test_export", "Export"), ("generation/test_utils", "Generation")):
        (theirs / module).parent.mkdir()
        (theirs / f"{module}.py").write_text(f"class {name}TesterMixin:\n    pass\n")
    write_run(tmp_path / "run", config=dataclasses.replace(MODEL, depth=2, region_layers=1))
    export_checkpoint(tmp_path / "run", tmp_path / "out", ExportOptions(regions=True))
    packages = installed(tmp_path / "packages", "parameterized==0.9.0", *NEW)
    done = python(
        "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", tmp_path,
        Path(__file__).with_name("mlcd_model_tests.py"),
        first=[tmp_path, packages], EXPORT=str(tmp_path / "out"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    passed = set(re.findall(r"::(\w+)::test_(\w+) PASSED", done.stdout))
    kinds = ("PlainTest", "SharedTest", "SeparateTest")
    assert {(kind, name) for kind in kinds for name in MATTER} - passed == set()
