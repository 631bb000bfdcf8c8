"""What an atlas of many clusters costs: to build, to keep, and to look at in Chromium, beside a small one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmark.browser import browser
from benchmark.report import Case
from megaregion.atlas.build import build_atlas
from megaregion.atlas.settings import AtlasSettings
from megaregion.atlas.synthetic import SyntheticSource
from megaregion.errors import UserError


@dataclass(frozen=True)
class AtlasCost:
    """What one atlas took."""

    clusters: int
    build: float
    """Seconds."""
    files: int
    bytes: int
    painted: float
    """Milliseconds from the start of the navigation to the browser's first contentful paint."""
    drawn: float
    """Milliseconds from the start of the navigation until the map shows its first clusters."""
    cluster: float
    """Milliseconds from asking for a cluster's page to its data and pictures being there."""
    heap: float
    """Bytes of JavaScript's heap after the map, a zoom, a list and a cluster's page."""
    memory: float
    """Bytes of all the browser's processes at that time, shared ones by their share."""


def measure_atlas(clusters: int, sheets: int, folder: Path, workers: int) -> AtlasCost:
    """Build a synthetic atlas in FOLDER/atlas-CLUSTERS and look at it.

    Raises:
        UserError: It is there already, or Chromium is not installed.
    """
    site = folder / f"atlas-{clusters}"
    began = time.perf_counter()
    settings = AtlasSettings(sheets=sheets, samples=500)
    if build_atlas(SyntheticSource(clusters), site, settings, _bar, workers) is None:
        raise UserError(f"{site} is built already, so its building cannot be timed; remove it")
    build = time.perf_counter() - began
    sizes = [path.stat().st_size for path in site.rglob("*") if path.is_file()]
    return _look(site, clusters, AtlasCost(clusters, build, len(sizes), sum(sizes), 0, 0, 0, 0, 0))


def compare_atlases(large: AtlasCost, small: AtlasCost) -> list[Case]:
    """The large atlas beside the small one; a ratio of 1 is a cost that does not grow."""
    name = f"{large.clusters:,} clusters beside {small.clusters:,}"

    def case(what: str, cost: Callable[[AtlasCost], float], unit: str) -> Case:
        return Case(f"{what}, {name}", cost(large), cost(small), 0.0, unit)

    return [
        case("build", lambda cost: cost.build, "s"),
        case("files", lambda cost: cost.files, "files"),
        case("folder", lambda cost: cost.bytes / 1e6, "MB"),
        case("first paint", lambda cost: cost.painted, "ms"),
        case("map drawn", lambda cost: cost.drawn, "ms"),
        case("cluster page", lambda cost: cost.cluster, "ms"),
        case("JavaScript heap", lambda cost: cost.heap / 1e6, "MB"),
        case("browser memory", lambda cost: cost.memory / 1e6, "MB"),
    ]


def _look(site: Path, clusters: int, cost: AtlasCost) -> AtlasCost:
    page = (site / "index.html").resolve().as_uri()
    number = clusters // 3
    with browser() as window:
        window.open(page)
        window.wait("return performance.getEntriesByName('map').length && MapPage.state().points")
        # The browser reports its first paint a little later than it happens.
        painted = window.wait("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        drawn = window.run("return performance.getEntriesByName('map')[0].startTime")
        for _ in range(4):
            window.press("+")
        window.run("location.hash = '#/clusters'")
        window.wait("return document.body.dataset.shown === '#/clusters'")
        address = f"#/cluster/{number}"
        window.run(
            "window.asked = performance.now(); location.hash = arguments[0];"
            "const watch = () => document.body.dataset.shown === arguments[0] "
            "? (window.came = performance.now()) : requestAnimationFrame(watch); watch();",
            address,
        )
        came = window.wait("return window.came && window.came - window.asked")
        heap = window.command("Runtime.getHeapUsage", {})["usedSize"]
        return AtlasCost(
            clusters, cost.build, cost.files, cost.bytes, painted, drawn, came, heap, window.memory()
        )


@contextmanager
def _bar(step: str, count: int) -> Iterator[Callable[[int], object]]:
    with tqdm(total=count, desc=f"{step:<10}", unit_scale=True, disable=None) as bar:
        yield bar.update
