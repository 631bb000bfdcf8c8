from __future__ import annotations

import dataclasses
import re
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy_scenes import MODEL, RUN, write_run, write_scenes, write_shards

from megaregion.data.info import load_tokenizer, read_info, token_set
from megaregion.data.shards import ShardedDataset
from megaregion.data.transforms import EvalTransform
from megaregion.errors import UserError
from megaregion.evaluation.classifiers import Neighbours, ballots, largest, nearest, vote
from megaregion.evaluation.encoders import BoxedImage, CropEncoder, Features, centred_pixels, crop, raw_pixels
from megaregion.evaluation.encoding import Batches, encode_scenes
from megaregion.evaluation.measures import share
from megaregion.evaluation.measures.reading import judged, word_recall
from megaregion.evaluation.network import open_run
from megaregion.evaluation.pictures import visualise
from megaregion.evaluation.report import write_report
from megaregion.evaluation.scenes import (
    Scene,
    TrueRegion,
    Truth,
    check_labels,
    most_frequent,
    open_image,
    open_vocabulary,
    pick_scenes,
    read_scenes,
)
from megaregion.evaluation.study import Study, StudyConfig, evaluate
from megaregion.models import RegionEncoder, initialise
from megaregion.schemas.evaluation import read_evaluation, scalars, text, write_evaluation

TOOL = Path(__file__).parents[1] / "tools" / "evaluate.py"
READING = ("ocr", "ocr_length", "ocr_frequency")
ALL = ("region", "retrieval", *READING, "correspondence", "segmentation", "separation")


@dataclasses.dataclass(frozen=True)
class Workplace:
    scenes: Path
    dataset: Path
    run: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("evaluation")
    scenes = write_scenes(root / "scenes")
    dataset = write_shards(root / "shards", scenes)
    write_run(root / "runs" / "toy", dataset, read_info(dataset).text_classes)
    return Workplace(scenes, dataset, root / "runs" / "toy")


@pytest.fixture(scope="module")
def study(place: Workplace) -> Study:
    config = StudyConfig(place.scenes, place.dataset, batch=5, seeds=2)
    return evaluate(open_run(place.run), config, [CropEncoder("curation", centred_pixels)])


def rows(*values: tuple[float, ...]) -> NDArray[np.float32]:
    return np.asarray(values, np.float32)


# ---- k-NN ------------------------------------------------------------------------------------------


def test_a_query_takes_the_class_of_most_of_its_neighbours() -> None:
    gallery = rows((1, 0), (0.9, 0.1), (0.8, 0.2), (0, 1), (0.1, 0.9))
    names = ["cat", "dog", "dog", "cat", "cat"]
    found = nearest(rows((1, 0.05)), gallery, neighbours=3)
    assert found.index.tolist() == [[0, 1, 2]]
    assert vote(found, names) == ["dog"]


def test_of_classes_with_equally_many_votes_the_more_similar_wins() -> None:
    gallery = rows((1, 0), (0.9, 0.3), (0.7, 0.7), (0.6, 0.8), (-1, 0))
    names = ["far", "near", "near", "far", "other"]
    found = nearest(rows((0.85, 0.55)), gallery, neighbours=4)
    assert sorted(found.index[0].tolist()) == [0, 1, 2, 3]
    assert vote(found, names) == ["near"]


def test_similarity_is_the_cosine_whatever_the_length_of_the_features() -> None:
    found = nearest(rows((5, 0)), rows((100, 100), (0.01, 0.0)), neighbours=2)
    assert found.index.tolist() == [[1, 0]]
    assert found.similarity[0] == pytest.approx([1, 0.5**0.5], abs=1e-6)


def test_a_training_region_never_meets_its_own_scene_but_does_meet_its_cut_out_elsewhere() -> None:
    features = rows((1, 0), (1, 0.01), (1, 0.02), (0, 1))
    scene = np.array([0, 0, 1, 1])
    found = nearest(features, features, scene, scene, neighbours=1)
    assert found.index[:, 0].tolist() == [2, 2, 1, 1]


