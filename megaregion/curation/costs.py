"""What an image costs: networks to count on any device, be it a fake one, and the host's work, measured."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from megaregion.curation.engines.boxes import Objectness
from megaregion.curation.engines.ocr import RapidReader
from megaregion.curation.engines.pretrained import CLIP_STATISTICS, PretrainedEmbedder, loading
from megaregion.curation.engines.sam import MASKS, SamProposer, edges, fitted, run_lengths
from megaregion.curation.picture import Proposal, crop, read_picture, resize
from megaregion.curation.settings import MAX_PIXELS, OcrSettings, ProposeSettings
from megaregion.curation.stages.regions import rank

SIZE = (512, 384)
"""Width and height of the image that is measured, in pixels: a large dataset's usual one."""
ROWS = {"crop": 256, "image": 4}
"""Rows of the batches that are counted."""
RANKED = 256
"""Proposals that are ranked."""
SIDE = 1024
"""Of SAM's square, in pixels."""
LEAST = 0.5
"""Seconds that a measurement takes at least."""


def networks(
    encoder: str, sam: str, grid: int, device: torch.device
) -> Mapping[str, tuple[int, Callable[[], Any]]]:
    """Rows and one batch of CLIP ViT-L/14 and SAM ViT-B, or of the models whose folders are named.

    Only settings are read of a folder; weights are random, as no cost depends on them. Raises UserError where
    a folder's settings cannot be read.
    """
    import transformers as hub

    with loading(Path(encoder or sam), "settings of a model"):
        seen = hub.AutoConfig.from_pretrained(encoder, local_files_only=True) if encoder else _clip_l()
        masks = hub.AutoConfig.from_pretrained(sam, local_files_only=True) if sam else hub.SamConfig()
        seen = getattr(seen, "vision_config", seen)
        with torch.device(device):
            embedding: nn.Module = hub.MODEL_MAPPING[type(seen)](seen)
            proposing: nn.Module = hub.AutoModelForMaskGeneration.from_config(masks)
    for model in (embedding, proposing):
        model.bfloat16().eval().requires_grad_(False)
    side = seen.image_size if isinstance(seen.image_size, int) else seen.image_size[0]
    crops, images = ROWS["crop"], ROWS["image"]
    embedder = PretrainedEmbedder(embedding, device, CLIP_STATISTICS, side, rows=crops)
    proposer = SamProposer(proposing, device, grid, rows=images)
    squares = torch.zeros(crops, side, side, 3, dtype=torch.uint8)
    whole = torch.zeros(images, proposer.side, proposer.side, 3, dtype=torch.uint8)
    logits = torch.zeros(MASKS, proposer.side // 4, proposer.side // 4, dtype=torch.bfloat16, device=device)
    width, height = SIZE
    extent_of = round(proposer.side * height / width), proposer.side
    extent = torch.full((images, 2), float(proposer.side))
    return {
        "crop": (crops, lambda: embedder.batches.enqueue([squares], crops)),
        "image": (images, lambda: proposer.batches.enqueue([whole, extent], images)),
        "mask": (MASKS, lambda: edges(proposer.enlarged(logits, extent_of, (height, width)))),
    }


def _clip_l() -> Any:
    from transformers import CLIPVisionConfig

    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "patch_size": 14}
    return CLIPVisionConfig(**size, num_attention_heads=16, image_size=224)


def measure() -> dict[str, float]:
    """Seconds of one core for an image, or a crop or a mask, by what is done.

    That is decode, crop, view, objectness, ocr, mask (its run lengths) and rank (the proposals of an image).
    """
    rng = np.random.Generator(np.random.Philox(key=0))
    noise = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(SIZE)
    ImageDraw.Draw(noise).text((40, 60), "EXIT  Hotel", font=ImageFont.load_default(48), fill=(255, 255, 255))
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=90)
    content = file.getvalue()
    pixels = read_picture(content, MAX_PIXELS).pixels
    judge, reader = Objectness(), RapidReader(OcrSettings().ocr_side)
    maps, size = judge.maps(pixels), (SIZE[1], SIZE[0])
    discs = _discs(rng)
    changes, *sides = edges(discs)
    told = [*torch.nonzero(changes).numpy().T, *(side.numpy() for side in sides)]
    proposals = [Proposal(found[0], 0.9, found[1]) for found in run_lengths(*told) if found] * (
        RANKED // MASKS
    )
    return {
        "decode": _seconds(lambda: read_picture(content, MAX_PIXELS)),
        "crop": _seconds(lambda: resize(crop(pixels, (60, 40, 360, 300)), 224, 224)),
        "view": _seconds(lambda: fitted(pixels, SIDE, padded=True)),
        "objectness": _seconds(lambda: judge.maps(pixels)),
        "ocr": _seconds(lambda: reader.read(pixels)),
        "mask": _seconds(lambda: run_lengths(*told)) / MASKS,
        "rank": _seconds(lambda: rank(proposals, size, maps, ProposeSettings())),
    }


def _discs(rng: np.random.Generator) -> torch.Tensor:
    """As many masks of discs as are finished at once, bool [n, h, w]."""
    width, height = SIZE
    x, y = (torch.from_numpy(rng.integers(0, edge, (MASKS, 1, 1))) for edge in SIZE)
    radius = torch.from_numpy(rng.integers(20, 120, (MASKS, 1, 1)))
    return (torch.arange(width) - x) ** 2 + (torch.arange(height)[:, None] - y) ** 2 < radius**2


def _seconds(work: Callable[[], Any]) -> float:
    """Time of this thread's processor; what is made once comes first."""
    work()
    began, times = time.thread_time(), 0
    while (spent := time.thread_time() - began) < LEAST:
        work()
        times += 1
    return spent / times
