"""What an atlas shows, and how much of it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated, Literal

from megaregion.bounds import Count, Seed, Whole
from megaregion.errors import UserError
from megaregion.settings import check, flag_name

MapKind = Literal["pca", "umap"]


@dataclass(frozen=True)
class AtlasSettings:
    """Settings of one atlas."""

    members: Annotated[int, Whole(1, 120)] = 12
    """Nearest members that a cluster's page shows, and as many random ones beside them."""
    tile: Annotated[int, Whole(32, 512, "PX")] = 128
    """Side of a crop, in pixels."""
    sheets: Count = 10_000
    """Clusters, and tokens, whose members are cropped: the largest ones (about 0.1 MB each); 0 crops all."""
    samples: Count = 2000
    """Samples that can be browsed, drawn at random (about 0.1 MB each); 0 takes all."""
    neighbours: Annotated[int, Whole(1, 64)] = 8
    """Neighbouring clusters that a page names."""
    map: MapKind = "pca"
    """How centers become a map."""
    seed: Seed = 0
    """Seed of what is drawn at random."""


def check_settings(settings: AtlasSettings) -> None:
    """Check the settings.

    Raises:
        UserError: A value is out of bounds, or a package that a setting needs is missing.
    """
    check(settings, say=flag_name)
    if settings.map == "umap" and importlib.util.find_spec("umap") is None:
        raise UserError(
            "--map umap needs the package umap-learn, which is not installed; pip install umap-learn, or use "
            "--map pca"
        )
