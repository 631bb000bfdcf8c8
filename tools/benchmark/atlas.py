"""An atlas of a million clusters beside one of ten thousand: build, folder, Chromium's time and memory.

Ratios are small / large: 1 is a cost that does not grow with the clusters, which are synthetic.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmark.browser import browser, require_programs
from benchmark.measure import describe_host
from benchmark.report import Case, Report
from megaregion.atlas.build import build_atlas
from megaregion.atlas.settings import AtlasSettings
from megaregion.atlas.synthetic import SyntheticSource
from megaregion.command_line import path, whole
from megaregion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--clusters", type=whole(), default=1_000_000, help="clusters of the large atlas")
    add("--peer-clusters", type=whole(), default=10_000, help="clusters of the small one")
    add("--sheets", type=whole(0), default=1000, help="clusters of each whose members are cropped")
    add("--folder", type=path, default=Path(), help="where both are built")
    add("--keep", action="store_true", help="leave both there, to look at")
    add("--workers", type=whole(0, 1024), default=2, help="processes that crop")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Build both and look at them.

    Raises:
        UserError: Chromium is not installed.
    """
    require_programs()
    report = Report(describe_host(device, folder=str(options.folder)))
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as passing:
        folder = options.folder if options.keep else Path(passing)
        small, large = (
            _measure_atlas(clusters, options.sheets, folder, options.workers)
            for clusters in (options.peer_clusters, options.clusters)
        )
    report.cases += _compare(large, small)
    return report


@dataclass(frozen=True)
class Look:
    """What it takes to look at an atlas in the browser."""

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


@dataclass(frozen=True)
class AtlasCost:
    """What one atlas took."""

    clusters: int
    build: float
    """Seconds."""
    files: int
    bytes: int
    look: Look


def _measure_atlas(clusters: int, sheets: int, folder: Path, workers: int) -> AtlasCost:
    """Build a synthetic atlas in FOLDER/atlas-CLUSTERS and look at it."""
    site = folder / f"atlas-{clusters}"
    began = time.perf_counter()
    settings = AtlasSettings(sheets=sheets, samples=500)
    if build_atlas(SyntheticSource(clusters), site, settings, _bar, workers) is None:
        raise UserError(f"{site} is built already, so its building cannot be timed; remove it")
    build = time.perf_counter() - began
    sizes = [path.stat().st_size for path in site.rglob("*") if path.is_file()]
    return AtlasCost(clusters, build, len(sizes), sum(sizes), _look(site, clusters // 3))


def _look(site: Path, cluster: int) -> Look:
    with browser() as window:
        window.get((site / "index.html").resolve().as_uri())
        window.wait("return performance.getEntriesByName('map').length && MapPage.state().points")
        # The browser reports its first paint a little later than it happens.
        painted = window.wait("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        drawn = window.execute_script("return performance.getEntriesByName('map')[0].startTime")
        for _ in range(4):
            window.press("+")
        window.execute_script("location.hash = '#/clusters'")
        window.wait("return document.body.dataset.shown === '#/clusters'")
        window.execute_script(
            "window.asked = performance.now(); location.hash = arguments[0];"
            "const watch = () => document.body.dataset.shown === arguments[0] "
            "? (window.came = performance.now()) : requestAnimationFrame(watch); watch();",
            f"#/cluster/{cluster}",
        )
        came = window.wait("return window.came && window.came - window.asked")
        heap = window.execute_cdp_cmd("Runtime.getHeapUsage", {})["usedSize"]
        return Look(painted, drawn, came, heap, window.memory())


def _compare(large: AtlasCost, small: AtlasCost) -> list[Case]:
    name = f"{large.clusters:,} clusters beside {small.clusters:,}"

    def case(what: str, cost: Callable[[AtlasCost], float], unit: str) -> Case:
        return Case(f"{what}, {name}", cost(large), cost(small), 0.0, unit)

    return [
        case("build", lambda cost: cost.build, "s"),
        case("files", lambda cost: cost.files, "files"),
        case("folder", lambda cost: cost.bytes / 1e6, "MB"),
        case("first paint", lambda cost: cost.look.painted, "ms"),
        case("map drawn", lambda cost: cost.look.drawn, "ms"),
        case("cluster page", lambda cost: cost.look.cluster, "ms"),
        case("JavaScript heap", lambda cost: cost.look.heap / 1e6, "MB"),
        case("browser memory", lambda cost: cost.look.memory / 1e6, "MB"),
    ]


@contextmanager
def _bar(step: str, count: int) -> Iterator[Callable[[int], object]]:
    with tqdm(total=count, desc=f"{step:<10}", unit_scale=True, disable=None) as bar:
        yield bar.update
