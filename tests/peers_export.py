"""Runs exports in other people's code: python peers_export.py PACKAGES OUT, where OUT stands beside them.

PACKAGES holds llavaction, whose builder and towers are LLaVA-NeXT's, and nemo_automodel, whose RICE tower is
that of LLaVA-OneVision-1.5. Of both only those files are imported: their packages' other parts want a GPU's.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor


def package(name: str, folder: Path) -> None:
    """A package without what its __init__.py imports."""
    sys.modules[name] = module = ModuleType(name)
    module.__path__ = [str(folder)]


def llava_next(packages: Path) -> Any:
    """Its build_vision_tower."""
    root = packages / "llavaction"
    package("llavaction", root)
    package("llavaction.model", root / "model")
    package(encoders := "llavaction.model.multimodal_encoder", root / "model" / "multimodal_encoder")
    for name, content in (
        ("llavaction.utils", {"rank0_print": print}),
        # Towers of libraries that are not installed.
        (f"{encoders}.imagebind", {"ImageBindWrapper": None}),
        (f"{encoders}.open_clip_encoder", {"OpenCLIPVisionTower": None}),
    ):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    if not torch.cuda.is_available():
        # It sends the tower to "cuda".
        transformers.PreTrainedModel.to = lambda model, *_, **__: model
    return importlib.import_module(f"{encoders}.builder").build_vision_tower


def tower(build: Any, name: str) -> Any:
    return build(SimpleNamespace(mm_vision_tower=name, mm_vision_select_layer=-2))


@torch.no_grad()
def rice(packages: Path, export: Path, images: Tensor) -> Tensor:
    """Patch features [B, P, D], row by row, of LLaVA-OneVision-1.5's tower before its merger."""
    sys.path.insert(0, str(packages / "nemo_automodel" / "components" / "models" / "llava_onevision"))
    settings = json.loads((export / "config.json").read_text())
    model = importlib.import_module("rice_vit").RiceTransformer(SimpleNamespace(**settings), "sdpa")
    weights = load_file(export / "model.safetensors")
    named = {key.removeprefix("visual."): value for key, value in weights.items()}
    lacking, unknown = model.load_state_dict(named, strict=False)
    assert not unknown, unknown
    assert {key.split(".")[0] for key in lacking} == {"merger"}, lacking
    model.merger = torch.nn.Identity()
    patch, (count, _, height, width) = settings["patch_size"], images.shape
    rows, columns = height // patch, width // patch
    # [B, rows / 2, 2, columns / 2, 2] patches: four of a square stand together.
    order = torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2).transpose(1, 2).flatten()
    pixels = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)
    pixels = pixels.flatten(1, 2)[:, order].flatten(0, 1).flatten(1)
    grid = torch.tensor([[1, rows, columns]] * count)
    return model(pixels, grid_thw=grid).view(count, len(order), -1)[:, order.argsort()]


def main(packages: Path, out: Path) -> None:
    here = out.parent
    images = torch.load(here / "images.pt", weights_only=True)
    build = llava_next(packages)
    with torch.no_grad():
        found = {"llava_next": tower(build, f"hf:{here / 'plain'}")(images)}
    try:
        tower(build, str(here / "plain"))
        found["as_clip"] = "loaded"
    except Exception as error:
        found["as_clip"] = str(error)
    if transformers.__version__.startswith("5."):
        found["rice"] = rice(packages, here / "tower", images)
    torch.save(found, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
