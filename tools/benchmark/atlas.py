"""Atlases of few and many synthetic clusters: what it takes to build one and to look at it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmark.browser import browser, require_programs
from benchmark.measure import Stopwatch, passing_folder
from benchmark.part import FOLDER, Case, part
from megaregion.atlas.build import build_atlas
from megaregion.atlas.settings import AtlasSettings
from megaregion.atlas.synthetic import SyntheticSource
from megaregion.bounds import Count, PositiveInt, Workers
from megaregion.command_line import progress
from megaregion.errors import UserError

UNITS = {
    "build": "s", "files": "files", "folder": "MB", "first paint": "ms", "map drawn": "ms",
    "cluster page": "ms", "JavaScript heap": "MB", "browser memory": "MB",
}  # fmt: skip
"""What is measured of an atlas."""


@part(
    ("--clusters", PositiveInt, 1_000_000, "clusters of the large atlas"),
    ("--peer-clusters", PositiveInt, 10_000, "clusters of the small one"),
    ("--sheets", Count, 1000, "clusters of each whose members are cropped"),
    FOLDER,
    ("--keep", bool, False, "leave both in --folder, to look at"),
    ("--workers", Workers, 2, "processes that crop"),
)
def atlas(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """An atlas of a million clusters beside one of ten thousand: build, folder, Chromium's time and memory.

    Ratios are small / large: 1 is a cost that does not grow with the clusters, which are synthetic.
    """
    require_programs()
    with passing_folder(options.folder) as passing:
        folder = options.folder if options.keep else passing
        small, large = (
            _measure(clusters, folder / f"atlas-{clusters}", options, watch)
            for clusters in (options.peer_clusters, options.clusters)
        )
    for what, unit in UNITS.items():
        case = f"{what}, {options.clusters:,} clusters beside {options.peer_clusters:,}"
        yield Case(case, large[what], small[what], unit)


def _measure(clusters: int, site: Path, options: argparse.Namespace, watch: Stopwatch) -> dict[str, float]:
    """Build a synthetic atlas and look at it."""
    settings = AtlasSettings(sheets=options.sheets, samples=500)
    built, seconds = watch.timed(
        lambda: build_atlas(SyntheticSource(clusters), site, settings, progress, options.workers)
    )
    if built is None:
        raise UserError(f"{site} is built already, so its building cannot be timed; remove it")
    sizes = [path.stat().st_size for path in site.rglob("*") if path.is_file()]
    found = {"build": seconds, "files": len(sizes), "folder": sum(sizes) / 1e6}
    return {**found, **_look(site, clusters // 3)}


def _look(site: Path, cluster: int) -> dict[str, float]:
    """Milliseconds and megabytes in the browser: the map, a zoom, a list and a cluster's page."""
    with browser() as window:
        window.get((site / "index.html").resolve().as_uri())
        window.wait("return performance.getEntriesByName('map').length && MapPage.state().points")
        # Since the navigation began; the browser reports its first paint a little later than it happens.
        painted = window.wait("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        drawn = window.execute_script("return performance.getEntriesByName('map')[0].startTime")
        for _ in range(4):
            window.press("+")
        window.execute_script("location.hash = '#/clusters'")
        window.wait("return document.body.dataset.shown === '#/clusters'")
        # From asking for the page to its data and pictures being there.
        window.execute_script(
            "window.asked = performance.now(); location.hash = arguments[0];"
            "const watch = () => document.body.dataset.shown === arguments[0] "
            "? (window.came = performance.now()) : requestAnimationFrame(watch); watch();",
            f"#/cluster/{cluster}",
        )
        came = window.wait("return window.came && window.came - window.asked")
        heap = window.execute_cdp_cmd("Runtime.getHeapUsage", {})["usedSize"]
        return {
            "first paint": painted, "map drawn": drawn, "cluster page": came,
            "JavaScript heap": heap / 1e6, "browser memory": window.memory() / 1e6,
        }  # fmt: skip