def test_a_gallery_smaller_than_k_gives_all_it_has() -> None:
    found = nearest(rows((1, 0)), rows((1, 0), (0, 1)))
    assert found.index.tolist() == [[0, 1, -1, -1, -1]]
    assert vote(found, ["a", "b"]) == ["a"]
    assert vote(nearest(rows((1, 0)), np.zeros((0, 2), np.float32)), []) == [""]


def test_the_largest_scores_are_those_of_a_full_sort_also_over_blocks_of_queries() -> None:
    scores = np.random.default_rng(0).normal(size=(2500, 40)).astype(np.float32)
    full = np.argsort(-scores, axis=1, kind="stable")
    assert np.array_equal(largest(scores, 5), full[:, :5])
    gallery = np.random.default_rng(1).normal(size=(60, 8)).astype(np.float32)
    queries = np.random.default_rng(2).normal(size=(2500, 8)).astype(np.float32)
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        gallery / np.linalg.norm(gallery, axis=1)[:, None]
    ).T
    assert np.array_equal(nearest(queries, gallery).index, np.argsort(-cosine, axis=1)[:, :5])


def test_an_interval_is_wide_when_few_cut_outs_stand_in_many_scenes() -> None:
    right = np.array([True, False] * 100)
    alone, two_cut_outs = share(right, range(200)), share(right, ["a", "b"] * 100)
    assert alone is not None
    assert alone.low == pytest.approx(0.43, abs=0.03)
    assert alone.high == pytest.approx(0.57, abs=0.03)
    assert two_cut_outs is not None
    assert (two_cut_outs.low, two_cut_outs.high) == (0.0, 1.0)
    certain = share(np.ones(200, bool), ["a", "b"] * 100)
    assert certain is not None
    assert (certain.low, certain.high) == (1.0, 1.0)


# ---- OCR -------------------------------------------------------------------------------------------


def test_recall_is_the_mean_share_of_gold_tokens_and_skips_words_without_any() -> None:
    words = tuple(TrueRegion(text, (0, 0, 5, 5)) for text in ("one", "two", "bare"))
    scenes = [Scene("s", Path("none.jpg"), 9, 9, (), words)]
    named = [(1, 2, 3, 4, 5, 7), (1, 2, 3, 4, 5), (9,)]
    found = judged([named], Truth(scenes, ((1, 7), (2, 3, 4), ())), word_recall)
    assert found is not None
    assert found.mean == pytest.approx(0.75)
    assert judged([named], Truth(scenes, ((), (), ())), word_recall) is None


def test_the_prior_is_the_tokens_that_most_training_regions_hold() -> None:
    regions = [(4, 9), (9, 2), (9, 4), (1, 2), (8,), (7,), (6,)]
    assert most_frequent(Counter(token for tokens in regions for token in tokens)) == (9, 2, 4, 1, 6)


def test_the_head_names_the_nearest_centers_whatever_their_length(place: Workplace) -> None:
    class Reader(CropEncoder):
        text_centers = np.eye(7, dtype=np.float32) * np.arange(1, 8, dtype=np.float32)[:, None]

        def encode(self, images: Sequence[BoxedImage]) -> Features:
            embedding = rows((0.1, 0.9, 0.2, 0.8, 0.3, 0.7, -0.1)).repeat(
                sum(len(i.boxes) for i in images), 0
            )
            return Features(embedding, embedding)

    scenes = read_scenes(place.scenes / "test")
    found = encode_scenes(Truth(scenes), [Reader("reader", raw_pixels)], Batches(8)).features["reader"]
    assert found.read == [(1, 3, 5, 4, 2, 0, 6)] * 4


def test_neighbours_name_their_most_common_tokens_and_the_nearer_ones_break_ties() -> None:
    neighbours = Neighbours(np.array([[0, 1, 2, -1, -1]]), rows((0.9, 0.8, 0.7, -np.inf, -np.inf)))
    assert ballots(neighbours, [(1, 2), (3, 4), (5, 4, 6)]) == [(4, 1, 2, 3, 5, 6)]


