"""Loads an export in every way that transformers has: python loaded_export.py FOLDER IMAGES OUT.

test_export.py runs it under two releases, and compares what OUT holds.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

BOXES = torch.tensor([[[0.0, 0.0, 30.0, 40.0], [9.0, 9.0, 60.0, 60.0]]])

WAYS: dict[str, dict[str, Any]] = {
    "usual": {},
    "low_cpu_mem_usage": {"low_cpu_mem_usage": True},
    "device_map": {"device_map": {"": "cpu"}},
    "device_map auto": {"device_map": "auto"},
    "device_map to disk": {"device_map": "auto", "max_memory": {"cpu": 200_000}},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, device_map": {"dtype": torch.bfloat16, "device_map": "auto"},
    "float16": {"dtype": torch.float16},
}


def load(folder: str, **how: Any) -> Any:
    # Memory that nobody fills must not hold zeros by chance.
    for size in (1, 2, 4, 8, 16, 64, 256):
        del [torch.full((size,), 1e30) for _ in range(500)][:]
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True, trust_remote_code=True, **how)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def features(model: Any, images: Tensor) -> dict[str, Tensor]:
    images = images.to(next(model.parameters()).dtype)
    out = model(pixel_values=images)
    found = {"tokens": out.last_hidden_state.float(), "pooled": out.pooler_output.float()}
    if hasattr(model, "get_region_features"):
        boxes = BOXES.expand(len(images), -1, -1)
        found["regions"] = model(images, boxes=boxes).region_features.float()
        for lists, padded in zip(
            model.get_region_features(images, boxes=boxes), found["regions"], strict=True
        ):
            assert torch.equal(lists.float(), padded)
    frequencies = {
        name: each for name, each in model.named_buffers() if name.endswith("rotary_embedding.inv_freq")
    }
    [found["frequencies"]] = frequencies.values()
    return found


def gradients(model: Any, images: Tensor, checkpointing: bool) -> list[Tensor]:
    model.train().zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(images, boxes=BOXES.expand(len(images), -1, -1)).region_features.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def main(folder: str, images_file: str, out: str) -> None:
    images = torch.load(images_file, weights_only=True)
    found: dict[str, Any] = {"version": transformers.__version__}
    with tempfile.TemporaryDirectory() as offloaded:
        for name, how in WAYS.items():
            place = {"offload_folder": offloaded} if "disk" in name else {}
            model = load(folder, **how, **place)
            found[name] = features(model, images)
            if place:
                assert "disk" in model.hf_device_map.values()
    model = load(folder)
    if hasattr(model, "get_region_features"):
        with torch.device("meta"):
            empty = type(model)(model.config)
        empty.to_empty(device="cpu").to_empty(device="cpu").load_state_dict(model.state_dict())
        found["meta device"] = features(empty.eval(), images)
        for plain, again in zip(gradients(model, images, False), gradients(model, images, True), strict=True):
            torch.testing.assert_close(again, plain, atol=0, rtol=0)
    AutoImageProcessor.from_pretrained(folder)
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
