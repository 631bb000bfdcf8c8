"""Class ranges on changing numbers of ranks: what one layout saved, any other takes over bit for bit.

Sixty-four processes are too many for a test; a head needs only its rank and the number of ranks to know
its range, so each rank's head is built here one after the other, and nothing of it is replaced. Training
between the moves runs on one real rank, from whatever was put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from head_reference import build_head, group_of_one, loss_of, place_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaregion.config import HeadConfig, OptimizerConfig
from megaregion.heads import ClassShardedHead, LocalTensor

DIM = 5
STATE = {"weight", "exp_avg", "exp_avg_sq", "count", "last_positive"}


@dataclass(frozen=True)
class Seat:
    """One rank's place among some; building a head and moving its state asks for no more of a group."""

    place: int
    ranks: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.ranks


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    with group_of_one() as found:
        yield found


def make_head(group: Any, classes: int, moments: str = "fp32", seed: int = 1) -> ClassShardedHead:
    optimizer = OptimizerConfig(head_moments=cast(Any, moments))
    config = HeadConfig(sample_rate=0.4, min_negatives=2)
    return build_head(config, classes, DIM, place_of(group), seed, optimizer=optimizer)


def train(head: ClassShardedHead, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        features = torch.randn((9, DIM), generator=generator).requires_grad_()
        labels = torch.randint(0, head.classes, (9, 1), generator=generator)
        result = loss_of(head, features, labels, torch.ones(9, dtype=torch.bool), step)
        result.sum.backward()
        head.step(0.01)
        head.zero_grad()
        losses.append(float(result.sum.detach()))
    return losses


def whole_reader(pieces: Sequence[dict[str, LocalTensor]]) -> Callable[..., Tensor]:
    """Reads any box from the ranks' pieces, which must cover every class exactly once."""
    full = {}
    for name in STATE:
        parts = [piece[name] for piece in pieces]
        shape = parts[0].full_shape
        covered = torch.zeros(shape[0], dtype=torch.int32)
        whole = torch.empty(shape, dtype=parts[0].tensor.dtype)
        for part in parts:
            assert part.full_shape == shape
            rows = slice(part.offset[0], part.offset[0] + len(part.tensor))
            covered[rows] += 1
            whole[rows] = part.tensor
        assert covered.eq(1).all(), "a class was saved twice or by nobody"
        full[name] = whole

    def read(name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        return full[name][offset[0] : offset[0] + shape[0]]

    return read


def move(read: Callable[..., Tensor], ranks: int, classes: int, moments: str) -> Callable[..., Tensor]:
    """Load on some ranks, each of which starts with other values, and save again."""
    pieces = []
    for rank in range(ranks):
        head = make_head(Seat(rank, ranks), classes, moments, seed=99)
        head.load(read)
        pieces.append(head.state())
    return whole_reader(pieces)


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("classes", [1, 2, 7, 64, 65, 1000])
def test_a_head_goes_from_64_to_8_to_3_ranks_and_back_and_trains_on_bit_for_bit(
    group: dist.ProcessGroup, classes: int, moments: str
) -> None:
    stayed = make_head(group, classes, moments)
    train(stayed, range(3))
    read = whole_reader([stayed.state()])
    for ranks in (64, 8, 3, 8, 64):
        read = move(read, ranks, classes, moments)
        moved = make_head(group, classes, moments)
        moved.load(read)
        for name, piece in stayed.state().items():
            assert torch.equal(moved.state()[name].tensor, piece.tensor), name
    assert train(moved, range(3, 6)) == train(stayed, range(3, 6))
    for name, piece in stayed.state().items():
        assert torch.equal(moved.state()[name].tensor, piece.tensor), name


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(1, 3000), ranks=st.integers(1, 130))
def test_ranges_cover_all_classes_once_and_no_rank_holds_more_than_its_share(
    classes: int, ranks: int
) -> None:
    share = -(-classes // ranks)
    ends = 0
    for rank in range(ranks):
        local = make_head(Seat(rank, ranks), classes).local
        assert local.start == min(ends, classes)
        assert len(local) <= share
        ends = local.stop
    assert ends == classes
