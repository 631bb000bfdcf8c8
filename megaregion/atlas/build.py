"""Builds an atlas: one pass that counts, one that crops, and the pages.

It is built beside its place, moved there when whole, and left alone if it is up to date.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaregion.atlas.cluster_map import (
    DENSITY,
    MapTile,
    Places,
    density,
    make_map_tiles,
    place_clusters,
    principal_axes,
)
from megaregion.atlas.crops import cut_crops, draw_samples, plan_crops
from megaregion.atlas.groups import Counts, Groups, count_regions
from megaregion.atlas.neighbours import Neighbours, find_neighbours
from megaregion.atlas.pages import CHUNK, Pages, packed, permille
from megaregion.atlas.settings import AtlasSettings, check_settings
from megaregion.atlas.source import Floats, Source
from megaregion.atlas.tiles import Spool
from megaregion.errors import UserError
from megaregion.files import locked, read_json, replace_folder

VERSION = 1
"""Goes up when the same source and settings would give another atlas."""
MARK = "atlas.json"
"""File that tells an atlas from any other folder."""
SITE = Path(__file__).with_name("site")
"""The page itself: HTML, style and scripts."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Opens a progress bar for a step and a number of things to do; what it gives is called with those done."""


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
    identity = _identify(source, settings)
    if _is_done(out, identity):
        return None
    began = time.perf_counter()
    with _replacing(out, identity) as folder:
        atlas = _Atlas(source, settings, folder, bar, workers)
        return atlas.build(began)


class _Atlas:
    """One atlas while it is built."""

    def __init__(self, source: Source, settings: AtlasSettings, folder: Path, bar: Bar, workers: int) -> None:
        self._source, self._settings, self._bar, self._workers = source, settings, bar, workers
        self._scratch, self._pages = folder / "scratch", Pages(folder / "site", settings.tile)

    def build(self, began: float) -> Outcome:
        centers = _check_centers(self._source.centers())
        count = len(centers)
        with self._bar("regions", self._source.samples) as tick:
            counts = count_regions(self._source, self._settings, count, tick)
        axes = principal_axes(centers)
        places = place_clusters(axes, self._settings.map, self._settings.seed)
        map_tiles = make_map_tiles(places, counts.clusters.sizes)
        with self._bar("neighbours", count) as tick:
            near = find_neighbours(centers, axes, self._settings.neighbours, tick)
        browsed, damaged = self._write(counts, places, map_tiles, near)
        self._pages.write_chunk("manifest", self._manifest(counts, places, map_tiles, browsed))
        tokens = len(counts.tokens.sizes)
        return Outcome(count, counts.regions, tokens, browsed, damaged, time.perf_counter() - began)

    def _write(
        self, counts: Counts, places: Places, map_tiles: list[MapTile], near: Neighbours
    ) -> tuple[int, int]:
        """Crop, and write all pages; gives the numbers of browsed and of damaged samples."""
        clusters, tokens = Spool(self._scratch / "clusters", CHUNK), Spool(self._scratch / "tokens", CHUNK)
        covers = Spool(self._scratch / "covers", 1)
        drawn = draw_samples(self._source.samples, self._settings.samples, self._settings.seed)
        wanted, requests = plan_crops(counts.clusters.wants(), counts.tokens.wants(), drawn)
        pages, damaged, count = self._pages, 0, len(counts.clusters.sizes)
        with self._bar("crops", wanted) as tick:
            for found in cut_crops(self._source, requests, self._settings.tile, self._workers):
                clusters.add(found.clusters)
                tokens.add(found.tokens)
                for description, jpeg in found.browsed:
                    pages.add_sample(description, jpeg)
                damaged += len(found.damaged)
                tick(found.samples)
        browsed = pages.finish_samples()
        with self._bar("clusters", count) as tick:
            pages.write_clusters(counts.clusters, places, map_tiles, near, clusters, covers, tick)
        with self._bar("lists", 3 * count) as tick:
            pages.write_orders(counts.clusters, tick)
        with self._bar("map", count) as tick:
            pages.write_map(counts.clusters, map_tiles, places, covers, tick)
        with self._bar("tokens", len(counts.tokens.sizes)) as tick:
            pages.write_tokens(counts.tokens, self._source.pieces(), tokens, tick)
        return browsed, damaged

    def _manifest(
        self, counts: Counts, places: Places, map_tiles: list[MapTile], browsed: int
    ) -> dict[str, Any]:
        clusters = counts.clusters
        known = clusters.closeness[np.isfinite(clusters.closeness)]
        return {
            "title": self._source.title,
            "clusters": len(clusters.sizes),
            "regions": counts.regions,
            "samples": self._source.samples,
            "tokens": len(counts.tokens.sizes),
            "usedTokens": int((counts.tokens.sizes > 0).sum()),
            "browsed": browsed,
            "cropped": int(clusters.cropped.sum()),
            "sizes": _quantiles(clusters),
            "closeness": permille(float(known.mean())) if len(known) else permille(float("nan")),
            "knowsCloseness": self._source.knows_closeness,
            "members": self._settings.members,
            "projection": self._settings.map,
            "tile": self._settings.tile,
            "map": {part.name: len(part.clusters) for part in map_tiles},
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


def _identify(source: Source, settings: AtlasSettings) -> dict[str, Any]:
    """All that decides what an atlas holds, the page's own files included."""
    page = hashlib.sha256()
    for path in sorted(SITE.iterdir()):
        page.update(path.read_bytes())
    return {
        "version": VERSION,
        "source": source.identity,
        "settings": asdict(settings),
        "page": page.hexdigest(),
    }


def _is_done(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds just this atlas already.

    Raises:
        UserError: The folder holds something that is no atlas; it is never replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = read_json(out / MARK)
    except (OSError, ValueError):
        raise UserError(f"--out {out} exists and is no atlas; name another folder") from None
    return bool(found == wanted)


@contextmanager
def _replacing(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """Give a folder to build in; it takes its place when all went well, and is gone when not.

    Raises:
        UserError: Another process builds the same atlas, or the disk takes no more.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial / ".lock", wait=False) as free:
            if not free:
                raise UserError(f"--out {out} is in use by another process; wait until it has ended")
            try:
                site, scratch = partial / "site", partial / "scratch"
                for folder in (site, scratch):
                    shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(SITE, site)
                scratch.mkdir()
                yield partial
                (site / MARK).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
                replace_folder(site, out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); make room, or name another folder"
        ) from None
