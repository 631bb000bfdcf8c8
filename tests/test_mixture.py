"""Several datasets in one run: a stream in the ratio of their weights, and one space of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from head_reference import build_head, group_of_one, place_of
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import OBJECT_CLASSES, TEXT_CLASSES, settings_of, toy_config, toy_dataset

from megaregion.config import DataConfig, HeadConfig
from megaregion.data.info import DatasetInfo, join
from megaregion.data.loader import RegionLoader
from megaregion.data.order import MixedOrder, SampleOrder
from megaregion.data.sample import parse_sample
from megaregion.data.shards import Mixture, open_datasets, order_of
from megaregion.data.transforms import Transform
from megaregion.errors import UserError
from megaregion.evaluation import scenes
from megaregion.evaluation.clusters import confuse
from megaregion.evaluation.encoders import BoxedImage, Features
from megaregion.evaluation.scenes import open_vocabulary
from megaregion.heads.centers import given_centers
from megaregion.planning.layout import known_labels
from megaregion.training.state import LABELS

SIZES = ((7, 3), (5,), (4, 4, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dataset, another one, and one that was labelled with the centers of the first."""
    place = tmp_path_factory.mktemp("mixture")
    for name, seed in (("one", 0), ("two", 1), ("like-one", 0)):
        toy_dataset(place / name, samples=12 + 6 * seed, shards=3, seed=seed)
    return place


def order(weights: Sequence[str], seed: int = 0) -> MixedOrder:
    orders = [SampleOrder(sizes, seed, 2) for sizes, _ in zip(SIZES, weights, strict=False)]
    return MixedOrder(orders, [Fraction(weight) for weight in weights])


def mixed(folder: Path, line: str, cache: Path | str = "") -> tuple[Mixture, DataConfig]:
    path = line.replace("@", f"{folder}/")
    data = dataclasses.replace(toy_config(folder, folder).data, path=path, cache=str(cache))
    datasets = open_datasets(data)
    assert isinstance(datasets, Mixture)
    return datasets, data


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["1", "2", "0.3", "17", "1.25"]), min_size=2, max_size=3), st.integers(0, 10**15)
)
def test_every_stretch_of_the_stream_holds_the_datasets_in_their_ratio(
    weights: list[str], start: int
) -> None:
    stream, total = order(weights), sum(map(Fraction, weights))
    before = stream.reached(start)
    for position in range(start, start + 60):
        number = sum(stream.sample(position) >= first for first in stream._firsts[1:-1])
        own = stream.orders[number].sample(before[number])
        assert stream.sample(position) == stream._firsts[number] + own, "each goes on in its own order"
        before[number] += 1
        assert before == stream.reached(position + 1)
        for count, weight in zip(before, weights, strict=True):
            assert abs(count - (position + 1) * Fraction(weight) / total) < 2
    cycle = total * 100
    assert stream.reached(int(cycle)) == [int(100 * Fraction(weight)) for weight in weights]


def test_a_position_of_several_datasets_needs_no_history_and_knows_its_seed() -> None:
    walked = order(("2", "1", "1"), seed=5)
    stream = [walked.sample(position) for position in range(200)]
    for position in (199, 0, 57, 120):
        assert order(("2", "1", "1"), seed=5).sample(position) == stream[position]
    assert [order(("2", "1", "1"), seed=6).sample(position) for position in range(200)] != stream


def test_what_stands_in_for_a_sample_is_of_the_same_dataset() -> None:
    stream = order(("1", "1", "3"))
    for position in range(40):
        original = stream.sample(position)
        others = [stream.replacement(position, attempt) for attempt in range(1, 9)]
        of = [sum(index >= first for first in stream._firsts[1:-1]) for index in (original, *others)]
        assert len(set(of)) == 1
        assert original not in others


def test_labels_of_datasets_follow_one_another_and_equal_files_are_one_space(folder: Path) -> None:
    datasets, _ = mixed(folder, "@one=2,@two=1,@like-one=1")
    assert datasets.info.object_classes == 2 * OBJECT_CLASSES
    assert datasets.info.text_classes == TEXT_CLASSES
    assert [path.parent.name for _, path in datasets.centers] == ["one", "two"]
    assert [first for first, _ in datasets.centers] == [0, OBJECT_CLASSES]
    first = 0
    for part, shift in zip(datasets.parts, (0, OBJECT_CLASSES, 0), strict=True):
        for index in range(len(part)):
            raw = datasets.read(first + index)
            assert raw == part.read(index)
            own = parse_sample(raw.record)
            joined = datasets.labelled(first + index, raw.key, own)
            for region, changed in zip(own.regions, joined.regions, strict=True):
                assert changed.tokens == region.tokens
                assert changed.label == (None if region.label is None else region.label + shift)
        first += len(part)
    with pytest.raises(IndexError, match=f"sample {first} of datasets of {first}"):
        datasets.read(first)


