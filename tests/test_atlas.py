"""The atlas: what it counts and draws, and how it behaves in a real browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from atlas_data import CLUSTERS, SAMPLES, DeadlySource, curated_folder
from launch import tool
from pages import click, complaints, prefer, require_browser
from PIL import Image

from benchmark.browser import Browser, browser
from megaregion.atlas import centers as of_centers
from megaregion.atlas.build import Outcome, build_atlas
from megaregion.atlas.centers import ROOM, find_neighbours, make_map_tiles, place_clusters, principal_axes
from megaregion.atlas.crops import cut_tile
from megaregion.atlas.groups import Members, by_chance, by_distance
from megaregion.atlas.settings import AtlasSettings
from megaregion.atlas.source import ROW, CuratedSource, Rows, Source
from megaregion.atlas.synthetic import SyntheticSource
from megaregion.data.sample import SampleRecord, parse_sample
from megaregion.errors import UserError
from megaregion.files import locked

SETTINGS = AtlasSettings(members=4, tile=64, samples=12)


@contextmanager
def silent(step: str, total: int) -> Iterator[Callable[[int], object]]:
    yield lambda done: None


def build(source: Source, out: Path, settings: AtlasSettings = SETTINGS, workers: int = 0) -> Outcome | None:
    return build_atlas(source, out, settings, silent, workers)


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return tool("tools/atlas.py", *arguments)


def chunk(site: Path, name: str) -> object:
    """What a chunk's script brings."""
    text = (site / "data" / f"{name}.js").read_text(encoding="ascii")
    match = re.fullmatch(r'atlas\("([^"]+)",(.*)\)\n', text, re.DOTALL)
    assert match is not None
    assert match[1] == name
    return json.loads(match[2])


def rows_of(label: np.ndarray, closeness: np.ndarray) -> Rows:
    """A region of each sample."""
    rows = np.zeros(len(label), ROW)
    rows["label"], rows["sample"], rows["closeness"] = label, np.arange(len(label)), closeness
    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def curation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return curated_folder(tmp_path_factory.mktemp("curation"))


