from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from megaregion.config import RunConfig
from megaregion.data.image import decode_image
from megaregion.data.sample import encode_mask
from megaregion.errors import UserError
from megaregion.evaluation.classifiers import DECAYS, choose_decay, fit_probe, hold_out, nearest, vote
from megaregion.evaluation.encoders import CropEncoder, centred_pixels, pixel_map
from megaregion.evaluation.encoding import (
    Batches,
    EncodedScenes,
    MappedScenes,
    SceneFeatures,
    coverage,
    fit_basis,
    pooled,
)
from megaregion.evaluation.measures import estimate, share
from megaregion.evaluation.measures.correspondence import (
    correspondence_table,
    draw_pairs,
    peak_inside,
    right_box,
)
from megaregion.evaluation.measures.images import image_table, read_image_folder
from megaregion.evaluation.measures.reading import is_exact, judged, prior_share, reading_tables
from megaregion.evaluation.measures.recognition import Named, draw_scenes, recognise, recognition_table
from megaregion.evaluation.measures.retrieval import DEPTHS, retrieval_table
from megaregion.evaluation.measures.segmentation import mean_iou, overlaps, segmentation_table
from megaregion.evaluation.measures.separation import (
    area_under_curve,
    best_colour,
    exact_area,
    separation_table,
)
from megaregion.evaluation.scenes import (
    IGNORED,
    TRUTH,
    Scene,
    Tokens,
    TrueRegion,
    Truth,
    Vocabulary,
    class_map,
    read_image,
    read_scenes,
    truth_map,
)
from megaregion.schemas.evaluation import Table, markdown, scalars, text
from megaregion.training.metrics import Shown, Trackers

CLASSES = ("cat", "dog", "owl")