def test_a_batch_of_two_remote_datasets_is_that_of_the_local_ones(folder: Path, tmp_path: Path) -> None:
    batches = []
    for line in ("@one=2,@two=1", "file://@one=2,file://@two=1"):
        datasets, data = mixed(folder, line, tmp_path)
        config = toy_config(folder, folder)
        loader = RegionLoader(datasets, order_of(datasets, data, 3), Transform(data, config.model, 3), data)
        batches.append(next(iter(loader.batches([range(30)]))))
    assert torch.equal(batches[0].pixels, batches[1].pixels)
    assert torch.equal(batches[0].labels, batches[1].labels)
    assert int(batches[0].labels[..., 0].max()) >= OBJECT_CLASSES
    need = sum(part.mirror.window_bytes for part in datasets.parts if part.mirror is not None)
    data = dataclasses.replace(data, cache_bytes=need - 1)
    with pytest.raises(UserError, match=r"data\.cache_bytes must hold the shards of all datasets"):
        open_datasets(data)


def test_a_head_begins_with_the_centers_of_every_dataset() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(shape).astype(np.float32) for shape in ((9, 12), (5, 7))]
    with group_of_one() as group:
        head = build_head(HeadConfig(), 14, 8, place_of(group))
        head.local, head.weight = range(4, 12), head.weight[4:12]
        head.start_from(*parts)
        expected = [given_centers(part, 1, "object", range(len(part)), 8) for part in parts]
        assert torch.equal(head.weight, torch.cat(expected)[4:12])
        with pytest.raises(UserError, match="14 classes but was given 9 centers"):
            head.start_from(parts[0])


def test_a_list_of_datasets_is_the_same_from_a_flag_and_from_yaml(tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text("data:\n  path: [{path: a/b, weight: 2}, {path: 'pipe:cat x,y/{}', weight: 0.5}, c]\n")
    line = "a/b=2,pipe:cat x,y/{}=0.5,c=1"
    for flags in ([f"--config={yaml}"], [f"--data.path={line}"]):
        data = settings_of(flags).data
        assert data.path == line
        assert data.datasets == (("a/b", 2), ("pipe:cat x,y/{}", Fraction(1, 2)), ("c", 1))
    for alone in ("data/shards", "day=2024", "pipe:cat {} | x=1,y=2 z", "a=1,b"):
        assert settings_of([f"--data.path={alone}"]).data.datasets == ((alone, 1),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a=0,b=1", "weights lie in"),
        ("a=1,a=2", "it names a twice"),
        ("[]", "data.path"),
        ("[{path: a, wait: 2}]", "each is a path, or {path: PATH, weight: NUMBER}"),
        ("[{path: a, weight: -2}, b]", "a weight is a number above 0"),
    ],
)
def test_a_list_of_datasets_that_makes_no_sense_is_refused(value: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"data: {{path: {value}}}\n" if "[" in value else "")
    flags = [f"--config={tmp_path / 'run.yaml'}", *([] if "[" in value else [f"--data.path={value}"])]
    with pytest.raises(UserError, match=message):
        settings_of(flags)


def test_a_run_goes_on_with_other_datasets_only_where_the_classes_stay() -> None:
    def info(centers: str, classes: int, tokenizer: str | None = "t") -> DatasetInfo:
        return DatasetInfo(1, 1, 1, classes, 5 if tokenizer else 0, centers, tokenizer, ())

    def labels(*infos: DatasetInfo) -> list[object]:
        joined, _ = join(infos, [str(number) for number in range(len(infos))])
        return [getattr(joined, key) for key in LABELS]

    one = [9, 5, "a", "t"]
    assert labels(info("a", 9)) == labels(info("a", 9), info("a", 9, None)) == one
    two = labels(info("a", 9), info("b", 4))
    assert two[:2] == [13, 5]
    assert len({str(each) for each in (one, two, labels(info("b", 4), info("a", 9)))}) == 3
    assert labels(info("a", 9), info("b", 4), info("a", 9)) == two


def test_the_plan_counts_the_classes_of_all_datasets(folder: Path) -> None:
    config = toy_config(folder, folder, data__path=f"{folder}/one=2,{folder}/two=1")
    labels = known_labels(config, None, None)
    assert (labels.object_classes, labels.text_classes) == (2 * OBJECT_CLASSES, TEXT_CLASSES)
    assert labels.source == f"{folder}/one/dataset.json, {folder}/two/dataset.json"


# ---- evaluation ------------------------------------------------------------------------------------


class Blind:
    """Says the same of every region."""

    def encode(self, items: Sequence[BoxedImage]) -> Features:
        rows = np.ones((sum(len(item.boxes) for item in items), 4), dtype=np.float32)
        return Features(rows, rows)


def test_evaluation_asks_about_all_datasets_by_the_classes_that_the_heads_know(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets, _ = mixed(folder, "@one=2,@two=1")
    centers = np.ones((datasets.info.object_classes, 4), dtype=np.float32)
    found = confuse(datasets, Blind(), centers, seed=0)  # type: ignore[arg-type]
    assert found is not None
    assert {sample < 12 for sample, _ in found.regions} == {True, False}
    for sample, region in found.regions:
        assert region.label is not None
        assert (region.label >= OBJECT_CLASSES) == (sample >= 12)

    monkeypatch.setattr(scenes, "load_tokenizer", lambda path: path)
    alone, both = (open_vocabulary(each) for each in (datasets.parts[0], datasets))
    assert both is not None
    assert (both.size, both.processor) == (TEXT_CLASSES, folder / "one" / "tokenizer.model")
    # The toy's tokenizers are one and the same, so both datasets have part in the counts.
    assert alone is not None
    assert alone.prior != both.prior
