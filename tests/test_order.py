"""The order of samples is a function of (seed, position) and of nothing else."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaregion.data.order import Purpose, SampleOrder, SeededRng, kept_branches, seeded_rng, step_positions

SIZES = (7, 3, 11, 5, 1, 8)
COUNT = sum(SIZES)


def epoch(order: SampleOrder, number: int) -> list[int]:
    return [order.sample(number * COUNT + place) for place in range(COUNT)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(-5, 2**70), st.integers(1, 12))
def test_every_epoch_is_a_permutation_of_the_dataset(sizes: list[int], seed: int, window: int) -> None:
    order = SampleOrder(sizes, seed, window)
    for number in (0, 3, 10**9):
        places = range(number * sum(sizes), (number + 1) * sum(sizes))
        assert sorted(order.sample(p) for p in places) == list(range(sum(sizes)))


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder(SIZES, 0, 2)
    orders = [epoch(order, 0), epoch(order, 1), epoch(SampleOrder(SIZES, 1, 2), 0)]
    assert all(a != b for a in orders for b in orders if a is not b)


def test_a_position_needs_no_history() -> None:
    walked = SampleOrder(SIZES, 5, 2)
    stream = [walked.sample(p) for p in range(4 * COUNT)]
    for position in (0, 3 * COUNT + 2, 17, 2 * COUNT - 1, 2 * COUNT):
        assert SampleOrder(SIZES, 5, 2).sample(position) == stream[position]


def test_samples_of_a_window_come_from_its_shards_alone() -> None:
    starts = [sum(SIZES[:s]) for s in range(len(SIZES))]
    shard_of = [max(s for s in range(len(SIZES)) if starts[s] <= index) for index in range(COUNT)]
    shards = [shard_of[index] for index in epoch(SampleOrder(SIZES, 2, 2), 4)]
    # Each shard's visits begin and end within one window of two shards.
    spans = sorted((shards.index(s), COUNT - shards[::-1].index(s), s) for s in set(shards))
    windows = [spans[i : i + 2] for i in range(0, len(spans), 2)]
    for before, after in pairwise(windows):
        assert max(end for _, end, _ in before) <= min(start for start, _, _ in after)
    assert any(a[1] > b[0] for a, b in windows), "the shards of a window are not mixed"


def test_position_ten_to_the_twelve_is_found_without_a_replay() -> None:
    # A replay of 10**12 positions would never return.
    order = SampleOrder([10_000] * 2_000, 0, 8)
    assert len({order.sample(10**12 + p) for p in range(1_000)}) == 1_000


def test_a_seeded_rng_gives_the_numbers_of_each_position() -> None:
    reused = SeededRng(3, Purpose.AUGMENTATION)
    for position in (5, 0, 2**63, 5):
        fresh = seeded_rng(3, Purpose.AUGMENTATION, position)
        again = reused.at(position)
        for _ in range(3):
            # An odd number of halves leaves one over, which the next position must not see.
            assert again.integers(7, dtype=np.uint32) == fresh.integers(7, dtype=np.uint32)
            assert again.uniform() == fresh.uniform()
            assert again.permutation(9).tolist() == fresh.permutation(9).tolist()


def test_stochastic_depth_draws_for_each_position_alone_and_leaves_means_as_they_are() -> None:
    rates = (0.0, 0.2, 0.4)
    together = kept_branches(7, range(40_000), rates)
    assert np.array_equal(kept_branches(7, [31_000, 5], rates), together[[31_000, 5]])
    assert not np.array_equal(kept_branches(8, range(100), rates), together[:100])
    assert together.shape == (40_000, 6)
    stays = 1 - np.repeat(rates, 2)
    assert np.all(np.isclose(together, 1 / stays) | (together == 0))
    assert np.all(together[:, :2] == 1), "the first block drops nothing"
    assert np.abs((together > 0).mean(0) - stays).max() < 0.01
    assert np.abs(together.mean(0) - 1).max() < 0.02
    drawn = (together[:, 2:] > 0).astype(float)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.03, "attention and MLP apart"


def test_the_order_survives_pickling() -> None:
    order = SampleOrder(SIZES, 9, 3)
    assert epoch(pickle.loads(pickle.dumps(order)), 2) == epoch(order, 2)


def test_a_replacement_is_another_sample_and_always_the_same() -> None:
    order = SampleOrder(SIZES, 3, 2)
    for position in (0, 12, 10**12):
        others = [order.replacement(position, attempt) for attempt in range(1, 40)]
        assert order.sample(position) not in others
        assert set(others) <= set(range(COUNT))
        assert len(set(others)) > 15
        assert others == [SampleOrder(SIZES, 3, 2).replacement(position, a) for a in range(1, 40)]
    assert SampleOrder([1], 0, 1).replacement(5, 1) == 0


@pytest.mark.parametrize("sizes", [[], [3, 0]])
def test_an_empty_shard_has_no_order(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="empty"):
        SampleOrder(sizes, 0, 1)


@pytest.mark.parametrize(("ranks", "micro_steps"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 6), (4, 3)])
def test_a_step_covers_the_same_positions_for_any_ranks_and_micro_steps(ranks: int, micro_steps: int) -> None:
    for step in (0, 7):
        taken = [
            position
            for micro_step in range(micro_steps)
            for rank in range(ranks)
            for position in step_positions(step, 24, micro_step, micro_steps, rank, ranks)
        ]
        assert taken == list(range(24 * step, 24 * (step + 1)))


def test_a_global_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="24 images do not split over 5 micro-steps of 2 ranks"):
        step_positions(0, 24, 0, 5, 0, 2)
