from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megaregion.data.sample import RLE, decode_mask
from megaregion.demo.assets import PACK, PARTS, Library, load_library, read_cutout, split_names
from megaregion.demo.folder import identity, is_done, summary, write_scenes
from megaregion.demo.scenes import LEAST_VISIBLE, LETTER_HEIGHTS, WORDS, SceneMaker, SceneSettings
from megaregion.demo.words import FACES, draw_style, extent, font_folder, letter, load_vocabulary
from megaregion.errors import UserError

TOOL = Path(__file__).resolve().parents[1] / "tools" / "make_scenes.py"
ALLOWED = re.compile(r"public-domain|CC0-1\.0|CC-BY(-SA)?(-\d\.\d)?")
SMALL = SceneSettings(seed=3, sizes=((128, 128), (128, 160)))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as a user would bring them: 3 classes of 5 instances, one of them with two views."""
    root = tmp_path_factory.mktemp("own")
    for shape, fill in {"disc": (220, 60, 40), "block": (40, 160, 70), "wedge": (60, 80, 220)}.items():
        (root / "cutouts" / shape).mkdir(parents=True)
        for name in ("a", "b", "c", "d", "e@1", "e@2"):
            picture = Image.new("RGBA", (60, 50))
            draw = ImageDraw.Draw(picture)
            if shape == "disc":
                draw.ellipse((4, 4, 50, 45), fill=(*fill, 255))
            elif shape == "block":
                draw.rectangle((4, 4, 50, 45), fill=(*fill, 255))
            else:
                draw.polygon([(4, 45), (50, 45), (25, 4)], fill=(*fill, 255))
            picture.save(root / "cutouts" / shape / f"{name}.png")
    (root / "backgrounds").mkdir()
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((240, 200), Image.Resampling.BICUBIC)
        picture.save(root / "backgrounds" / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def library(own: Path) -> Library:
    return load_library(own / "cutouts", own / "backgrounds")


@pytest.fixture(scope="module")
def pack() -> Library:
    return load_library()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sources() -> list[dict[str, str]]:
    with (PACK / "SOURCES.tsv").open(encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_every_file_of_the_pack_has_one_line_with_author_source_and_a_free_licence() -> None:
    lines = sources()
    present = {str(p.relative_to(PACK)) for p in PACK.rglob("*") if p.is_file()} - {"SOURCES.tsv"}
    assert sorted(line["file"] for line in lines) == sorted(present)
    for line in lines:
        assert ALLOWED.fullmatch(line["licence"]), line
        assert all(line[key].strip() for key in ("class", "title", "author", "source")), line


def test_pack_is_small_and_all_of_it_is_usable() -> None:
    pack = load_library(PACK / "cutouts", PACK / "backgrounds")
    assert sum(p.stat().st_size for p in PACK.rglob("*") if p.is_file()) <= 15_000_000
    assert not pack.left_out
    instances: dict[str, set[str]] = {}
    for cutout in pack.cutouts:
        instances.setdefault(cutout.name, set()).add(cutout.instance)
    assert len(instances) >= 12
    assert min(len(names) for names in instances.values()) >= 10
    assert len(pack.backgrounds) >= 60


def test_classes_of_the_pack_are_those_in_its_sources(pack: Library) -> None:
    said = {line["file"]: line["class"] for line in sources() if line["class"] != "background"}
    assert {str(c.path.relative_to(PACK)): c.name for c in pack.cutouts} == said


@pytest.mark.parametrize("which", ["own", "pack"])
def test_no_instance_and_no_background_is_in_two_parts(which: str, library: Library, pack: Library) -> None:
    whole = library if which == "own" else pack
    parts = [whole.part(part) for part in PARTS]
    seen = [{i for views in p.cutouts.values() for i in views} for p in parts]
    places = [{path.stem.split("@")[0] for path in p.backgrounds} for p in parts]
    for sets in (seen, places):
        assert sum(len(members) for members in sets) == len(set.union(*sets))
    assert set.union(*seen) == {cutout.instance for cutout in whole.cutouts}
    assert {p for part in parts for p in part.backgrounds} == set(whole.backgrounds)
    assert all(part.classes == parts[0].classes for part in parts)


def test_all_views_of_an_instance_stay_together(library: Library) -> None:
    found = [library.part(part).cutouts["disc"].get("disc/e", ()) for part in PARTS]
    assert sorted(len(views) for views in found) == [0, 0, 2]


def test_test_words_are_never_train_words_in_any_case() -> None:
    words = [{w.lower() for w in load_vocabulary(part).words} for part in PARTS]
    numbers = [set(load_vocabulary(part).numbers) for part in PARTS]
    for sets in (words, numbers):
        assert sum(len(members) for members in sets) == len(set.union(*sets))
        assert all(sets)
    assert sum(len(part) for part in words) >= 600
    assert all(3 <= len(word) <= 8 for part in words for word in part)


def test_split_depends_on_names_alone_and_gives_every_part_its_share() -> None:
    names = [f"n{i}" for i in range(100)]
    split = split_names(names)
    assert split == split_names(reversed(names))
    assert [sum(part == wanted for part in split.values()) for wanted in PARTS] == [65, 10, 25]
    assert set(split_names(["x", "y", "z"]).values()) == set(PARTS)
    assert set(split_names(["x"]).values()) == {"train"}


def test_scenes_are_the_same_for_any_number_of_workers(library: Library, tmp_path: Path) -> None:
    counts = {"train": 20, "test": 5}
    write_scenes(tmp_path / "one", library, SMALL, counts, workers=1)  # type: ignore[arg-type]
    write_scenes(tmp_path / "two", library, SMALL, counts, workers=2)  # type: ignore[arg-type]
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_scene_depends_on_seed_part_and_number_only(library: Library) -> None:
    maker = SceneMaker(library, SMALL, "train")
    first, second = maker.make(7), maker.make(8)
    assert SceneMaker(library, SMALL, "train").make(7) == first
    assert first.jpeg != second.jpeg
    assert SceneMaker(library, SceneSettings(4, SMALL.sizes), "train").make(7).jpeg != first.jpeg
    assert SceneMaker(library, SMALL, "val").make(7).jpeg != first.jpeg


@pytest.mark.parametrize("which", ["own", "pack"])
def test_truth_boxes_hold_the_visible_mask_exactly(which: str, library: Library, pack: Library) -> None:
    maker = SceneMaker(library if which == "own" else pack, SMALL, "test")
    sizes = set()
    for index in range(25):
        scene = maker.make(index)
        truth = scene.truth
        sizes.add((truth["width"], truth["height"]))
        taken = np.zeros((truth["height"], truth["width"]), int)
        assert 2 <= len(truth["objects"]) <= 5
        for item in truth["objects"]:
            mask = decode_mask(RLE(tuple(item["mask"]["size"]), tuple(item["mask"]["counts"])))
            rows, columns = np.nonzero(mask)
            assert item["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert item["instance"].split("/")[0] == item["class"]
            assert LEAST_VISIBLE - 0.01 <= item["visible"] <= 1
            taken += mask
        assert taken.max() == 1
    assert sizes == {(128, 128), (128, 160)}


def test_every_word_lies_inside_its_image_and_is_large_enough_to_read(pack: Library) -> None:
    maker = SceneMaker(pack, SceneSettings(seed=1), "train")
    allowed = {word.lower() for word in load_vocabulary("train").words}
    for index in range(40):
        truth = maker.make(index).truth
        assert WORDS[0] <= len(truth["words"]) <= WORDS[1]
        for word in truth["words"]:
            x0, y0, x1, y1 = word["box"]
            assert 0 <= x0 < x1 <= truth["width"]
            assert 0 <= y0 < y1 <= truth["height"]
            assert word["height"] >= LETTER_HEIGHTS[0] - 1
            assert word["text"].lower() in allowed or not word["text"].isalpha()


def test_training_scenes_are_as_dense_as_asked_and_held_out_ones_stay_as_they_are(pack: Library) -> None:
    dense = SceneSettings(seed=2, train_objects=(4, 6), train_words=(3, 5))
    made = {
        part: [SceneMaker(pack, dense, part).make(n).truth for n in range(12)] for part in ("train", "test")
    }
    objects = [len(truth["objects"]) for truth in made["train"]]
    assert sum(objects) >= 4 * 12
    assert max(objects) <= 6
    assert sum(len(truth["words"]) for truth in made["train"]) > 2 * 12
    plain = SceneMaker(pack, SceneSettings(seed=2), "test")
    assert made["test"] == [plain.make(n).truth for n in range(12)]
    with pytest.raises(UserError, match="train_words: the fewest, 3, are more than the most, 2"):
        SceneSettings(train_words=(3, 2))


def test_the_extent_of_a_word_is_about_that_of_its_ink() -> None:
    rng = np.random.default_rng(4)
    for text in ("ink", "Harbour", "07:45") * 8:
        style = draw_style(rng, (22, 64), bright_ground=True)
        x0, y0, x1, y1 = letter(text, style, 200).ink
        assert extent(text, style, 200) == pytest.approx((x1 - x0, y1 - y0), rel=0.2, abs=4)


def test_words_differ_from_what_was_behind_them(library: Library) -> None:
    maker = SceneMaker(library, SceneSettings(seed=5), "train")
    for index in range(20):
        scene = maker.make(index)
        with Image.open(io.BytesIO(scene.jpeg)) as image:
            gray = np.asarray(image.convert("L"), float)
        for word in scene.truth["words"]:
            x0, y0, x1, y1 = word["box"]
            low, high = np.percentile(gray[y0:y1, x0:x1], (5, 95))
            assert high - low > 50, (index, word)


def test_all_fonts_are_there() -> None:
    assert all((font_folder() / face).is_file() for face in FACES)


def test_bad_files_among_good_ones_are_left_out_with_a_reason(own: Path, tmp_path: Path) -> None:
    cutouts = tmp_path / "cutouts"
    (cutouts / "disc").mkdir(parents=True)
    for name in "abc":
        (cutouts / "disc" / f"{name}.png").write_bytes((own / "cutouts/disc/a.png").read_bytes())
    (cutouts / "disc" / "torn.png").write_bytes((own / "cutouts/disc/a.png").read_bytes()[:60])
    (cutouts / "disc" / "text.png").write_text("no picture")
    (cutouts / "disc" / "notes.txt").write_text("not looked at")
    Image.new("RGB", (40, 40)).save(cutouts / "disc" / "opaque.png")
    Image.new("RGBA", (40, 40)).save(cutouts / "disc" / "empty.png")
    Image.new("1", (12_000, 12_000)).save(cutouts / "disc" / "bomb.png")
    found = load_library(cutouts, own / "backgrounds")
    assert {c.path.stem for c in found.cutouts} == {"a", "b", "c"}
    reasons = {path.stem: reason for path, reason in found.left_out.items()}
    assert set(reasons) == {"torn", "text", "opaque", "empty", "bomb"}
    assert reasons["opaque"] == "has no alpha"
    assert "pixels" in reasons["bomb"]


def test_folders_without_anything_usable_are_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_library(tmp_path / "missing", own / "backgrounds")
    with pytest.raises(UserError, match="one folder per class"):
        load_library(own / "backgrounds", own / "backgrounds")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no usable picture"):
        load_library(own / "cutouts", tmp_path / "empty")


def test_too_few_files_for_a_part_are_refused_before_any_scene_is_made(own: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jpg").write_bytes((own / "backgrounds" / "0.jpg").read_bytes())
    poor = load_library(own / "cutouts", tmp_path / "one")
    with pytest.raises(UserError, match="too few backgrounds for the part 'test'"):
        write_scenes(tmp_path / "out", poor, SMALL, {"train": 2, "test": 1}, workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(40, 256), (256, 9000)])
def test_impossible_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"sizes must lie in \[96, 4096\], got (40|9000); 256 is usual"):
        SceneSettings(sizes=(size,))


def test_a_stop_half_way_leaves_nothing_and_a_rerun_starts_over(library: Library, tmp_path: Path) -> None:
    def stop(scenes: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "scenes"
    with pytest.raises(KeyboardInterrupt):
        write_scenes(out, library, SMALL, {"train": 20}, workers=1, on_progress=stop)
    assert not out.exists()
    write_scenes(out, library, SMALL, {"train": 3}, workers=1)
    assert re.search(r"^scenes +3$", summary(out), re.M)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_a_place_that_cannot_be_written_is_one_clear_error(library: Library, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_scenes(tmp_path / "file" / "scenes", library, SMALL, {"train": 2}, workers=1)


def test_finished_scenes_are_kept_and_others_replaced_only_by_force(library: Library, tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    wanted = identity(library, SMALL, {"train": 2})
    assert not is_done(out, wanted, force=False)
    write_scenes(out, library, SMALL, {"train": 2}, workers=1)
    assert is_done(out, wanted, force=False)
    other = identity(library, SceneSettings(seed=9), {"train": 2})
    with pytest.raises(UserError, match=r"other settings \(settings\).*--force"):
        is_done(out, other, force=False)
    assert not is_done(out, other, force=True)


def test_a_folder_that_is_not_ours_is_never_replaced(library: Library, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for content in (None, "[]", "7", "{"):
        if content is not None:
            (tmp_path / "scenes.json").write_text(content)
        for force in (False, True):
            with pytest.raises(UserError, match="holds no scenes of ours; name another folder"):
                is_done(tmp_path, identity(library, SMALL, {"train": 2}), force)


def test_command_makes_scenes_of_own_folders_and_skips_the_second_time(own: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--out", str(tmp_path / "scenes"), "--train", "4", "--val", "1"]
    command += ["--test", "2", "--size", "128", "--workers", "1"]
    command += ["--cutouts", str(own / "cutouts"), "--backgrounds", str(own / "backgrounds")]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "7 scenes" in first.stdout
    assert re.search(r"scenes\s+4\s+1\s+2\n", first.stdout)
    before = files(tmp_path / "scenes")
    assert "holds these scenes already" in subprocess.run(command, capture_output=True, text=True).stdout
    assert files(tmp_path / "scenes") == before
    for part in ("train", "val", "test"):
        lines = (tmp_path / "scenes" / part / "truth.jsonl").read_text().splitlines()
        images = {path.stem for path in (tmp_path / "scenes" / part / "images").iterdir()}
        assert {json.loads(line)["key"] for line in lines} == images
    refused = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--force" in refused.stderr


def test_workers_end_with_a_parent_that_is_killed() -> None:
    program = "import time; from megaregion.errors import spread; list(spread(time.sleep, [600, 600], 2))"
    parent = subprocess.Popen([sys.executable, "-c", program])
    # Two workers, and the process that tidies up what they share.
    while len(made := Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()) < 3:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(Path("/proc", each).exists() for each in made):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_reading_a_cutout_trims_what_is_transparent(own: Path) -> None:
    assert read_cutout(own / "cutouts" / "block" / "a.png").size == (47, 42)
