"""Classes near a positive are no negatives: which they are, and what the loss makes of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from head_reference import (
    build_head,
    dense_center_gradient,
    dense_loss,
    drawn_of,
    group_of_one,
    place_of,
    positives_of,
    targets_of,
)
from toy import toy_config, toy_dataset

from megaregion.checks import check_config
from megaregion.config import HeadConfig, RunConfig
from megaregion.data.shards import ShardedDataset, open_datasets
from megaregion.errors import UserError
from megaregion.heads import GatheredFeatures, sharded, tiles
from megaregion.heads import centers as given
from megaregion.heads.centers import find_near
from megaregion.training.losses import Heads

CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    with group_of_one() as alone:
        yield alone


def some_centers(*shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def brute_force(centers: list[np.ndarray], cosine: float) -> dict[int, set[int]]:
    """Of every class those near it, by all cosines in fp64."""
    unit = [(part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float64) for part in centers]
    found, firsts = {}, np.cumsum([0, *map(len, centers)])
    for first, rows in zip(firsts, unit, strict=False):
        for number, row in enumerate(rows):
            found[int(first) + number] = {
                int(other_first) + other
                for other_first, others in zip(firsts, unit, strict=False)
                if others.shape[1] == len(row)
                for other in np.flatnonzero(others @ row > cosine).tolist()
                if other_first + other != first + number
            }
    return found


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_ranks_together_know_the_near_classes_of_all_cosines(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "NEAR_SCORES", 200)
    monkeypatch.setattr(given, "NEAR_PAIRS", 3)
    centers = some_centers((40, 4), (9, 3), (31, 4))
    expected, found = brute_force(centers, 0.6), dict[int, set[int]]()
    share = -(-80 // ranks)
    for rank in range(ranks):
        local = range(rank * share, min(80, (rank + 1) * share))
        lists = find_near(centers, local, 0.6, CPU)
        for number in range(80):
            own = lists.classes[lists.starts[number] : lists.starts[number + 1]].tolist()
            assert own == sorted(set(own))
            found.setdefault(number, set()).update(own)
    assert found == expected
    assert sum(map(len, expected.values())) > 80
    assert any(other >= 49 for other in expected[0]), "of another dataset with centers as wide"


@pytest.mark.parametrize("chunk_bytes", [200, 10**6])
@pytest.mark.parametrize(
    ("loss", "labels", "rate", "scale"),
    [("separated", 1, 1.0, 64.0), ("softmax", 3, 1.0, 200.0), ("separated", 3, 0.4, 64.0)],
)
def test_the_loss_equals_a_dense_one_whose_rows_have_no_near_negatives(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch,
    loss: str, labels: int, rate: float, scale: float, chunk_bytes: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(tiles, "MIN_ROWS", 3)
    monkeypatch.setitem(tiles.SCORES, "processor", 12)
    config = HeadConfig(
        loss=loss, sample_rate=rate, scale=scale, min_negatives=5, near_classes=0.6, margin_kind="arcface"
    )
    head = build_head(config, 50, 6, place_of(group), dtype=torch.float64, chunk_bytes=chunk_bytes)
    centers = some_centers((50, 4))
    head.spare_near(*centers)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((23, 6), generator=generator, dtype=torch.float64).requires_grad_()
    found = torch.randint(-1, 50, (23, labels), generator=generator)
    found[:, 0].clamp_(min=0)
    rows = torch.rand(23, generator=generator) < 0.8
    targets = targets_of(head, found, rows, step=1, draw_rows=7)
    result = head.score(GatheredFeatures(features, head.topology), targets)
    result.sum.backward()
    own, weight = (value.detach().clone().requires_grad_() for value in (features, head.weight))
    lists, positives = brute_force(centers, 0.6), positives_of(targets)
    drawn = drawn_of(targets, 50)
    spared = [
        classes - set().union(*(lists[p] for p in own)) for classes, own in zip(drawn, positives, strict=True)
    ]
    assert sum(map(len, drawn)) > sum(map(len, spared)) + 20
    expected = dense_loss(own[rows], weight, positives, spared, config)
    expected.backward()
    torch.testing.assert_close(result.sum.detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(features.grad, own.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense_center_gradient(head), weight.grad, rtol=1e-9, atol=1e-9)


def test_a_cosine_that_makes_everything_near_is_refused(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "MOST_NEAR", 3)
    monkeypatch.setattr(sharded, "MOST_NEAR", 3)
    head = build_head(HeadConfig(near_classes=0.01), 50, 6, place_of(group))
    with pytest.raises(
        UserError, match=r"head\.object\.near_classes 0\.01 makes more than 3 classes near one"
    ):
        head.spare_near(*some_centers((50, 4)))


def test_the_head_of_objects_alone_spares_classes(
    group: dist.ProcessGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = ShardedDataset(toy_dataset(tmp_path, samples=4, shards=1))
    config = toy_config(tmp_path, tmp_path, head__object__near_classes=0.4)
    with caplog.at_level(logging.INFO):
        heads = Heads(config, dataset, place_of(group)).by_kind
    assert heads["object"].rule.near is not None
    assert heads["text"].rule.near is None
    assert re.search(r"a class has [\d.]+ others nearer than 0.4, at most \d+; they are no neg", caplog.text)


@pytest.mark.parametrize("setting", [{"head__object__near_classes": 0.4}, {"head__init": "centers"}])
def test_a_dataset_without_centers_is_named_with_the_setting_that_needs_them(
    group: dist.ProcessGroup, tmp_path: Path, setting: dict[str, object]
) -> None:
    dataset = ShardedDataset(toy_dataset(tmp_path, samples=4, shards=1))
    (tmp_path / "centers.npy").unlink()
    config = toy_config(tmp_path, tmp_path, **setting)
    with pytest.raises(UserError, match=r"head\.\S+.* needs .*centers\.npy, .*it does not exist"):
        Heads(config, dataset, place_of(group))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head__text__near_classes": 0.5}, r"head\.text\.near_classes must be 0, got 0\.5: tokens have no"),
        ({"head__object__near_classes": 1.5}, r"head\.object\.near_classes must lie in \[0, 1\], got 1\.5"),
    ],
)
def test_near_classes_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    config: RunConfig = toy_config(Path("data"), Path("runs"), **changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_a_ranks_centers_are_read_out_of_the_mapped_file_of_all(
    group: dist.ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million centers it holds a part; every rank of a host would read 3 GB at each start."""
    path, given_to = toy_dataset(tmp_path / "shards"), list[np.ndarray]()
    config = toy_config(path, tmp_path, head__init="centers")
    start = sharded.ClassShardedHead.start_from
    monkeypatch.setattr(
        sharded.ClassShardedHead,
        "start_from",
        lambda head, *parts: (given_to.extend(parts), start(head, *parts)),
    )
    Heads(config, open_datasets(config.data), place_of(group))
    assert [type(part) for part in given_to] == [np.memmap]