def make_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of 96 x 96 with two objects on the left and the right, a word below, and masks a box smaller."""
    rng = np.random.default_rng(seed)
    scenes = []
    for number in range(count):
        objects = []
        for x in (4, 52):
            name = CLASSES[rng.integers(3)]
            mask = np.zeros((96, 96), bool)
            mask[10:50, x + 2 : x + 38] = True
            instance = f"{name}-{seed}-{rng.integers(4)}"
            objects.append(TrueRegion(name, (x, 8, x + 40, 52), instance, encode_mask(mask)))
        word = TrueRegion("EXIT", (10, 64, 60, 84))
        scenes.append(Scene(f"s{seed}-{number:03d}", Path("none.jpg"), 96, 96, tuple(objects), (word,)))
    return scenes


def truth_of(scene: Scene) -> NDArray[np.int16]:
    truth = truth_map(scene)
    assert truth is not None
    return truth


def painted(scene: Scene, cells: int = 24) -> NDArray[np.float32]:
    """A map that says of every cell how much of each class, background and word it holds."""
    named = class_map(scene, truth_of(scene), CLASSES)
    planes = [coverage(named == label, cells, cells) for label in range(-1, 4)]
    return np.stack(planes, axis=-1).astype(np.float32)


def blind(scene: Scene) -> NDArray[np.float32]:
    return np.random.default_rng(len(scene.key)).standard_normal((12, 12, 5)).astype(np.float32)


def mapped(scenes: list[Scene]) -> MappedScenes:
    maps = {"clear": [painted(s) for s in scenes], "blind": [blind(s) for s in scenes]}
    return MappedScenes(scenes, [truth_of(s) for s in scenes], maps, {})


@pytest.fixture(scope="module")
def known() -> MappedScenes:
    return mapped(make_scenes(24, 1))


@pytest.fixture(scope="module")
def asked() -> MappedScenes:
    return mapped(make_scenes(16, 2))


def cell(table: Table, encoder: str, column: str) -> float:
    found = table.rows[encoder][column]
    assert found is not None
    assert found.low <= found.mean <= found.high
    return found.mean


# ---- estimates -------------------------------------------------------------------------------------


def test_the_mean_is_over_seeds_and_the_interval_holds_it() -> None:
    right = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], bool)
    found = share(right, ["a", "b", "c", "d"])
    assert found is not None
    assert found.seeds == (0.5, 0.75)
    assert found.mean == pytest.approx(0.625)
    assert found.low < 0.4
    assert found.high > 0.9


def test_the_interval_holds_the_truth_in_about_95_of_100_worlds_whose_groups_differ() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for world in range(150):
        # 40 cut-outs of 6 views each, some easy and some hard: views of one cut-out are right together.
        skill = rng.beta(1, 1, size=40)
        right = rng.random((40, 6)) < skill[:, None]
        found = share(right.ravel(), np.repeat(np.arange(40), 6).tolist(), seed=world)
        assert found is not None
        held += found.low <= 0.5 <= found.high
    assert 0.88 <= held / 150 <= 0.99
    alone = share(right.ravel(), list(range(240)))
    assert alone is not None
    # Views taken for independent would promise far more than they know.
    assert alone.high - alone.low < 0.75 * (found.high - found.low)


def test_a_query_counts_under_the_seeds_that_ask_it_and_no_other() -> None:
    right = np.array([[1, 1, 0], [0, 1, 1]], bool)
    found = share(right, ["a", "b", "c"], asked=[[1, 1, 0], [0, 0, 1]])
    assert found is not None
    assert found.seeds == (1.0, 1.0)
    by_seed = share(right, [["a", "b", "c"], ["c", "b", "a"]])
    assert by_seed is not None
    assert by_seed.seeds == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_what_cannot_be_said_is_none_and_not_a_number() -> None:
    assert share(np.zeros((3, 0), bool), []) is None
    assert estimate(np.zeros((1, 4, 9)), mean_iou) is None
    assert share(np.ones((2, 3)), ["a", "b", "c"], asked=np.zeros((2, 3), bool)) is None


def test_sums_give_the_textbook_values() -> None:
    matrix = np.array([[50, 0, 0], [10, 30, 0], [0, 0, 0]], float)
    # Background 50 of 60, the one class that occurs 30 of 40; the class that never occurs does not count.
    sums = np.concatenate([matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)])
    assert mean_iou(sums) == pytest.approx((50 / 60 + 30 / 40) / 2)
    negative, positive = np.array([3, 1, 0, 0], float), np.array([0, 1, 1, 2], float)
    pairs = (3 * 4 + 1 * 0.5 + 1 * 3) / 16
    assert area_under_curve(np.concatenate([negative, positive])) == pytest.approx(pairs)


def test_the_area_of_scores_counts_ties_half() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 80).astype(np.float32)
    inside = rng.random(80) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[inside] for b in scores[~inside]]
    assert exact_area(scores, inside) == pytest.approx(np.mean(pairs))


# ---- probe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 900])
def test_a_probe_learns_what_is_linear_also_of_features_wider_than_they_are_many(width: int) -> None:
    rng = np.random.default_rng(width)
    middles = rng.standard_normal((3, width)) * (4 / width**0.5)
    label = rng.integers(3, size=300)
    features = (middles[label] + rng.standard_normal((300, width)) * 0.3).astype(np.float32)
    features[:, 0] += 1000  # A shifted, scaled channel must not matter.
    names = [CLASSES[i] for i in label]
    fitted = fit_probe(features[:200], names[:200], 0.1)
    assert np.mean(np.asarray(fitted.predict(features[200:])) == names[200:]) > 0.95


@pytest.mark.parametrize("rows", [600, 2000])
def test_a_probe_of_features_that_are_all_alike_names_the_most_frequent_class(rows: int) -> None:
    features = np.tile(np.random.default_rng(0).standard_normal(900).astype(np.float32), (rows, 1))
    names = ["cat", "dog", "cat"] * (rows // 3) + ["cat"] * (rows % 3)
    assert set(fit_probe(features, names, 0.1).predict(features)) == {"cat"}


def test_weight_decay_is_strong_where_labels_are_noise_and_weak_where_they_are_not() -> None:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((240, 40)).astype(np.float32)
    groups = [f"g{i // 4}" for i in range(240)]
    clear = [CLASSES[int(row[0] > 0)] for row in features]
    assert choose_decay(features, clear, groups) in DECAYS
    assert choose_decay(features, ["one"] * 120 + ["two"] * 120, ["a"] * 120 + ["b"] * 120) > 0


def test_a_held_out_group_is_whole_and_never_a_class_of_its_own() -> None:
    names = ["cat"] * 8 + ["dog"] * 4
    groups = ["a", "a", "b", "b", "c", "c", "d", "d", "e", "e", "e", "e"]
    held = hold_out(names, groups, seed=3)
    assert held[:8].sum() == 2
    assert len({group for group, out in zip(groups, held, strict=True) if out}) == 1
    assert not held[8:].any()


# ---- regions ---------------------------------------------------------------------------------------


def features_of(scenes: list[Scene], knows: bool, seed: int) -> NDArray[np.float32]:
    table = Truth(scenes).objects
    rng = np.random.default_rng(seed)
    middles = np.eye(3, 6, dtype=np.float32)[[CLASSES.index(name) for name in table.names]]
    features = (middles if knows else 0) + 0.1 * rng.standard_normal((len(table), 6))
    return features.astype(np.float32)


def labelled(scenes: list[Scene], knows: bool, seed: int) -> Named:
    return features_of(scenes, knows, seed), Truth(scenes).objects


def encoded(scenes: list[Scene], seed: int) -> EncodedScenes:
    """Objects as an oracle and as noise see them."""
    return seen(scenes, {name: features_of(scenes, name == "oracle", seed) for name in ("oracle", "noise")})


def seen(scenes: Sequence[Scene], objects: dict[str, NDArray[np.float32]]) -> EncodedScenes:
    """Scenes whose objects encoders see so, and no words."""
    return EncodedScenes(Truth(scenes), {name: SceneFeatures(own, own[:0]) for name, own in objects.items()})


def test_features_that_tell_the_class_score_1_and_noise_scores_chance() -> None:
    table = recognition_table(encoded(make_scenes(40, 1), 1), encoded(make_scenes(40, 2), 2), seeds=3)
    for column in ("knn", "linear"):
        assert cell(table, "oracle", column) == 1.0
        assert cell(table, "noise", column) < 0.55
    assert len(table.rows["noise"]["knn"].seeds) == 3  # type: ignore[union-attr]
    assert 0.2 < table.columns[0].chance < 0.6  # type: ignore[operator]


def test_one_seed_takes_the_whole_gallery_and_more_take_four_fifths_of_its_scenes() -> None:
    scenes = np.repeat(np.arange(10), 2)
    assert draw_scenes(scenes, 0, 1).all()
    drawn = [draw_scenes(scenes, seed, 5) for seed in range(5)]
    assert all(each.sum() == 16 for each in drawn)
    assert len({each.tobytes() for each in drawn}) > 1
    known, asked = labelled(make_scenes(9, 1), True, 1), labelled(make_scenes(5, 2), False, 2)
    by_hand = vote(nearest(asked[0], known[0]), known[1].names)
    everything = (np.ones(len(known[1]), bool), np.ones(len(asked[1]), bool))
    found = recognise(known, asked, [everything])["knn"]
    assert found is not None
    assert found.mean == pytest.approx(np.mean(np.asarray(by_hand) == asked[1].names))


def test_retrieval_counts_matches_in_other_scenes_only_and_leaves_out_who_has_none() -> None:
    cat, same, dog, other, owl = (
        TrueRegion(name, (0, 0, 9, 9), instance)
        for name, instance in (("cat", "c1"), ("cat", "c1"), ("dog", "d1"), ("cat", "c2"), ("owl", "o1"))
    )
    scenes = [
        Scene(f"s{number}", Path("none.jpg"), 9, 9, objects, ())
        for number, objects in enumerate(((cat, same), (dog, other), (owl,)))
    ]
    # Row 0 is nearest to row 1 (own scene, barred), then to the dog, then to the cat of scene 1.
    features = np.array([[1, 0], [1, 0.01], [1, 0.2], [1, 0.3], [0, 1]], np.float32)
    found = retrieval_table(seen(scenes, {"e": features}))
    assert cell(found, "e", "class_at_1") == pytest.approx(1 / 3)
    assert cell(found, "e", "class_at_5") == 1.0
    # No cut-out stands in two scenes: nobody can ask.
    assert [found.rows["e"][f"cutout_at_{depth}"] for depth in DEPTHS] == [None, None, None]
    assert found.columns[0].chance == pytest.approx(np.mean([1 / 3, 1 / 3, 2 / 3]))


def test_the_chance_of_retrieval_is_what_random_features_reach() -> None:
    scenes = make_scenes(60, 4)
    features = np.random.default_rng(0).standard_normal((120, 64)).astype(np.float32)
    table = retrieval_table(seen(scenes, {"noise": features}))
    for column in table.columns:
        found = table.rows["noise"][column.key]
        assert found is not None
        assert found.mean == pytest.approx(column.chance, abs=0.13)


def test_a_word_is_exact_only_if_its_first_named_tokens_are_all_its_own() -> None:
    assert is_exact((4, 2, 9), (2, 4))
    assert not is_exact((4, 9, 2), (2, 4))
    assert not is_exact((), (2,))
    scenes = make_scenes(2, 1)
    both = judged([[(1, 2), (3, 1)]], Truth(scenes, ((1,), (1,))), is_exact)
    assert both is not None
    assert both.mean == 0.5
    assert prior_share((1, 2), Truth(scenes, ((1,), (2,))), is_exact) == 0.5
    assert prior_share((1, 2), Truth(scenes, ((), ())), is_exact) is None


def read_words(texts: Sequence[str], tokens: Sequence[Tokens], head: list[Tokens] | None) -> EncodedScenes:
    """One word a scene, each with a feature of its own, and what a text head names for it."""
    scenes = [
        Scene(f"s{n}", Path("none.jpg"), 9, 9, (), (TrueRegion(own, (0, 0, 9, 9)),))
        for n, own in enumerate(texts)
    ]
    features = SceneFeatures(np.zeros((0, 9), np.float32), np.eye(len(texts), 9, dtype=np.float32), head)
    return EncodedScenes(Truth(scenes, tuple(tokens)), {"e": features})


def test_reading_is_parted_by_letters_and_by_how_many_regions_hold_a_token() -> None:
    texts, tokens = ("cat", "door", "window", "elevator"), [(1, 2), (1, 3), (4,), ()]
    asked = read_words(texts, tokens, [(1, 2), (2, 1), (9,), (1,)])
    vocabulary = Vocabulary(None, 10, {1: 12, 2: 9, 3: 1}, counted=50, unreadable=0)  # type: ignore[arg-type]
    whole, letters, held = reading_tables(read_words(texts, tokens, None), asked, vocabulary, 1)
    assert "50 training samples" in held.told

    def shown(table: Table, namer: str) -> dict[str, float | None]:
        own = [column for column in table.columns if column.group.endswith(namer)]
        return {column.title: cell(table, "e", column.key) for column in own}

    assert shown(whole, "text head") == {"tokens": 0.5, "exact words": pytest.approx(1 / 3)}
    # The word without a token asks for nothing, so no column has its length.
    assert shown(letters, "text head") == {
        "1 to 3": 1.0,
        "4 to 5": 0.5,
        "6 to 7": 0.0,
    }
    frequent = {"0": 0.0, "1 to 9": 0.5, "10 to 99": 1.0}
    assert shown(held, "text head") == frequent
    # A word's like among known words has its tokens.
    assert set(shown(held, "5-NN").values()) == {1.0}
    # The prior names 1, 2 and 3 for every word.
    assert [column.chance for column in held.columns[:3]] == [0.0, 1.0, 1.0]


def test_words_are_not_read_without_a_vocabulary_or_without_tokens() -> None:
    words = read_words(("cat",), [()], None)
    vocabulary = Vocabulary(None, 10, {}, counted=0, unreadable=0)  # type: ignore[arg-type]
    assert reading_tables(words, words, vocabulary, 1) == ()
    assert reading_tables(words, read_words(("cat",), [(1,)], None), None, 1) == ()


# ---- places ----------------------------------------------------------------------------------------


def test_truth_knows_objects_background_and_words_apart() -> None:
    scene = make_scenes(1, 5)[0]
    truth = truth_of(scene)
    assert truth.shape == (TRUTH, TRUTH)
    assert (truth[20, 20], truth[20, 70], truth[95, 0], truth[70, 30]) == (1, 2, 0, IGNORED)
    other = dataclasses.replace(scene, objects=(dataclasses.replace(scene.objects[0], mask=None),))
    assert truth_map(other) is None


def test_a_mask_pools_the_cells_that_it_covers_by_their_share() -> None:
    own = np.arange(4, dtype=np.float32).reshape(2, 2, 1)
    mask = np.zeros((TRUTH, TRUTH), bool)
    mask[: TRUTH // 2, : 3 * TRUTH // 4] = True
    assert pooled(own, mask) == pytest.approx((0 * 1 + 1 * 0.5) / 1.5)
    assert pooled(own, np.zeros_like(mask)) == 0


def test_a_map_that_shows_the_classes_is_segmented_and_a_blind_one_is_not(
    known: MappedScenes, asked: MappedScenes
) -> None:
    table = segmentation_table(known, asked, seeds=2)
    assert cell(table, "clear", "miou") > 0.75
    assert cell(table, "clear", "object_miou") > 0.7
    assert cell(table, "blind", "miou") < 0.3
    chance = table.columns[0].chance
    assert chance is not None
    assert 0.1 < chance < 0.25


def test_places_under_words_are_not_counted() -> None:
    true = np.array([[0, -1], [1, 1]], np.int16)
    assert overlaps(np.array([[0, 1], [1, 0]]), true, 2).tolist() == [1, 1, 1, 2, 2, 1]


def test_colours_that_show_objects_separate_them_and_the_blind_do_not(
    known: MappedScenes, asked: MappedScenes
) -> None:
    table = separation_table(known, asked)
    assert cell(table, "clear", "three_colours") > 0.95
    assert cell(table, "clear", "all_channels") > 0.95
    for column in ("one_colour", "three_colours", "all_channels"):
        assert 0.3 < cell(table, "blind", column) < 0.7


def test_the_best_colour_is_found_whatever_its_sign() -> None:
    rng = np.random.default_rng(0)
    inside = rng.random(200) < 0.5
    colours = rng.standard_normal((200, 3)).astype(np.float32)
    colours[:, 1] -= 3 * inside
    assert best_colour(colours, inside) == (1, -1.0)


def test_one_basis_gives_the_same_feature_the_same_colour_in_every_picture() -> None:
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((6, 5, 12)).astype(np.float32) * np.arange(12, 0, -1) for _ in range(3)]
    maps[1][2, 2] = maps[0][1, 1]
    basis = fit_basis(maps)
    first, second = (basis.colours(basis.project(own)) for own in maps[:2])
    assert first.shape == (6, 5, 3)
    assert (second[2, 2] == first[1, 1]).all()
    again = fit_basis(maps)
    assert np.allclose(basis.directions, again.directions)
    assert 0 < basis.explained <= 1


def test_pairs_share_a_class_that_each_scene_holds_once(asked: MappedScenes) -> None:
    pairs = draw_pairs(asked.scenes, seed=0)
    assert pairs
    for (a, i), (b, j) in pairs:
        names = [[item.name for item in asked.scenes[place].objects] for place in (a, b)]
        assert a != b
        assert names[0][i] == names[1][j]
        assert names[0].count(names[0][i]) == names[1].count(names[1][j]) == 1
    assert draw_pairs(asked.scenes, seed=0) == pairs != draw_pairs(asked.scenes, seed=1)


def test_correspondence_finds_the_like_by_box_and_by_peak(asked: MappedScenes) -> None:
    def regions(scene: Scene, knows: bool) -> NDArray[np.float32]:
        rng = np.random.default_rng(len(scene.key) + 7)
        named = [CLASSES.index(item.name) for item in scene.objects]
        clear = np.concatenate([np.eye(4)[named], np.eye(4)[[3] * len(scene.words)]])
        return (clear if knows else rng.standard_normal(clear.shape)).astype(np.float32)

    features = {
        name: [regions(scene, name == "clear") for scene in asked.scenes] for name in ("clear", "blind")
    }
    asked = dataclasses.replace(asked, regions=features)
    table = correspondence_table(asked, seeds=2)
    assert table is not None
    assert cell(table, "clear", "box") == cell(table, "clear", "peak") == 1.0
    assert cell(table, "blind", "box") < 0.7
    assert table.columns[0].chance == pytest.approx(1 / 3)
    mask_share = 40 * 36 / 96**2
    assert table.columns[1].chance == pytest.approx(mask_share, abs=0.01)
    pair = draw_pairs(asked.scenes, 0)[0]
    assert right_box(features["clear"], asked, pair)
    assert peak_inside(asked.maps["clear"], asked, pair)


def test_the_pixels_map_holds_the_pixels_of_each_place() -> None:
    image = np.zeros((48, 48, 3), np.uint8)
    image[:24, 24:] = 255
    own = pixel_map(image, 6)
    assert own.shape == (6, 6, 192)
    assert own[0, 5].min() == 1.0
    assert own[5, 5].max() == 0.0


# ---- image folders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images of each of three colours."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 30, 30)), ("green", (30, 160, 30)), ("blue", (30, 30, 200))):
        (root / name).mkdir()
        for number in range(10):
            pixels = np.clip(np.asarray(colour) + rng.integers(-25, 25, (20, 24, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def test_images_in_class_folders_are_named_by_encoders_that_see_their_colour(photos: Path) -> None:
    encoders = [
        CropEncoder("mean", lambda crops: np.stack([c.mean((0, 1)) for c in crops]).astype(np.float32)),
        CropEncoder("blind", lambda crops: centred_pixels(crops)[:, ::97]),
    ]
    table = image_table(read_image_folder(photos), encoders, seeds=3, batches=Batches(7, workers=2))
    assert cell(table, "mean", "knn") == cell(table, "mean", "linear") == 1.0
    assert table.columns[0].chance == pytest.approx(1 / 3)
    assert "6 of 30 images" in table.told
    assert "left out" not in table.told


def test_files_of_other_endings_are_counted_and_crops_of_a_model_asked_already_are_not(
    photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for name in ("red/notes.txt", "blue/scan.psd", "blue/more/raw.CR2"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"?")
    encoders = [
        CropEncoder("model/crops", centred_pixels),
        CropEncoder("another name", centred_pixels, names_images=False),
    ]
    folder = read_image_folder(tmp_path / "photos")
    assert folder.others == 3
    table = image_table(folder, encoders, 1, Batches(8))
    assert "6 of 30 images" in table.told
    assert "3 files that are no .jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff, .avif are left out" in table.told
    assert list(table.rows) == ["model/crops"]
    for name in ("red", "green"):
        shutil.rmtree(tmp_path / "photos" / name)
    with pytest.raises(UserError, match=r"holds 1 classes.*2 files that are no .jpg"):
        read_image_folder(tmp_path / "photos")


def test_a_split_of_the_folder_itself_is_kept(photos: Path, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val")):
        for name in ("red", "blue"):
            (tmp_path / split / name).mkdir(parents=True)
            for path in sorted((photos / name).iterdir())[5 * number : 5 * number + 5]:
                (tmp_path / split / name / path.name).write_bytes(path.read_bytes())
    folder = read_image_folder(tmp_path)
    assert folder.asked is not None
    assert {path.parts[-3] for path, asked in zip(folder.paths, folder.asked, strict=True) if asked} == {
        "val"
    }
    mean = CropEncoder("mean", lambda crops: np.stack([c.mean((0, 1)) for c in crops]).astype(np.float32))
    assert cell(image_table(folder, [mean], 2, Batches(8)), "mean", "linear") == 1.0
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "odd")
    with pytest.raises(UserError, match=r"has the class odd, which .* lacks"):
        read_image_folder(tmp_path)


def test_a_folder_without_classes_or_with_a_broken_image_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist"):
        read_image_folder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds 0 classes"):
        read_image_folder(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(b"no image")
    mean = CropEncoder("mean", lambda crops: np.stack([c.mean((0, 1)) for c in crops]).astype(np.float32))
    with pytest.raises(UserError, match=r"cannot be read"):
        image_table(read_image_folder(tmp_path), [mean], 1, Batches(4))


# ---- publishing ------------------------------------------------------------------------------------


def test_tables_are_published_as_json_markdown_text_and_tensorboard(
    asked: MappedScenes, tmp_path: Path
) -> None:
    features = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    table = retrieval_table(seen(asked.scenes, {"trained": features, "model/crops": features}))
    page = markdown([table])
    assert "| encoder | same class @1 |" in page
    assert page.count("\n| ") == 1 + 1 + 2 + 1
    assert len({len(line) for line in text([table]).splitlines()}) <= 2
    with closing(Trackers(RunConfig(), tmp_path)) as trackers:
        trackers.show(Shown(40, {}, [table]))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard" / "evaluation" / "model-crops")).Reload()
    event = board.Scalars("evaluation/retrieval/class_at_5")[0]
    assert event.step == 40
    assert event.value == pytest.approx(scalars([table], "trained")["retrieval/class_at_5"])


def test_a_mask_in_the_truth_must_have_the_scenes_size(tmp_path: Path) -> None:
    item = {"class": "cat", "box": [1, 1, 5, 5], "mask": {"size": [9, 8], "counts": [72]}}
    line = {"key": "a", "width": 9, "height": 9, "words": [], "objects": [item]}
    (tmp_path / "truth.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"mask of 8 x 9 pixels in a scene of 9 x 9"):
        read_scenes(tmp_path)


def test_evaluation_decodes_an_image_as_training_does(tmp_path: Path) -> None:
    """Ink without Adobe's mark, which Pillow alone turns upside down."""
    ink = Image.new("CMYK", (16, 8), (0, 255, 255, 0))
    ink.save(tmp_path / "adobe.jpg", quality=95)
    content = (tmp_path / "adobe.jpg").read_bytes()
    mark = content.index(b"\xff\xee")
    (tmp_path / "plain.jpg").write_bytes(content[:mark] + content[mark + 16 :])
    found = read_image(tmp_path / "plain.jpg", "")
    assert np.array_equal(found, decode_image((tmp_path / "plain.jpg").read_bytes()))
    with Image.open(tmp_path / "plain.jpg") as file:
        assert not np.array_equal(found, file.convert("RGB"))
