"""The exported model in transformers' hands: trained on, compiled, exported, converted, saved again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_runs import MODEL, convert, noise, write_run
from launch import repository
from PIL import Image
from readme import python_blocks
from safetensors.torch import load_file
from torch import Tensor

from megaregion.config import DataConfig
from megaregion.export import ExportOptions, export_checkpoint

BOXES = torch.tensor([[[0, 0, 33, 40], [10.5, 3, 60, 64]], [[16, 16, 48, 48], [1, 1, 2, 2]]])
"""Regions of two images; the last covers half of no patch."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports with regions, by what sets them apart."""
    found: dict[str, Path] = {}
    models: dict[str, dict[str, Any]] = {
        "shared": {}, "separate": {"region_weights": "separate"}, "registers": {"registers": 4},
        "learned": {"region_start": "learned"},
    }  # fmt: skip
    for name, own in models.items():
        place = tmp_path_factory.mktemp(name)
        write_run(place / "run", config=dataclasses.replace(MODEL, **own))
        export_checkpoint(place / "run", place / "photos-regions", ExportOptions(regions=True))
        found[name] = place / "photos-regions"
    return found


@pytest.fixture(scope="module")
def load(folders: dict[str, Path]) -> Callable[..., Any]:
    from transformers import AutoModel

    def loaded(weights: str = "shared", **how: Any) -> Any:
        return AutoModel.from_pretrained(folders[weights], trust_remote_code=True, **how).eval()

    return loaded


def regions_of(model: Any, images: Tensor | None = None, **how: Any) -> Tensor:
    with torch.no_grad():
        pixels = noise(2, 3, 64, 96) if images is None else images
        return model(pixels.to(model.dtype), boxes=BOXES[: len(pixels)], **how).region_features.float()


