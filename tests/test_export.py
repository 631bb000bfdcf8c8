from __future__ import annotations

import dataclasses
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from megaregion.config import ModelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.export import export_checkpoint
from megaregion.export.parity import load_transformer
from megaregion.models import RegionEncoder, initialise, tensor_parallel_plan
from megaregion.training.checkpoint import Piece
from megaregion.training.writing import publish, write_pieces

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"

MODEL = ModelConfig(image_size=64, patch_size=16, width=64, depth=4, heads=4, mlp_width=128, region_layers=2)


def pieces(model: RegionEncoder, rank: int, ranks: int) -> Iterator[Piece]:
    """One rank's part of a tensor-parallel model, cut as the plan says."""
    plan = tensor_parallel_plan(model)
    for name, parameter in model.named_parameters():
        module, _, end = name.rpartition(".")
        axis = {"column": 0, "row": 1}.get(plan.get(module, ""))
        if axis is None or (axis == 1 and end == "bias"):
            if rank == 0:
                yield Piece(f"body.weight.{name}", tuple(parameter.shape), (0,) * parameter.dim(), parameter)
            continue
        part = parameter.chunk(ranks, dim=axis)[rank]
        offset = [0] * parameter.dim()
        offset[axis] = rank * part.shape[axis]
        yield Piece(f"body.weight.{name}", tuple(parameter.shape), tuple(offset), part)


def write_run(folder: Path, ranks: int = 1, config: ModelConfig = MODEL, step: int = 12) -> RegionEncoder:
    """A run folder with one checkpoint of a model whose norms and biases are off their start too."""
    model = RegionEncoder(config, embedding_dim=32)
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    unfinished = folder / "checkpoints" / "step-unfinished.tmp"
    unfinished.mkdir(parents=True)
    for rank in range(ranks):
        write_pieces(unfinished, rank, pieces(model, rank, ranks))
    run = RunConfig(name="little", model=config)
    facts = {"step": step, "position": 0, "config": dataclasses.asdict(run), "dataset": {}}
    publish(unfinished, folder / "checkpoints" / f"step-{step:08d}", facts)
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def convert(*arguments: object) -> int:
    """Run the command line in this process."""
    saved, sys.argv = sys.argv, [str(TOOL), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = saved
    return int(ended.value.code or 0)


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


def test_the_code_of_the_model_card_gives_our_features_and_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = write_run(tmp_path / "run").vit
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    load, regions = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    scope: dict[str, object] = {"image": Image.fromarray(np.full((80, 96, 3), 90, dtype=np.uint8))}
    monkeypatch.chdir(tmp_path / "out")
    exec(load, scope)
    exec(regions, scope)
    images = noise(2, 3, 48, 80)
    visible = torch.rand(2, 5, 15, generator=torch.Generator().manual_seed(3)) < 0.3
    visible[:, 0] = True
    visible[..., 0] = True
    with torch.no_grad():
        theirs = scope["region_features"](scope["model"], images, visible)
        ours = vit.pool(vit(images, visible).regions)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_separate_region_weights_stay_behind_and_the_card_says_so(tmp_path: Path) -> None:
    from transformers import AutoModel

    vit = write_run(tmp_path / "run", config=dataclasses.replace(MODEL, region_weights="separate")).vit
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    theirs, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    images = noise(1, 3, 64, 64)
    with torch.no_grad():
        output = theirs(pixel_values=images).last_hidden_state
        torch.testing.assert_close(output, vit(images).image, atol=1e-5, rtol=1e-5)
    assert "weights of their own" in (tmp_path / "out" / "README.md").read_text()


def test_bf16_export_holds_the_rounded_weights(tmp_path: Path) -> None:
    from transformers import AutoModel

    write_run(tmp_path / "run")
    exported = export_checkpoint(tmp_path / "run", tmp_path / "out", torch.bfloat16)
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rounded = load_transformer(exported.checkpoint, torch.bfloat16)
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
        assert "features equal the checkpoint's" in out


def test_a_wrong_export_does_not_pass_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import megaregion.export.huggingface as huggingface

    write_run(tmp_path / "run")
    right = huggingface.mlcd_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            huggingface,
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
    monkeypatch.setattr(huggingface, "_write_json", full)
    with pytest.raises(UserError, match=r"out cannot be written: .*No space left"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_empty_folder_may_be_the_target(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}


def test_export_needs_neither_engine_nor_transformers() -> None:
    code = (
        "import sys, megaregion.export.huggingface;"
        "print([name for name in ('deepspeed', 'megatron', 'transformers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
