"""What an atlas shows, and how much of it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from megaregion.errors import UserError

Projection = Literal["pca", "umap"]


@dataclass(frozen=True)
class AtlasSettings:
    """Settings of one atlas."""

    members: int = 12
    """Nearest members that a cluster's page shows, and random ones beside them."""
    tile: int = 128
    """Side of a crop, in pixels."""
    sheets: int = 10_000
    """Clusters, and tokens, whose members are cropped: the largest ones; 0 crops all."""
    samples: int = 2000
    """Samples that can be browsed, drawn at random; 0 takes all."""
    neighbours: int = 8
    """Neighbouring clusters that a page names."""
    projection: Projection = "pca"
    """How centers become a map."""
    seed: int = 0
    """Seed of what is drawn at random."""


def check_settings(settings: AtlasSettings) -> None:
    """Check the settings.

    Raises:
        UserError: A value is out of range, or a package that a setting needs is missing.
    """
    for key, low, high in (("members", 1, 120), ("tile", 32, 512), ("neighbours", 1, 64)):
        value = getattr(settings, key)
        if not low <= value <= high:
            raise UserError(f"--{key} must lie in {low} to {high}, got {value}")
    for key in ("sheets", "samples", "seed"):
        if getattr(settings, key) < 0:
            raise UserError(f"--{key} must be 0 or more, got {getattr(settings, key)}")
    if settings.projection == "umap" and importlib.util.find_spec("umap") is None:
        raise UserError(
            "--map umap needs the package umap-learn, which is not installed; pip install umap-learn, or use "
            "--map pca"
        )