@pytest.fixture(scope="module")
def site(curation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "atlas"
    outcome = build(CuratedSource(curation), out)
    assert outcome is not None
    assert (outcome.clusters, outcome.browsed, outcome.damaged) == (CLUSTERS, 12, 1)
    return out


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    require_browser()
    with browser() as found:
        yield found


# What is counted.


def test_members_are_the_best_of_all_batches_whatever_their_cut() -> None:
    rng = np.random.default_rng(0)
    label, closeness = rng.integers(0, 30, 5000), rng.random(5000).astype(np.float32)
    rows = rows_of(label, closeness)
    for cuts in ([5000], [1, 10, 700, 701, 5000]):
        members = Members(32, 6)
        for start, stop in zip([0, *cuts], cuts, strict=False):
            members.add(rows[start:stop], by_distance(rows[start:stop]))
        for group in range(30):
            own = np.flatnonzero(label == group)
            assert members.table["sample"][group].tolist() == own[np.argsort(-closeness[own])][:6].tolist()
        assert (members.table["sample"][30:] == -1).all()


def test_random_members_change_with_the_seed_and_favour_nobody() -> None:
    rows = rows_of(np.zeros(4000, dtype=np.int64), np.zeros(4000, dtype=np.float32))
    draws = []
    for seed in (0, 1):
        members = Members(1, 400)
        members.add(rows, by_chance(rows, seed))
        draws.append(members.table["sample"][0])
        assert abs(draws[-1].mean() - 2000) < 4 * 4000 / 12**0.5 / 400**0.5
    assert len(np.intersect1d(*draws)) < 100


def test_neighbours_by_cells_are_nearly_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    centers = SyntheticSource(6000).centers()
    axes = principal_axes(centers)
    exact = find_neighbours(centers, axes, 5, lambda done: None)
    monkeypatch.setattr(of_centers, "EXACT", 0)
    cells = find_neighbours(centers, axes, 5, lambda done: None)
    same = [len(np.intersect1d(a, b)) for a, b in zip(exact.cluster, cells.cluster, strict=True)]
    assert np.mean(same) / 5 > 0.9
    assert (exact.cluster != np.arange(6000)[:, None]).all()
    assert (np.diff(exact.cosine, axis=1) <= 0).all()
    unit = centers / np.linalg.norm(centers, axis=1, keepdims=True)
    assert np.allclose(exact.cosine[7], unit[exact.cluster[7]] @ unit[7], atol=1e-5)


def test_every_cluster_has_one_seat_on_the_map_and_the_largest_sit_highest() -> None:
    rng = np.random.default_rng(1)
    position = np.concatenate([rng.random((3000, 2)), np.full((2500, 2), 0.25), [[0.0, 0.0], [1.0, 1.0]]])
    position = position.astype(np.float32)
    sizes = rng.integers(0, 1000, 5502)
    tiles = make_map_tiles(position, sizes)
    assert sorted(np.concatenate(list(tiles.values())).tolist()) == list(range(5502))
    assert sorted(sizes[tiles["0-0-0"]]) == sorted(np.sort(sizes)[-ROOM:])
    for name, clusters in tiles.items():
        level, x, y = (int(part) for part in name.split("-"))
        inside = position[clusters] * 2**level
        assert ((inside >= [x, y]) & (inside <= [x + 1, y + 1])).all()
        assert (np.diff(sizes[clusters]) <= 0).all()


def test_a_map_of_two_channels_or_of_one_cluster_is_still_a_map() -> None:
    for centers in (np.eye(2, dtype=np.float32), np.ones((1, 1), dtype=np.float32)):
        places = place_clusters(principal_axes(centers), "pca", 0)
        assert ((places.position >= 0) & (places.position <= 1)).all()


def test_a_tile_shows_the_region_where_its_box_says() -> None:
    image = Image.new("RGB", (300, 120), (0, 0, 0))
    image.paste((255, 0, 0), (250, 40, 290, 60))
    for box in ((250, 40, 290, 60), (0, 0, 300, 120), (-20, 10, 5, 500), (10, 10, 11, 11)):
        tile = cut_tile(image, box, 100)
        assert all(0 <= edge <= 1000 for edge in tile.box)
        assert tile.box[0] <= tile.box[2]
    tile = cut_tile(image, (250, 40, 290, 60), 100)
    red = np.asarray(Image.open(io.BytesIO(tile.jpeg)))[:, :, 0] > 128
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    found = [columns[0] * 10, rows[0] * 10, (columns[-1] + 1) * 10, (rows[-1] + 1) * 10]
    assert np.allclose(found, tile.box, atol=15)


# What is written.


def test_pages_tell_what_the_shards_hold(site: Path, curation: Path) -> None:
    source = CuratedSource(curation)
    rows = np.concatenate([batch.objects for batch in source.batches()])
    label, closeness = rows["label"], rows["closeness"]
    sizes = [
        size for first in range(0, CLUSTERS, 64) for size in chunk(site, f"clusters/{first // 64}")["size"]
    ]
    assert sizes == np.bincount(label, minlength=CLUSTERS).tolist()
    assert np.isfinite(closeness).all()
    largest = int(np.argmax(sizes))
    nearest, random = chunk(site, f"clusters/{largest // 64}")["members"][largest % 64]
    shown = [value / 1000 for value in nearest[2::7]]
    assert np.allclose(shown, np.sort(closeness[label == largest])[::-1][:4], atol=6e-4)
    assert len(random) == 4 * 7
    for sample, region in zip(nearest[::7], nearest[1::7], strict=True):
        assert source.read(sample).record.regions[region].label == largest


def test_a_second_build_is_skipped_and_another_seed_is_not(curation: Path, tmp_path: Path) -> None:
    source = CuratedSource(curation)
    assert build(source, tmp_path / "a", workers=0) is not None
    before = contents(tmp_path / "a")
    stamp = (tmp_path / "a" / "index.html").stat().st_mtime_ns
    assert build(source, tmp_path / "a", workers=0) is None
    assert (tmp_path / "a" / "index.html").stat().st_mtime_ns == stamp
    assert build(source, tmp_path / "b", workers=2) is not None
    assert contents(tmp_path / "b") == before
    assert build(source, tmp_path / "a", AtlasSettings(members=4, tile=64, samples=12, seed=1)) is not None
    assert contents(tmp_path / "a") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_build_that_fails_leaves_what_was_there(curation: Path, tmp_path: Path) -> None:
    class Failing(CuratedSource):
        def batches(self) -> Iterator[object]:
            yield from super().batches()
            raise OSError(28, "No space left on device")

    assert build(CuratedSource(curation), tmp_path / "atlas") is not None
    before = contents(tmp_path / "atlas")
    with pytest.raises(UserError, match="No space left"):
        build(Failing(curation), tmp_path / "atlas", AtlasSettings(seed=5))
    assert contents(tmp_path / "atlas") == before
    assert [path.name for path in tmp_path.iterdir()] == ["atlas"]


def test_a_place_where_another_process_builds_is_left_to_it(curation: Path, tmp_path: Path) -> None:
    with locked(tmp_path / ".atlas.lock"), pytest.raises(UserError, match="in use by another process"):
        build(CuratedSource(curation), tmp_path / "atlas")
    assert [path.name for path in tmp_path.iterdir()] == [".atlas.lock"]


def test_a_label_that_has_no_class_is_refused(
    curation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parse_sample

    def damaged(record: bytes) -> SampleRecord:
        read = real(record)
        return read._replace(regions=(read.regions[0]._replace(label=CLUSTERS), *read.regions[1:]))

    monkeypatch.setattr("megaregion.atlas.source.parse_sample", damaged)
    with pytest.raises(
        UserError, match=f"object label {CLUSTERS} is outside the label space of {CLUSTERS} classes"
    ):
        build(CuratedSource(curation), tmp_path / "atlas")
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a worker died"):
        build(DeadlySource(40), tmp_path / "atlas", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line_and_exit_code_2(curation: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    lost = tmp_path / "lost"
    shutil.copytree(curation, lost)
    (lost / "shards" / "centers.npy").unlink()
    other = tmp_path / "other"
    shutil.copytree(curation, other)
    regions = other / "stages" / "embed" / "00000" / "regions.jsonl"
    regions.write_text(regions.read_text().replace('"sample', '"another'))
    out = tmp_path / "out"
    for arguments, words in (
        (["nowhere", "--out", out], "holds no finished curation"),
        ([tmp_path / "empty", "--out", out], "holds no finished curation"),
        ([lost, "--out", out], "centers.npy does not exist"),
        ([other, "--out", out, "--workers", 0], "the stages are of another run"),
        ([curation, "--out", tmp_path / "taken"], "is no atlas"),
        ([curation, "--members", 0, "--out", out], "--members must lie in"),
        ([curation, "--synthetic", 10, "--out", out], "one of the two"),
    ):
        done = run_tool(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("megaregion: ")
        assert words in done.stderr
    assert not out.exists()
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "precious"
    assert not list(tmp_path.glob(".*.partial"))


def test_umap_says_what_it_needs_where_it_is_not_installed(curation: Path, tmp_path: Path) -> None:
    try:
        import umap
    except ImportError:
        with pytest.raises(UserError, match="pip install umap-learn"):
            build(CuratedSource(curation), tmp_path / "atlas", AtlasSettings(map="umap"))
    else:
        assert umap
        assert build(CuratedSource(curation), tmp_path / "atlas", AtlasSettings(map="umap")) is not None


def test_shards_alone_give_random_members_only(curation: Path, tmp_path: Path) -> None:
    done = run_tool(curation / "shards", "--out", tmp_path / "atlas", "--workers", 0, "--tile", 32)
    assert done.returncode == 0, done.stderr
    assert "random members only" in done.stdout
    assert chunk(tmp_path / "atlas", "manifest")["knowsCloseness"] is False
    members = chunk(tmp_path / "atlas", "clusters/0")["members"]
    assert all(nearest == [] for nearest, _ in members)
    assert any(random for _, random in members)


# What is seen.

LOADED = """
const seen = (image) => image.getBoundingClientRect().top < innerHeight;
const images = [...document.querySelectorAll("main img")].filter(seen);
return images.length >= arguments[0] && images.every((image) => image.complete && image.naturalWidth > 8);
"""


def go(window: Browser, site: Path, address: str) -> None:
    window.get("about:blank")
    window.get(f"{(site / 'index.html').as_uri()}{address}")
    window.wait("return document.body.dataset.shown === arguments[0]", address)


def test_every_page_opens_from_a_file_with_its_pictures_and_no_complaint(window: Browser, site: Path) -> None:
    busiest = int(np.argmax(chunk(site, "clusters/0")["size"]))
    for address, words, images in (
        ("#/", f"{CLUSTERS}", 0),
        ("#/clusters", "Clusters by size", 8),
        ("#/clusters/spread/1", "page 2 of 2", 1),
        (f"#/cluster/{busiest}", "Nearest to the center", 8),
        (f"#/map/{busiest}", f"{CLUSTERS}", 0),
        ("#/tokens", "token", 0),
        ("#/token/300", "Token", 0),
        ("#/samples", "12 samples", 4),
        ("#/clusters/size/9", "There is no page 9", 0),
        (f"#/cluster/{CLUSTERS}", f"There is no cluster {CLUSTERS}", 0),
        ("#/nothing", "There is no page #/nothing", 0),
        ("#/constructor", "There is no page #/constructor", 0),
        ("#/__proto__", "There is no page #/__proto__", 0),
        ("#/%", "There is no page #/%", 0),
        ("#/cluster/%", "There is no cluster %", 0),
        ("#/clusters/constructor", "Clusters cannot be ordered by constructor", 0),
        ("#/clusters/size/0.5", "There is no page 0.5", 0),
        ("#/token/%E0%A4", "There is no token", 0),
        ("#/samples/constructor", "There is no page constructor", 0),
        ("#/map/constructor", "There is no cluster", 0),
        ("#/map/0.5", "There is no cluster 0.5", 0),
    ):
        go(window, site, address)
        text = window.execute_script("return document.title + ' ' + document.body.innerText")
        assert words.lower() in text.lower(), (address, text)
        window.wait(LOADED, images)
        assert complaints(window) == [], address


def test_search_goes_to_clusters_tokens_and_samples(window: Browser, site: Path) -> None:
    key = chunk(site, "samples/index")["key"][3]
    tokens = chunk(site, "tokens/index")
    word = next(p for p, size in zip(tokens["piece"], tokens["size"], strict=True) if size and p.isascii())
    for typed, place in (("17", "#/cluster/17"), (word, "#/token/"), (key, "#/sample/")):
        go(window, site, "#/")
        window.press("/")
        window.wait("return document.activeElement.id === 'search'")
        window.press(typed)
        window.wait("return document.querySelector('#found [role=option]')")
        window.press("\ue007")
        window.wait("return location.hash.startsWith(arguments[0])", place)
        window.wait("return document.body.dataset.shown === location.hash")
    go(window, site, "#/")
    window.press("/")
    window.press("99999")
    window.wait("return document.querySelector('#found .none')?.innerText.includes('Nothing found')")
    assert complaints(window) == []


def test_the_map_shows_every_cluster_and_leads_to_its_page(window: Browser, site: Path) -> None:
    go(window, site, "#/")
    state = window.wait("const state = MapPage.state(); return state.covers > 3 && state")
    assert state["points"] == CLUSTERS
    before = state["scale"]
    window.press("+")
    window.wait("return MapPage.state().scale > arguments[0] * 1.5", before)
    window.press("0")
    window.wait("return Math.abs(MapPage.state().scale - arguments[0]) < 1", before)
    x, y = window.wait(
        "const free = MapPage.points().find((p) => p.x > 420 && p.y > 90 && p.x < innerWidth - 120); "
        "return free && [Math.round(free.x), Math.round(free.y)]"
    )
    click(window, x, y)
    window.wait("return location.hash.startsWith('#/cluster/')")
    window.press("\ue014")
    assert complaints(window) == []


def test_a_member_leads_to_its_sample_where_its_box_is_lit(window: Browser, site: Path) -> None:
    for cluster in range(CLUSTERS):
        go(window, site, f"#/cluster/{cluster}")
        if window.execute_script("return document.querySelector('a.tile[href^=\"#/sample/\"]') !== null"):
            break
    target = window.execute_script(
        "const tile = document.querySelector('a.tile[href^=\"#/sample/\"]'); "
        "tile.click(); return tile.getAttribute('href')"
    )
    window.wait("return document.body.dataset.shown === arguments[0]", target)
    window.wait(LOADED, 1)
    lit = window.execute_script(
        "return [...document.querySelectorAll('.overlay .lit')].map((box) => box.dataset.region)"
    )
    assert lit == [target.rsplit("/", 1)[1]]
    assert window.execute_script("return document.querySelectorAll('.overlay rect.object').length") > 0
    window.press("b")
    assert (
        window.execute_script("return getComputedStyle(document.querySelector('.overlay')).display") == "none"
    )
    window.press("b")
    assert complaints(window) == []


def test_text_from_images_never_becomes_markup(window: Browser, site: Path) -> None:
    numbers = range(SAMPLES)
    for number in numbers:
        go(window, site, f"#/sample/{number}")
        if "<img" in window.execute_script("return document.body.innerText"):
            break
    else:
        pytest.fail("no sample shows the text that looks like markup")
    assert window.execute_script("return document.querySelector('img[src=nothing]')") is None
    assert complaints(window) == []


def test_the_page_follows_the_colour_scheme_and_fits_a_phone(window: Browser, site: Path) -> None:
    shades = []
    for scheme in ("light", "dark"):
        prefer(window, scheme)
        go(window, site, "#/clusters")
        shades.append(window.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert shades == ["rgb(247, 246, 243)", "rgb(19, 20, 23)"]
    prefer(window, "light")
    window.resize(390, 844)
    for address in ("#/", "#/clusters", "#/cluster/3", "#/tokens", "#/samples", "#/sample/0"):
        go(window, site, address)
        assert window.execute_script("return document.documentElement.scrollWidth") <= 390, address
    window.resize(1280, 860)
    assert complaints(window) == []


def test_a_folder_copied_in_part_says_which_file_is_missing(
    window: Browser, site: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(site, copy)
    (copy / "data" / "clusters" / "0.js").unlink()
    go(window, copy, "#/cluster/3")
    assert "data/clusters/0.js cannot be loaded" in window.execute_script("return document.body.innerText")
    complaints(window)


def test_a_synthetic_atlas_draws_only_what_the_view_needs(window: Browser, tmp_path: Path) -> None:
    out = tmp_path / "atlas"
    assert (
        build(SyntheticSource(6000), out, AtlasSettings(members=2, tile=32, sheets=40, samples=6)) is not None
    )
    manifest = chunk(out, "manifest")
    assert sum(manifest["map"].values()) == manifest["clusters"] == 6000
    assert manifest["regions"] >= 6000 * 9
    go(window, out, "#/")
    window.wait(
        "const state = MapPage.state(); return state.covers > 3 && state.points >= arguments[0]", ROOM
    )
    go(window, out, "#/map/4321")
    window.wait("const state = MapPage.state(); return state.points > 0 && state.points < 3000")
    go(window, out, "#/cluster/4321")
    assert "40 largest clusters" in window.execute_script("return document.body.innerText")
    assert complaints(window) == []
