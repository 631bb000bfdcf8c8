"""Plain webdataset, as most projects use it: whole images decoded by Pillow, then cropped and resized.

Its transform is our own, which crops and resizes a decoded image by Pillow's antialiased bicubic filter, so
that crops, mirrors and regions are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from megaregion.data.batch import TransformedSample
from megaregion.data.sample import clip_regions, parse_sample
from megaregion.data.transforms import Transform


def webdataset_batches(
    shards: Sequence[str], positions: Mapping[str, int], transform: Transform, workers: int, batch: int
) -> Iterable[dict[str, Tensor]]:
    """All images once, in the order of the shards.

    Args:
        shards: Tar files.
        positions: Position of each key, which seeds its crop.
        transform: Ours.
        workers: Processes.
        batch: Images of a batch.
    """
    dataset = (
        webdataset.WebDataset(list(shards), shardshuffle=False)
        .decode("pil", only=["jpg"])
        .map(_Plain(positions, transform))
        .select(_is_usable)
        .batched(batch, collation_fn=_stack, partial=False)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


@dataclass(frozen=True)
class _Plain:
    positions: Mapping[str, int]
    transform: Transform

    def __call__(self, sample: dict[str, Any]) -> TransformedSample | None:
        key: str = sample["__key__"]
        image: Image.Image = sample["jpg"]
        record, _ = clip_regions(parse_sample(sample["json"]))
        return self.transform(image, record, self.positions[key], key)


def _is_usable(sample: TransformedSample | None) -> bool:
    return sample is not None


def _stack(samples: Sequence[TransformedSample]) -> dict[str, Tensor]:
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    return {
        "positions": torch.tensor([sample.position for sample in samples]),
        "pixels": pixels.permute(0, 3, 1, 2).contiguous(),
        **{
            name: torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))
            for name in ("visible", "kinds", "labels")
        },
    }
