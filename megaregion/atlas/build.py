"""Builds an atlas: one pass that counts, one that crops, and the pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaregion.atlas.census import Census, Groups, take_census
from megaregion.atlas.chart import DENSITY, MapTile, density, seat
from megaregion.atlas.chunks import packed, write_chunk
from megaregion.atlas.harvest import draw_samples, harvest, plan_errands
from megaregion.atlas.neighbours import Neighbours, find_neighbours
from megaregion.atlas.pages import CHUNK, ClusterPages, SamplePages, permille, write_map, write_tokens
from megaregion.atlas.place import identify, is_done, replacing
from megaregion.atlas.projection import Places, place_clusters, principal_axes
from megaregion.atlas.settings import AtlasSettings, check_settings
from megaregion.atlas.source import Floats, Source
from megaregion.atlas.spool import Spool
from megaregion.errors import UserError

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Opens a progress bar for a step and a number of things to do; what it gives is called with those done."""
TILES_TOGETHER = 1
"""Map tiles of a file of waiting covers."""


@dataclass(frozen=True)
class Outcome:
    """What was built."""

    clusters: int
    regions: int
    tokens: int
    browsed: int
    """Samples that can be browsed."""
    damaged: int
    """Samples that could not be read; their crops are grey."""
    seconds: float


def build_atlas(
    source: Source, out: Path, settings: AtlasSettings, bar: Bar, workers: int = 2
) -> Outcome | None:
    """Build an atlas.

    Args:
        source: What it shows.
        out: Folder to make; an older atlas there is replaced when the new one is whole.
        settings: What to show.
        bar: Shows progress.
        workers: Processes that crop; the outcome does not depend on their number.

    Returns:
        What was built; None if the folder holds this very atlas already.

    Raises:
        UserError: Something that the user can mend; the folder is what it was.
    """
    check_settings(settings)
    identity = identify(source, settings)
    if is_done(out, identity):
        return None
    began = time.perf_counter()
    with replacing(out, identity) as folder:
        atlas = _Atlas(source, settings, folder, bar, workers)
        return atlas.build(began)


class _Atlas:
    """One atlas while it is built."""

    def __init__(self, source: Source, settings: AtlasSettings, folder: Path, bar: Bar, workers: int) -> None:
        self._source, self._settings, self._bar, self._workers = source, settings, bar, workers
        self._site, self._scratch = folder / "site", folder / "scratch"

    def build(self, began: float) -> Outcome:
        centers = _check_centers(self._source.centers())
        count = len(centers)
        with self._bar("regions", self._source.samples) as tick:
            census = take_census(self._source, self._settings, count, tick)
        axes = principal_axes(centers)
        places = place_clusters(axes, self._settings.projection, self._settings.seed)
        chart = seat(places, census.clusters.sizes)
        with self._bar("neighbours", count) as tick:
            near = find_neighbours(centers, axes, self._settings.neighbours, tick)
        browsed, damaged = self._write(census, places, near, chart)
        write_chunk(self._site, "manifest", self._manifest(census, places, chart, browsed))
        tokens = len(census.tokens.sizes)
        return Outcome(count, census.regions, tokens, browsed, damaged, time.perf_counter() - began)

    def _write(
        self, census: Census, places: Places, near: Neighbours, chart: list[MapTile]
    ) -> tuple[int, int]:
        """Crop, and write all pages; gives the numbers of browsed and of damaged samples."""
        clusters, tokens = Spool(self._scratch / "clusters", CHUNK), Spool(self._scratch / "tokens", CHUNK)
        covers = Spool(self._scratch / "covers", TILES_TOGETHER)
        samples = SamplePages(self._site)
        drawn = draw_samples(self._source.samples, self._settings.samples, self._settings.seed)
        wanted, errands = plan_errands(census.clusters.wants(), census.tokens.wants(), drawn)
        tile, damaged = self._settings.tile, 0
        with self._bar("crops", wanted) as tick:
            for found in harvest(self._source, errands, tile, self._workers):
                clusters.add(found.clusters)
                tokens.add(found.tokens)
                for description, jpeg in found.browsed:
                    samples.add(description, jpeg)
                damaged += len(found.damaged)
                tick(found.samples)
        samples.finish()
        pages = ClusterPages(self._site, census.clusters, tile)
        with self._bar("clusters", len(census.clusters.sizes)) as tick:
            pages.write(places, near, clusters, covers, chart, tick)
        with self._bar("lists", 3 * len(census.clusters.sizes)) as tick:
            pages.write_orders(tick)
        with self._bar("map", len(census.clusters.sizes)) as tick:
            write_map(self._site, chart, places, census.clusters, covers, tick)
        with self._bar("tokens", len(census.tokens.sizes)) as tick:
            write_tokens(self._site, census.tokens, self._source.pieces(), tokens, tile, tick)
        return len(samples), damaged

    def _manifest(self, census: Census, places: Places, chart: list[MapTile], browsed: int) -> dict[str, Any]:
        clusters = census.clusters
        known = clusters.closeness[np.isfinite(clusters.closeness)]
        return {
            "title": self._source.title,
            "clusters": len(clusters.sizes),
            "regions": census.regions,
            "samples": self._source.samples,
            "tokens": len(census.tokens.sizes),
            "usedTokens": int((census.tokens.sizes > 0).sum()),
            "browsed": browsed,
            "cropped": int(clusters.cropped.sum()),
            "sizes": _quantiles(clusters),
            "closeness": permille(float(known.mean())) if len(known) else permille(float("nan")),
            "knowsCloseness": self._source.knows_closeness,
            "members": self._settings.members,
            "projection": self._settings.projection,
            "tile": self._settings.tile,
            "map": {part.name: len(part.clusters) for part in chart},
            "density": {"side": DENSITY, "cells": packed(density(places))},
        }


def _quantiles(clusters: Groups) -> dict[str, Any]:
    """Smallest, median and largest size, empty clusters, and how many have 2**i to 2**(i + 1) - 1 regions."""
    sizes = clusters.sizes
    bins = np.bincount(np.log2(np.maximum(sizes, 1)).astype(np.int64)[sizes > 0], minlength=1)
    return {
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "empty": int((sizes == 0).sum()),
        "bins": bins.tolist(),
    }


def _check_centers(centers: Floats) -> Floats:
    if centers.ndim != 2 or not len(centers) or not centers.shape[1]:
        raise UserError(f"there are no centers to show (shape {centers.shape}); curate again")
    for start in range(0, len(centers), 65_536):
        if not np.isfinite(centers[start : start + 65_536]).all():
            raise UserError("the centers hold numbers that are not finite; curate again")
    return centers
