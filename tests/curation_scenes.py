"""Small images with shapes and a word each, for the tests of curation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megaregion.curation.pipeline import curate
from megaregion.curation.settings import CurationSettings, check_settings
from megaregion.schemas.curation import Summary
from megaregion.settings import read_settings, sections, unknown

WORDS = ("EXIT", "Hotel", "SALE", "Books")


def scene(number: int, side: int = 192) -> Image.Image:
    """Shapes of different colours on a noisy sky, and a word on every second one."""
    rng = np.random.Generator(np.random.Philox(key=number))
    rows = np.linspace(90, 150, side)[:, None, None] + rng.normal(0, 6, (side, side, 3)) + [0, 10, 40]
    image = Image.fromarray(rows.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for place in ((12, 70), (110, 90)):
        x, y = place[0] + int(rng.integers(0, 10)), place[1] + int(rng.integers(0, 10))
        size, shape = int(rng.integers(44, 66)), int(rng.integers(0, 3))
        color = tuple(int(value) for value in rng.integers(0, 255, 3))
        corners = (x, y, x + size, y + size)
        if shape == 0:
            draw.ellipse(corners, fill=color, outline=(0, 0, 0), width=3)
        elif shape == 1:
            draw.rectangle(corners, fill=color, outline=(255, 255, 255), width=3)
        else:
            draw.polygon(
                [(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=color, outline=(0, 0, 0)
            )
        draw.line((x + 8, y + size // 2, x + size - 8, y + size // 2), fill=(255, 255, 0), width=4)
    if number % 2 == 0:
        draw.text((20, 14), WORDS[number // 2 % 4], font=ImageFont.load_default(30), fill=(255, 255, 255))
    return image


def settings_from(values: Mapping[str, Any]) -> CurationSettings:
    """Settings from values by the last part of their names; what is absent keeps its default.

    Raises:
        UserError: A name that no setting has, or a value that is out of bounds or contradicts another.
    """
    section_of = {one.name: part.key for part in sections(CurationSettings()) for one in part.settings}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in section_of:
            raise unknown(name, section_of)
        nested.setdefault(section_of[name], {})[name] = value
    settings = read_settings(CurationSettings(), nested)
    check_settings(settings)
    return settings


@contextmanager
def silent(stage: str, images: int) -> Iterator[Callable[[], None]]:
    """A progress bar that shows nothing."""
    yield lambda: None


def run(images: Path, out: Path, stage: str = "all", **settings: Any) -> Summary:
    """Curate in this process."""
    return curate(images, out, settings_from(settings), silent, stage, workers=0)


def propose(proposer: Any, image: Any) -> list[Any]:
    """Regions of one image."""
    [(_, found)] = proposer.stream([(None, proposer.view(image))])
    return list(found)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def workers_of(process: int) -> list[int]:
    """Worker processes of a run."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    except OSError:
        # One of them has just ended.
        return []


def save_tiny_sam(folder: Path, hq: bool = False) -> Path:
    """Random weights of the real SamModel, or SamHQModel, 64 x 64 pixels."""
    import torch
    from transformers import SamConfig, SamHQConfig, SamHQModel, SamModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
    torch.manual_seed(0)
    config = (SamHQConfig if hq else SamConfig)(
        vision_config={
            **size, "patch_size": 8, "output_channels": 16, "global_attn_indexes": [0], "mlp_dim": 16,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_depth": 2, "iou_head_hidden_dim": 16, **({"vit_dim": 16} if hq else {}),
        },
    )  # fmt: skip
    model: torch.nn.Module = (SamHQModel if hq else SamModel)(config)
    with torch.no_grad():
        for weights in model.mask_decoder.parameters():
            # Masks would be all but flat with the small weights that training starts from.
            if weights.ndim > 1:
                torch.nn.init.normal_(weights, std=0.7)
    model.save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path) -> Path:
    """Random weights of the real CLIPVisionModel, 32 x 32 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**size, image_size=32, patch_size=8)).save_pretrained(folder)
    return folder