def test_gold_tokens_are_distinct_and_hold_no_bare_word_start(place: Workplace) -> None:
    processor = load_tokenizer(place.dataset / "tokenizer.model")
    tokens = token_set(processor, "EXIT STOP EXIT")
    pieces = [processor.id_to_piece(token) for token in tokens]
    assert len(set(tokens)) == len(tokens) > 0
    assert "▁" not in pieces
    assert token_set(processor, "") == ()
    assert not any(processor.is_unknown(token) for token in token_set(processor, "EXIT ☃"))


def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"is no sentencepiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=r"does not exist"):
        load_tokenizer(tmp_path / "absent.model")


def test_the_prior_is_counted_in_the_training_shards(place: Workplace) -> None:
    vocabulary = open_vocabulary(ShardedDataset(place.dataset))
    assert vocabulary is not None
    words = Truth(read_scenes(place.scenes / "train")).words.names
    assert vocabulary.prior == most_frequent(Counter(t for word in words for t in vocabulary.tokens(word)))
    assert vocabulary.unreadable == 0


def test_other_labels_than_the_runs_own_are_refused(place: Workplace) -> None:
    for key, name in (("tokenizer_sha256", "tokenizer is"), ("centers_sha256", "centers are")):
        with pytest.raises(UserError, match=f"the {name} not what the run was trained with in here; name"):
            check_labels(read_info(place.dataset), {key: "0" * 64}, "here")


# ---- scenes ----------------------------------------------------------------------------------------


