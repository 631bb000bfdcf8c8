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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from megaregion.atlas.centers import (
    DENSITY,
    density,
    find_neighbours,
    make_map_tiles,
    place_clusters,
    principal_axes,
)
from megaregion.atlas.crops import cut_crops, draw_samples, plan_crops
from megaregion.atlas.groups import Groups, count_regions
from megaregion.atlas.pages import Content, Pages, packed, permille
from megaregion.atlas.settings import AtlasSettings, check_settings
from megaregion.atlas.source import Floats, Source
from megaregion.errors import UserError, spread
from megaregion.files import locked, new_folder, read_json

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
    """Build an atlas of a source, the same for any number of ``workers`` that crop.

    An older atlas in ``out`` is replaced when the new one is whole. Gives what was built; None if the folder
    holds this very atlas already.

    Raises:
        UserError: Something that the user can mend; the folder is what it was.
    """
    check_settings(settings)
    identity = _identify(source, settings)
    if _is_done(out, identity):
        return None
    began = time.perf_counter()
    with _alone(out), new_folder(out) as site, TemporaryDirectory(dir=site) as scratch:
        shutil.copytree(SITE, site, dirs_exist_ok=True)
        content, regions = _read(source, settings, bar)
        pages = Pages(site, Path(scratch), settings.tile, content)
        browsed, damaged = _write(pages, content, source, settings, bar, workers)
        pages.write_chunk("manifest", _manifest(source, settings, content, regions, browsed))
        (site / MARK).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    clusters, tokens = len(content.clusters.sizes), len(content.tokens.sizes)
    return Outcome(clusters, regions, tokens, browsed, damaged, time.perf_counter() - began)


def _read(source: Source, settings: AtlasSettings, bar: Bar) -> tuple[Content, int]:
    """Read all regions once, and lay the clusters out; gives the number of regions, too."""
    centers = _check_centers(source.centers())
    with bar("regions", source.samples) as tick:
        clusters, tokens, regions = count_regions(source, settings, len(centers), tick)
    axes = principal_axes(centers)
    places = place_clusters(axes, settings.map, settings.seed)
    map_tiles = make_map_tiles(places.position, clusters.sizes)
    with bar("neighbours", len(centers)) as tick:
        near = find_neighbours(centers, axes, settings.neighbours, tick)
    return Content(clusters, tokens, source.pieces(), places, map_tiles, near), regions


def _write(
    pages: Pages, content: Content, source: Source, settings: AtlasSettings, bar: Bar, workers: int
) -> tuple[int, int]:
    """Crop, and write all pages; gives the numbers of browsed and of damaged samples."""
    drawn = draw_samples(source.samples, settings.samples, settings.seed)
    wanted, tasks = plan_crops(content.clusters.wants(), content.tokens.wants(), drawn)
    damaged, count = 0, len(content.clusters.sizes)
    with bar("crops", wanted) as tick:
        for found in spread(partial(cut_crops, source, settings.tile), tasks, workers):
            pages.add(found)
            damaged += found.damaged
            tick(found.samples)
    for step, write, total in (
        ("clusters", pages.write_clusters, count),
        ("lists", pages.write_orders, 3 * count),
        ("map", pages.write_map, count),
        ("tokens", pages.write_tokens, len(content.pieces)),
    ):
        with bar(step, total) as tick:
            write(tick)
    return pages.finish_samples(), damaged


def _manifest(
    source: Source, settings: AtlasSettings, content: Content, regions: int, browsed: int
) -> dict[str, Any]:
    """What the page knows before it loads anything else."""
    clusters, tokens = content.clusters, content.tokens
    known = clusters.closeness[np.isfinite(clusters.closeness)]
    return {
        "title": source.title,
        "clusters": len(clusters.sizes),
        "regions": regions,
        "samples": source.samples,
        "tokens": len(tokens.sizes),
        "usedTokens": int((tokens.sizes > 0).sum()),
        "browsed": browsed,
        "cropped": int(clusters.cropped.sum()),
        "sizes": _quantiles(clusters),
        "closeness": permille(float(known.mean()) if len(known) else float("nan")),
        "knowsCloseness": source.knows_closeness,
        "members": settings.members,
        "projection": settings.map,
        "tile": settings.tile,
        "map": {name: len(own) for name, own in content.map_tiles.items()},
        "density": {"side": DENSITY, "cells": packed(density(content.places.position))},
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
def _alone(out: Path) -> Iterator[None]:
    """Hold the place of an atlas.

    Raises:
        UserError: Another process builds the same atlas, or the disk takes no more.
    """
    lock = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, wait=False) as free:
            if not free:
                raise UserError(f"--out {out} is in use by another process; wait until it has ended")
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); make room, or name another folder"
        ) from None