def test_a_region_classifier_learns_through_the_features_and_reaches_every_weight(load: Any) -> None:
    model = load("separate").train()
    classifier = torch.nn.Linear(32, 4)
    images, labels = noise(4, 3, 32, 32), torch.arange(4)
    boxes = [[[0, 0, 20, 32]], [[16, 0, 32, 32]], [[0, 0, 32, 20]], [[0, 8, 32, 32]]]
    optimizer = torch.optim.AdamW([*model.parameters(), *classifier.parameters()], lr=1e-3)
    losses = []
    for _ in range(8):
        features = torch.cat(model.get_region_features(images, boxes=boxes))
        loss = F.cross_entropy(classifier(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses
    assert [name for name, each in model.named_parameters() if each.grad is None] == []


@pytest.mark.parametrize("weights", ["shared", "separate", "learned"])
def test_gradient_checkpointing_changes_no_gradient(load: Any, weights: str) -> None:
    model = load(weights).train()
    gradients = []
    # transformers 4.57 asks for the reentrant one unless somebody says otherwise.
    for asked in (None, {"use_reentrant": True}, None):
        model.zero_grad()
        model(noise(2, 3, 64, 64), boxes=BOXES).region_features.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.gradient_checkpointing_enable(asked)
    assert all(layer.gradient_checkpointing for layer in (*model.encoder.layers, *model.region_layers))
    for plain, *others in zip(*gradients, strict=True):
        for again in others:
            torch.testing.assert_close(again, plain, atol=0, rtol=0)


def test_every_kind_of_attention_gives_the_same_regions_or_says_what_is_missing(load: Any) -> None:
    from transformers.utils import is_flash_attn_2_available

    expected = regions_of(load())
    for kind in ("sdpa", "eager", "flex_attention"):
        model = load(attn_implementation=kind)
        assert model.config._attn_implementation == kind
        torch.testing.assert_close(regions_of(model), expected, atol=1e-5, rtol=0)
    if not is_flash_attn_2_available():
        with pytest.raises(ImportError, match="FlashAttention2"):
            load(attn_implementation="flash_attention_2")


def test_hidden_states_and_attentions_come_beside_regions_if_they_are_asked_for(load: Any) -> None:
    model, images = load(attn_implementation="eager"), noise(2, 3, 64, 96)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        plain, full = model(images, **asked), model(images, boxes=BOXES, **asked)
        bare = model(images, boxes=BOXES)
        listed = model(images, boxes=BOXES, return_dict=False)
        some = model(images, boxes=BOXES, output_hidden_states=[0, -1]).hidden_states
    assert [each is None for each in some] == [False, *[True] * (MODEL.depth - 1), False]
    assert torch.equal(some[-1], full.hidden_states[-1])
    assert len(full.hidden_states) == MODEL.depth + 1
    for ours, theirs in zip(full.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert [tuple(each.shape) for each in full.attentions] == [(2, MODEL.heads, 25, 25)] * MODEL.depth
    assert bare.hidden_states is None
    assert bare.attentions is None
    assert torch.equal(listed[-1], bare.region_features)
    assert torch.equal(listed[0], plain.last_hidden_state)


def test_padded_boxes_masks_and_visible_patches_agree_with_lists(load: Any) -> None:
    model, images = load(), noise(2, 3, 64, 96)
    found = regions_of(model, images)
    with torch.no_grad():
        lists = model.get_region_features(images, boxes=[BOXES[0], BOXES[1, :1]])
        none = model.get_region_features(images, boxes=[[], []])
        y, x = torch.arange(64)[:, None] + 0.5, torch.arange(96) + 0.5
        left, top, right, bottom = BOXES[..., None, None].unbind(2)
        masks = (left < x) & (x < right) & (top < y) & (y < bottom)
        masked = model(images, masks=masks).region_features
    torch.testing.assert_close(lists[0], found[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(lists[1], found[1, :1], atol=1e-6, rtol=0)
    torch.testing.assert_close(masked, found, atol=1e-6, rtol=0)
    assert [tuple(each.shape) for each in none] == [(0, 32)] * 2


def test_half_precision_and_the_meta_device_leave_the_rotary_frequencies_right(load: Any) -> None:
    model = load()
    expected, exact = regions_of(model), model.vision_rotary_embedding.inv_freq
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.to_empty(device="cpu")
    # Whatever lay in memory; a fresh process' zeros would hide that nobody filled it.
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(regions_of(empty.eval()), expected, atol=0, rtol=0)
    for how in (load(dtype=torch.bfloat16), load().bfloat16(), load().half()):
        assert torch.equal(how.vision_rotary_embedding.inv_freq, exact)
        bound = 0.03 if how.dtype == torch.bfloat16 else 0.005
        assert (regions_of(how) - expected).abs().max() < bound * expected.abs().max()


def test_the_model_compiles_into_one_graph_for_any_batch_size_and_regions(load: Any) -> None:
    known = load("registers")
    short = {**known.config.to_dict(), "num_hidden_layers": 2, "region_layers": 1}
    model = type(known)(type(known.config)(**short)).eval()
    sizes = ((2, 64, 96), (1, 80, 48))
    expected = [regions_of(model, noise(batch, 3, *size)) for batch, *size in sizes]
    # fullgraph: a break of the graph is an error.
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for (batch, *size), known in zip(sizes, expected, strict=True):
        with torch.no_grad():
            found = compiled(noise(batch, 3, *size), boxes=BOXES[:batch]).region_features
        torch.testing.assert_close(found, known, atol=1e-5, rtol=0)


def test_the_pages_onnx_gives_the_same_features_at_any_batch_size_and_number_of_regions(
    load: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    (tmp_path / "photos-regions").symlink_to(folders["shared"])
    monkeypatch.chdir(tmp_path)
    exec(python_blocks()[1], {})
    session = onnxruntime.InferenceSession("photos-regions.onnx", providers=["CPUExecutionProvider"])
    model = load()
    for batch, height, width, regions in ((2, 64, 96, 2), (1, 48, 48, 5), (3, 128, 64, 1)):
        images, place = noise(batch, 3, height, width), 60 * torch.rand(batch, regions, 2)
        boxes = torch.cat((place, place + 40 * torch.rand(batch, regions, 2)), dim=-1)
        boxes[:, 0] = torch.tensor([1.0, 1.0, 2.0, 2.0])
        found = session.run(None, {"pixel_values": images.numpy(), "boxes": boxes.numpy()})
        with torch.no_grad():
            expected = model(images, boxes=boxes).to_tuple()
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_feature_pipeline_takes_the_folder(load: Any, folders: dict[str, Path]) -> None:
    from transformers import pipeline

    extract = pipeline("image-feature-extraction", model=str(folders["shared"]), trust_remote_code=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = DataConfig()
    images = torch.from_numpy((pixels / 255.0 - data.mean) / data.std).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = load()(images).last_hidden_state
    torch.testing.assert_close(torch.tensor(extract(Image.fromarray(pixels))), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", ["shared", "separate", "registers", "learned"])
def test_what_transformers_saved_again_comes_back_whole_with_its_regions(
    load: Any, folders: dict[str, Path], weights: str, tmp_path: Path
) -> None:
    from transformers import AutoModel

    model = load(weights)
    model.config.patch_coverage = 0.25
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    expected = regions_of(model)
    assert torch.equal(regions_of(again), expected)
    assert convert("from-hf", tmp_path / "saved", tmp_path / "start") == 0
    apart = {"registers": "registers: 4", "learned": "region_start: learned"}
    told = apart.get(weights, f"region_weights: {weights}")
    assert told in (tmp_path / "start" / "model.yaml").read_text()
    assert convert("to-hf", tmp_path / "start", tmp_path / "back", "--regions") == 0
    first, back = (load_file(path / "model.safetensors") for path in (folders[weights], tmp_path / "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[key], back[key]) for key in first)
    returned = AutoModel.from_pretrained(tmp_path / "back", trust_remote_code=True).eval()
    assert torch.equal(regions_of(returned), expected)


def test_weights_that_a_folder_lacks_are_drawn_and_not_left_as_memory_was(
    load: Any, folders: dict[str, Path]
) -> None:
    lacking = {key: each for key, each in load("separate").state_dict().items() if "region_layers" not in key}
    known = load("separate")
    model = type(known).from_pretrained(None, config=known.config, state_dict=lacking)
    layer = model.region_layers[0]
    assert torch.equal(layer.layer_norm1.weight, torch.ones(MODEL.width))
    assert torch.equal(layer.mlp.fc1.bias, torch.zeros(MODEL.mlp_width))
    spread = float(layer.mlp.fc1.weight.detach().std())
    # By MLCD's rule, or by transformers' own, which passes by modules of a folder's code.
    rules = (2 * MODEL.width) ** -0.5, model.config.initializer_range
    assert any(0.9 < spread / rule < 1.1 for rule in rules)
    assert torch.equal(model.projection.weight, known.projection.weight)


@pytest.fixture(scope="module")
def aspect(folders: dict[str, Path]) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folders["shared"], subfolder="aspect", trust_remote_code=True)


def test_the_aspect_processor_keeps_shapes_within_its_budget_of_patches(aspect: Any) -> None:
    patch, most = MODEL.patch_size, (MODEL.image_size // MODEL.patch_size) ** 2
    for height, width in ((64, 64), (100, 400), (400, 100), (3, 900), (1000, 999), (1, 1)):
        for budget in (None, 1, 7, 1000):
            rows, columns = (side / patch for side in aspect.fitted(height, width, budget))
            assert rows == int(rows) >= 1
            assert columns == int(columns) >= 1
            assert rows * columns <= (budget or most)
    assert aspect.fitted(100, 400) == (32, 128)
    # By less than a patch off the shape, at a budget that has room for it.
    assert aspect.fitted(300, 700, 1000) == (20 * patch, 48 * patch)


def test_the_aspect_processor_normalises_as_in_training_and_brings_boxes_along(aspect: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 128, 3), dtype=np.uint8)
    data = DataConfig()
    expected = ((pixels / 255.0 - data.mean) / data.std).transpose(2, 0, 1)
    boxes = [[[0, 0, 20, 10], [5, 5, 8, 9]]]
    for given in (Image.fromarray(pixels), pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        found = aspect(images=given, boxes=boxes, return_tensors="pt")
        np.testing.assert_allclose(found["pixel_values"][0], expected, atol=1e-5)
        np.testing.assert_allclose(found["boxes"], boxes)
    double = aspect(images=Image.fromarray(pixels).resize((256, 64)), boxes=boxes)
    np.testing.assert_allclose(double["boxes"], np.array(boxes) / 2)
    wide, tall = Image.new("RGB", (400, 100)), Image.new("L", (100, 400))
    assert [each.shape for each in aspect(images=[wide, tall])["pixel_values"]] == [
        (3, 32, 128),
        (3, 128, 32),
    ]
    with pytest.raises(ValueError, match="images of 2 sizes cannot be stacked"):
        aspect(images=[wide, tall], return_tensors="pt")
    with pytest.raises(ValueError, match="an entry for each of 2 images, got 1"):
        aspect(images=[wide, tall], boxes=boxes)


def test_clips_class_refuses_the_export_instead_of_dropping_its_positions(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import CLIPVisionModel

    export_checkpoint(folders["shared"].parent / "run", tmp_path / "plain")
    for folder in (tmp_path / "plain", folders["shared"]):
        with pytest.raises(Exception, match="MLCD tower, whose rotary positions CLIP's class would drop"):
            CLIPVisionModel.from_pretrained(folder)


def test_every_row_of_the_pages_table_names_a_test() -> None:
    page = (repository() / "megaregion" / "export" / "README.md").read_text()
    [rows] = re.findall(r"\| what works .*?\n\|[-|]+\n(.*?)\n\n", page, re.S)
    tests = "".join(path.read_text() for path in (repository() / "tests").glob("test_*.py"))
    words = [re.findall(r"`(\w+)(?: -m drill)?` \|$", row) for row in rows.splitlines()]
    assert [row for row in words if len(row) != 1 or not re.search(rf"def test_\w*{row[0]}", tests)] == []