def test_tables_hold_objects_and_words_scene_by_scene(place: Workplace) -> None:
    scenes = read_scenes(place.scenes / "train")
    objects, words = Truth(scenes).objects, Truth(scenes).words
    assert (len(objects), len(words)) == (24, 12)
    assert objects.scene.tolist() == [i // 2 for i in range(24)]
    assert scenes[3].boxes.tolist() == [*objects.boxes[6:8].tolist(), words.boxes[3].tolist()]


def test_a_larger_gallery_only_adds_scenes_to_a_smaller_one(place: Workplace) -> None:
    scenes = read_scenes(place.scenes / "train")
    small, large = (pick_scenes(scenes, regions, seed=4) for regions in (7, 15))
    assert sum(len(scene.objects) for scene in small) == 8
    assert {scene.key for scene in small} < {scene.key for scene in large}
    assert pick_scenes(scenes, 0, seed=4) == scenes
    assert [scene.key for scene in small] != [scene.key for scene in pick_scenes(scenes, 7, seed=5)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1 is not a scene"),
        ('{"key": "a", "width": 9, "height": 9, "words": []}', "objects"),
        (
            '{"key":"a","width":9,"height":9,"words":[],"objects":[{"class":"c","box":[1,1,99,5]}]}',
            "leaves its image of 9 x 9",
        ),
        (
            '{"key":"a","width":9,"height":9,"words":[],"objects":[{"class":"c","box":[5,1,5,5]}]}',
            "has no area",
        ),
    ],
)
def test_a_line_of_truth_that_is_no_scene_is_named(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "truth.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=re.escape(reason)):
        read_scenes(tmp_path)


def test_an_image_that_is_missing_damaged_or_of_another_size_is_named(
    place: Workplace, tmp_path: Path
) -> None:
    scene = read_scenes(place.scenes / "test")[0]
    with pytest.raises(UserError, match=r"cannot be read"):
        open_image(dataclasses.replace(scene, path=tmp_path / "absent.jpg"))
    half = tmp_path / "half.jpg"
    half.write_bytes(scene.path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"half.jpg cannot be read"):
        open_image(dataclasses.replace(scene, path=half))
    with pytest.raises(UserError, match=r"its truth says 97 x 96"):
        open_image(dataclasses.replace(scene, width=97))


def test_a_missing_split_is_answered_with_the_splits_that_exist(place: Workplace, tmp_path: Path) -> None:
    shutil.copytree(place.scenes / "train", tmp_path / "train")
    with pytest.raises(UserError, match=r"has only train"):
        evaluate(open_run(place.run), StudyConfig(tmp_path, place.dataset))


# ---- encoders --------------------------------------------------------------------------------------


def test_a_crop_is_clipped_to_its_image_and_never_empty(place: Workplace) -> None:
    image = open_image(read_scenes(place.scenes / "test")[0])
    assert crop(image, (10.2, 4.6, 20.4, 9.0)).size == (10, 4)
    assert crop(image, (-3, -3, 5, 500)).size == (5, 96)
    assert crop(image, (95.6, 95.6, 95.9, 95.9)).size == (1, 1)


def test_centred_pixels_ignore_brightness_and_raw_pixels_do_not() -> None:
    dark = np.random.default_rng(0).integers(0, 100, (40, 30, 3), dtype=np.uint8)
    crops = [dark, dark + np.uint8(100)]
    assert np.allclose(*centred_pixels(crops), atol=1e-6)
    assert not np.allclose(*raw_pixels(crops), atol=0.1)
    assert raw_pixels(crops).shape == (2, 32 * 32 * 3)


def test_threads_change_neither_the_crops_order_nor_their_features(place: Workplace) -> None:
    items = [BoxedImage(open_image(s), s.boxes) for s in read_scenes(place.scenes / "test")]
    one, many = (CropEncoder("p", raw_pixels, threads).encode(items).region for threads in (1, 5))
    assert one.shape[0] == 12
    assert np.array_equal(one, many)


def test_the_trained_encoder_is_the_checkpoints_network(place: Workplace) -> None:
    run = open_run(place.run)
    scene = read_scenes(place.scenes / "test")[0]
    image = open_image(scene)
    model = RegionEncoder(MODEL, RUN.head.embedding_dim)
    model.load_state_dict(
        {
            name.removeprefix("body.weight."): run.reader.read(name)
            for name in run.reader.names()
            if name.startswith("body.weight.")
        }
    )
    pixels, visible = EvalTransform(run.config.data, MODEL)(image, scene.boxes.tolist())
    with torch.inference_mode():
        expected = model.vit.pool(model.vit(pixels[None], visible[None]).regions)[0]
        projected = model.projection(expected)
    features = run.trained().encode([BoxedImage(image, scene.boxes)])
    assert np.allclose(features.region, expected.numpy(), atol=1e-5)
    assert np.allclose(features.embedding, projected.numpy(), atol=1e-5)
    by_embedding = run.trained(projected=True).encode([BoxedImage(image, scene.boxes)])
    assert np.array_equal(by_embedding.region, by_embedding.embedding)


def test_padding_to_the_largest_image_of_a_batch_changes_no_feature(place: Workplace) -> None:
    encoder = open_run(place.run).trained()
    scenes = read_scenes(place.scenes / "test")
    items = [BoxedImage(open_image(s), s.boxes[: 1 + i % 3]) for i, s in enumerate(scenes)]
    together = encoder.encode(items).region
    alone = np.concatenate([encoder.encode([item]).region for item in items])
    assert together.shape == (1 + 2 + 3 + 1, MODEL.width)
    assert np.allclose(together, alone, atol=1e-5)


def test_the_untrained_encoder_is_the_network_before_the_first_step(place: Workplace) -> None:
    scene = read_scenes(place.scenes / "test")[0]
    run = open_run(place.run)
    model = RegionEncoder(MODEL, RUN.head.embedding_dim)
    initialise(model, RUN.seed)
    image = open_image(scene)
    pixels, visible = EvalTransform(run.config.data, MODEL)(image, scene.boxes.tolist())
    with torch.inference_mode():
        expected = model(pixels[None], visible[None])[0].numpy()
    found = run.untrained().encode([BoxedImage(image, scene.boxes)])
    assert np.allclose(found.embedding, expected, atol=1e-5)
    trained = run.trained().encode([BoxedImage(image, scene.boxes)])
    assert not np.allclose(found.region, trained.region, atol=0.1)


def test_features_come_back_in_the_order_of_the_tables_for_any_batch(place: Workplace) -> None:
    scenes = read_scenes(place.scenes / "train")
    encoder = CropEncoder("sizes", lambda crops: rows(*[c.shape[:2] for c in crops]))
    objects = Truth(scenes).objects.boxes
    for batch in (1, 5, 64):
        found = encode_scenes(Truth(scenes), [encoder], Batches(batch, workers=2)).features["sizes"]
        assert found.objects.tolist() == np.round(objects[:, [3, 2]] - objects[:, [1, 0]]).tolist()
        assert found.words.shape == (12, 2)
        assert found.read is None


def test_a_checkpoint_that_does_not_fit_its_settings_is_refused(place: Workplace) -> None:
    run = open_run(place.run)
    wider = dataclasses.replace(run.config, model=dataclasses.replace(MODEL, mlp_width=48))
    with pytest.raises(UserError, match=r"has the shape .* ask for"):
        dataclasses.replace(run, config=wider).trained()
    deeper = dataclasses.replace(run.config, model=dataclasses.replace(MODEL, depth=3))
    with pytest.raises(UserError, match=r"holds no tensor .*give another step folder"):
        dataclasses.replace(run, config=deeper).trained()


def test_a_changed_byte_in_the_checkpoint_is_noticed(place: Workplace, tmp_path: Path) -> None:
    shutil.copytree(place.run, tmp_path / "run")
    file = next((tmp_path / "run").rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"does not match its checksum"):
        open_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"no finished checkpoint"):
        open_run(place.run, step=7)


