"""What curation is to do, as its plan is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megaregion.bounds import LARGE, PositiveInt, Real, Text, Whole


@dataclass(frozen=True)
class Load:
    """What is to be curated."""

    images: Annotated[int, Whole(1, LARGE, "IMAGES")] = 400_000_000
    """Images of the dataset."""
    regions: Annotated[float, Real(0, 1000, "REGIONS")] = 5.0
    """Object regions of an image that are embedded."""
    cores: PositiveInt = 12
    """Processor cores beside each GPU."""
    grid: Annotated[int, Whole(1, 256)] = 16
    """SAM: points along each side of the prompt grid."""
    masks: Annotated[int, Whole(0, 10**5)] = 200
    """SAM: masks of an image that are good enough to be brought to its size."""
    clusters: PositiveInt = 1_000_000
    """Centers of k-means."""
    passes: PositiveInt = 20
    """Passes of k-means."""
    encoder: Annotated[str, Text("FOLDER")] = ""
    """Folder with config.json of the encoder; CLIP ViT-L/14 at 224 px if empty."""
    sam: Annotated[str, Text("FOLDER")] = ""
    """Folder with config.json of SAM; SAM ViT-B if empty."""