# ---- the study -------------------------------------------------------------------------------------


def mean(study: Study, encoder: str, column: str) -> float | None:
    found = study.summary.rows[encoder][column]
    return None if found is None else found.mean


def test_a_study_has_all_four_encoders_and_shares_between_0_and_1(study: Study, tmp_path: Path) -> None:
    found = study.evaluation()
    assert [table.key for table in found.tables] == ["summary", *ALL]
    assert (found.test_regions, found.test_words) == (8, 4)
    assert found.seconds.keys() >= {"read", "trained", "untrained", "curation"}
    assert list(study.summary.rows) == ["trained", "untrained", "pixels", "curation"]
    for table in found.tables:
        assert list(table.rows)[:3] == ["trained", "untrained", "pixels"]
        for cell in (cell for cells in table.rows.values() for cell in cells.values() if cell is not None):
            assert 0 <= cell.low <= cell.mean <= cell.high <= 1
        assert all(column.chance is None or 0 <= column.chance <= 1 for column in table.columns)
    for encoder in study.summary.rows:
        has_head = encoder in ("trained", "untrained")
        assert (mean(study, encoder, "ocr_recall_at_5") is not None) == has_head
        assert (mean(study, encoder, "ocr_train_recall_at_5") is not None) == has_head
        assert mean(study, encoder, "ocr_knn_recall_at_5") is not None
    write_evaluation(tmp_path / "evaluation.json", found)
    again = read_evaluation(tmp_path / "evaluation.json")
    for name in ("trained", "curation"):
        assert scalars(again.tables, name) == pytest.approx(scalars(found.tables, name), abs=1e-5)
    write_evaluation(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "evaluation.json").read_bytes()


def test_the_pixel_row_is_the_better_of_its_two_forms(place: Workplace, study: Study) -> None:
    scenes = read_scenes(place.scenes / "train"), read_scenes(place.scenes / "test")
    accuracies = {}
    for name, embed in (("raw", raw_pixels), ("centred", centred_pixels)):
        known, asked = (
            encode_scenes(Truth(s), [CropEncoder("p", embed)], Batches(8)).features["p"].objects
            for s in scenes
        )
        gallery, queries = (Truth(own).objects for own in scenes)
        named = vote(nearest(asked, known), gallery.names)
        accuracies[name] = np.mean(np.asarray(named) == queries.names)
    form = study.summary.notes["pixels"].removeprefix("crops at 32 x 32, ")
    assert mean(study, "pixels", "region_knn") == max(accuracies.values()) == accuracies[form]


def test_features_that_tell_the_class_give_perfect_accuracy_and_constant_ones_the_majority(
    place: Workplace,
) -> None:
    def colour(crops: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        return rows(*[np.eye(3)[c[c.shape[0] // 2, c.shape[1] // 2].argmax()] for c in crops])

    others = [
        CropEncoder("oracle", colour),
        CropEncoder("blind", lambda crops: np.ones((len(crops), 2), np.float32)),
    ]
    study = evaluate(open_run(place.run), StudyConfig(place.scenes, place.dataset, measures=()), others)
    assert mean(study, "oracle", "region_knn") == mean(study, "oracle", "region_knn_train") == 1.0
    assert mean(study, "blind", "region_knn") < 1.0
    assert study.summary.columns[0].chance < 1.0


def test_a_diverged_network_is_refused_and_not_measured(place: Workplace) -> None:
    nan = CropEncoder("lost", lambda crops: np.full((len(crops), 2), np.nan, np.float32))
    with pytest.raises(UserError, match=r"encoder lost gives features that are not finite"):
        evaluate(open_run(place.run), StudyConfig(place.scenes, place.dataset), [nan])


def test_the_table_is_aligned_and_says_what_it_compares(study: Study) -> None:
    lines = text([study.summary], intervals=False).splitlines()
    assert {len(line) for line in lines[:-1]} == {len(lines[0])}
    assert [line.split()[0] for line in lines[2:6]] == ["trained", "untrained", "pixels", "curation"]
    assert lines[0].split("  ")[-1] == "OCR recall@5, 5-NN"
    assert "8 objects and 4 words of 4 test scenes" in study.summary.told


def test_a_run_without_text_is_measured_on_objects_alone(place: Workplace, tmp_path: Path) -> None:
    dataset = write_shards(tmp_path / "shards", place.scenes, text=False)
    write_run(tmp_path / "run", dataset, text_classes=0)
    study = evaluate(
        open_run(tmp_path / "run"), StudyConfig(place.scenes, dataset, measures=("retrieval", "ocr"))
    )
    assert [table.key for table in study.tables] == ["retrieval"]
    assert study.missing == ["ocr"]
    for encoder, cells in study.summary.rows.items():
        assert mean(study, encoder, "region_knn") > 0
        assert {cell for key, cell in cells.items() if key.startswith("ocr")} == {None}
    write_report(study, visualise(study), tmp_path / "run", tmp_path / "report.html")
    assert "This run has no text to read." in (tmp_path / "report.html").read_text()


# ---- the tool -----------------------------------------------------------------------------------------


def run_tool(*arguments: object) -> int:
    """Run the command line in this process."""
    saved, sys.argv = sys.argv, [str(TOOL), *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = saved
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def evaluated(place: Workplace) -> Path:
    options = ("--limit", 16, "--batch", 4, "--measures", "all", "--seeds", 2)
    assert run_tool(place.run, "--scenes", place.scenes, *options) == 0
    return place.run


def test_the_tool_writes_numbers_with_all_four_encoders_and_a_page(evaluated: Path) -> None:
    found = read_evaluation(evaluated / "evaluation.json")
    assert list(found.table("summary").rows) == ["trained", "untrained", "pixels", "curation"]
    assert found.gallery_regions == 16
    assert found.seconds["total"] > 0
    assert [table.key for table in found.tables] == ["summary", *ALL]
    assert "## Naming regions" in (evaluated / "evaluation.md").read_text()
    assert any((evaluated / "tensorboard" / "evaluation" / "trained").iterdir())
    assert len(list((evaluated / "pictures").glob("*.map.jpg"))) == 4
    assert (evaluated / "report.html").stat().st_size > 10_000


def test_the_validation_split_leaves_the_test_numbers_alone(evaluated: Path, place: Workplace) -> None:
    before = (evaluated / "evaluation.json").read_bytes()
    options = ("--split", "val", "--curation", "none", "--measures", "none")
    assert run_tool(place.run, "--scenes", place.scenes, *options) == 0
    assert (evaluated / "evaluation.json").read_bytes() == before
    found = read_evaluation(evaluated / "evaluation_val.json")
    assert found.split == "val"
    assert len(found.table("summary").rows) == 3


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(tmp_path / "nowhere", "--scenes", place.scenes) == 2
    assert run_tool(place.run, "--scenes", tmp_path, "--curation", "none") == 2
    assert run_tool(place.run, "--scenes", place.scenes, "--device", "abacus", "--curation", "none") == 2
    assert run_tool(place.run, "--scenes", place.scenes, "--dataset", tmp_path, "--curation", "none") == 2
    assert run_tool(place.run, "--scenes", place.scenes, "--dataset", "s3://far", "--curation", "none") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 5
    assert all(line.startswith("megaregion: ") for line in lines)
