"""The head in one process: against a dense reference, at its edges, and in what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

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
    loss_of,
    place_of,
    positives_of,
    targets_of,
    with_margin,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaregion.config import HeadConfig, OptimizerConfig
from megaregion.errors import UserError
from megaregion.heads import ClassShardedHead, GatheredFeatures, NonFiniteFeatures, tiles
from megaregion.heads.centers import RowAdamW, given_centers, random_centers
from megaregion.heads.sampling import DrawRule, build_targets, class_hashes, draw_key, drawn_classes
from megaregion.heads.streaming import apply_margin

ALL = {"sample_rate": 1.0}


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with group_of_one() as found:
        yield found
    torch.set_num_threads(threads)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even toy problems into several blocks and tiles."""
    monkeypatch.setattr(tiles, "MIN_ROWS", 3)
    monkeypatch.setitem(tiles.SCORES, "processor", 12)


def make_head(
    group: dist.ProcessGroup,
    classes: int = 13,
    dim: int = 6,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> ClassShardedHead:
    names = ("chunk_bytes", "optimizer", "seed")
    own = {name: options.pop(name) for name in names if name in options}
    return build_head(HeadConfig(**options), classes, dim, place_of(group), dtype=dtype, **own)


def make_rows(
    rows: int, dim: int, classes: int, labels: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn((rows, dim), generator=generator, dtype=torch.float64).to(dtype)
    found = torch.randint(-1 if labels > 1 else 0, classes, (rows, labels), generator=generator)
    if labels > 1:
        found[:, 0] = found[:, 0].clamp_min(0)
    return features.requires_grad_(), found


def everyone(labels: Tensor) -> Tensor:
    return torch.ones(len(labels), dtype=torch.bool)


def assert_equals_dense(
    head: ClassShardedHead,
    features: Tensor,
    labels: Tensor,
    tolerance: float,
    rows: Tensor | None = None,
    draw_rows: int = 0,
) -> None:
    rows = everyone(labels) if rows is None else rows
    targets = targets_of(head, labels, rows, step=3, first_row=0, draw_rows=draw_rows)
    result = head.score(GatheredFeatures(features, head.topology), targets)
    (result.sum * 0.37).backward()
    own = features.detach().double().requires_grad_()
    centers = head.weight.detach().double().requires_grad_()
    drawn = drawn_of(targets, head.classes)
    expected = dense_loss(own[rows], centers, positives_of(targets), drawn, head.config)
    (expected * 0.37).backward()
    assert_close(result.sum.detach(), expected.detach(), tolerance)
    assert_close(features.grad, own.grad, tolerance)
    assert_close(dense_center_gradient(head), centers.grad, tolerance)
    assert int(result.count) == int(rows.sum())


def assert_close(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Equal up to the tolerance times the expected tensor's size."""
    assert found is not None
    assert expected is not None
    size = max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    error = float((found.double() - expected).abs().max()) / size if expected.numel() else 0.0
    assert error <= tolerance, f"off by {error:.2e} of {size:.2e}"


CASES = list(itertools.product(("separated", "softmax"), ("cosface", "arcface", "none"), (1, 4)))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("chunk_bytes", [1, 200, 1000, 10**6])
@pytest.mark.parametrize(("loss", "margin_kind", "labels"), CASES)
def test_loss_and_gradients_equal_a_dense_head(
    group: dist.ProcessGroup, loss: str, margin_kind: str, labels: int, chunk_bytes: int
) -> None:
    head = make_head(group, loss=loss, margin_kind=margin_kind, chunk_bytes=chunk_bytes, **ALL)
    features, found = make_rows(11, 6, 13, labels)
    assert_equals_dense(head, features, found, 1e-10)


@pytest.mark.parametrize(("loss", "margin_kind", "labels"), CASES)
def test_single_precision_stays_within_1e5_of_a_dense_head(
    group: dist.ProcessGroup, loss: str, margin_kind: str, labels: int
) -> None:
    head = make_head(
        group,
        700,
        32,
        torch.float32,
        loss=loss,
        margin_kind=margin_kind,
        chunk_bytes=100_000,
        sample_rate=0.5,
    )
    features, found = make_rows(200, 32, 700, labels, dtype=torch.float32)
    assert_equals_dense(head, features, found, 1e-5)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.usefixtures("small_tiles")
def test_any_shape_equals_a_dense_head(group: dist.ProcessGroup, data: st.DataObject) -> None:
    pick = data.draw
    classes, dim, rows = pick(st.integers(1, 40)), pick(st.integers(1, 9)), pick(st.integers(0, 14))
    margin_kind = pick(st.sampled_from(("cosface", "arcface", "none")))
    if margin_kind == "arcface":
        dim += 3  # in a line every angle is 0 or pi, where the reference has no derivative
    labels, seed = pick(st.integers(1, 5)), pick(st.integers(0, 2**31))
    head = make_head(
        group,
        classes,
        dim,
        seed=seed,
        loss=pick(st.sampled_from(("separated", "softmax"))),
        margin_kind=margin_kind,
        margin=pick(st.sampled_from((0.0, 0.3, 0.9))),
        scale=pick(st.sampled_from((1.0, 16.0, 64.0, 71.0, 400.0))),
        sample_rate=pick(st.sampled_from((1e-9, 0.1, 0.6, 1.0))),
        min_negatives=pick(st.integers(0, 50)),
        chunk_bytes=pick(st.sampled_from((1, 100, 500, 10**6))),
    )
    features, found = make_rows(rows, dim, classes, labels, seed)
    chosen = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < pick(
        st.sampled_from((0.5, 1.1))
    )
    assert_equals_dense(head, features, found, 1e-9, chosen, pick(st.integers(0, 9)))


@pytest.mark.parametrize("loss", ["separated", "softmax"])
@pytest.mark.parametrize("scale", [64.0, 300.0])
def test_edges_of_the_problem_equal_a_dense_head(group: dist.ProcessGroup, loss: str, scale: float) -> None:
    def check(classes: int, labels: Tensor, **options: Any) -> None:
        head = make_head(group, classes, 5, loss=loss, scale=scale, **options)
        features, _ = make_rows(len(labels), 5, classes, 1)
        assert_equals_dense(head, features, labels, 1e-9)

    check(1, torch.zeros((3, 1), dtype=torch.int64))  # no negative at all
    check(9, torch.full((6, 1), 4))  # all rows of one class
    check(4, torch.arange(4).repeat(3, 1))  # a text with every token
    check(50, torch.arange(6)[:, None], sample_rate=1e-9, min_negatives=3)  # only the floor
    check(50, torch.arange(6)[:, None], sample_rate=1e-9, min_negatives=0)  # only each other's positives
    check(8, torch.tensor([[3, 3, 3], [2, 5, 2]]))  # tokens given twice


@pytest.mark.parametrize("loss", ["separated", "softmax"])
def test_features_equal_or_opposite_to_centers_stay_finite_and_exact(
    group: dist.ProcessGroup, loss: str
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 3e-5)):
        head = make_head(group, 6, 4, dtype, loss=loss, **ALL)
        head.weight[3] = head.weight[2] * 2.0  # a near-duplicate: the hardest negative there is
        features = torch.cat([head.weight, -head.weight]).clone().requires_grad_()
        labels = torch.arange(6).repeat(2)[:, None]
        assert_equals_dense(head, features, labels, tolerance)


@pytest.mark.parametrize("loss", ["separated", "softmax"])
@pytest.mark.parametrize("margin_kind", ["cosface", "arcface"])
def test_a_row_of_zeros_has_finite_loss_and_no_gradient(
    group: dist.ProcessGroup, loss: str, margin_kind: str
) -> None:
    head = make_head(group, loss=loss, margin_kind=margin_kind, dtype=torch.float32)
    head.weight[0] = 0
    features = torch.zeros((2, 6), requires_grad=True)
    result = loss_of(head, features, torch.tensor([[0], [1]]), everyone(features), 0)
    result.sum.backward()
    assert torch.isfinite(result.sum)
    assert torch.equal(features.grad, torch.zeros(2, 6))
    assert torch.isfinite(dense_center_gradient(head)).all()


@settings(max_examples=60, deadline=None)
@given(
    cosine=st.floats(-0.999, 0.999),
    margin=st.floats(0.0, 0.95),
    kind=st.sampled_from(("cosface", "arcface", "none")),
)
def test_slope_of_the_margin_is_its_derivative(cosine: float, margin: float, kind: Any) -> None:
    at = torch.tensor([cosine], dtype=torch.float64)
    value, slope = apply_margin(at, kind, margin)
    assert_close(value, with_margin(at, HeadConfig(margin=margin, margin_kind=kind)), 1e-12)
    step = 1e-6
    if kind == "arcface" and abs(cosine + np.cos(margin)) < 2 * step:
        return  # the jump past pi has no derivative
    higher, _ = apply_margin(at + step, kind, margin)
    lower, _ = apply_margin(at - step, kind, margin)
    assert_close(slope, (higher - lower) / (2 * step), 1e-5)


def test_metrics_count_what_they_say(group: dist.ProcessGroup) -> None:
    head = make_head(group, 10, 10, sample_rate=1.0)
    head.weight.copy_(torch.eye(10, dtype=torch.float64))
    features = torch.eye(10, dtype=torch.float64)[[0, 1, 2, 3]].requires_grad_()
    labels = torch.tensor([[0], [1], [2], [9]])
    metrics = loss_of(head, features, labels, everyone(labels), 0).metrics
    assert float(metrics["positive_cosine"]) == pytest.approx(0.75)
    assert float(metrics["accuracy"]) == pytest.approx(0.75)
    assert float(metrics["sample_rate"]) == 1.0
    assert float(metrics["positive_share"]) == pytest.approx(0.4)


def test_rows_of_the_other_kind_get_no_gradient_and_no_loss(group: dist.ProcessGroup) -> None:
    head = make_head(group)
    features, labels = make_rows(8, 6, 13, 1)
    rows = torch.tensor([True, False] * 4)
    labels[~rows] = 999
    assert_equals_dense(head, features, labels, 1e-10, rows)
    assert not features.grad[~rows].any()


def test_a_step_without_rows_of_the_kind_changes_nothing(group: dist.ProcessGroup) -> None:
    head = make_head(group)
    before = head.weight.clone()
    features, labels = make_rows(4, 6, 13, 1)
    result = loss_of(head, features, labels, torch.zeros(4, dtype=torch.bool), 0)
    result.sum.backward()
    assert float(result.sum.detach()) == 0
    assert not features.grad.any()
    head.step(0.1)
    assert torch.equal(head.weight, before)
    assert all(torch.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize("sample_rate", [0.2, 1.0])
def test_micro_steps_add_up_to_one_step(group: dist.ProcessGroup, sample_rate: float) -> None:
    def head_after(parts: int) -> ClassShardedHead:
        head = make_head(group, 60, 6, sample_rate=sample_rate, min_negatives=4)
        features, labels = make_rows(12, 6, 60, 1)
        for part in torch.arange(12).chunk(parts):
            result = loss_of(head, features[part], labels[part], everyone(part), 0, int(part[0]), draw_rows=3)
            (result.sum / 12).backward()
        head.step(1e-2)
        return head

    whole = head_after(1)
    for parts in (2, 4):
        assert_close(head_after(parts).weight, whole.weight, 1e-9)


def test_losses_of_one_step_with_different_weights_are_refused(group: dist.ProcessGroup) -> None:
    head = make_head(group)
    features, labels = make_rows(4, 6, 13, 1)
    for weight in (1.0, 0.5):
        (loss_of(head, features, labels, everyone(labels), 0).sum * weight).backward()
    with pytest.raises(RuntimeError, match="same weight"):
        head.step(1e-3)
    head.zero_grad()
    loss_of(head, features, labels, everyone(labels), 0)
    with pytest.raises(RuntimeError, match="backward was missed"):
        head.step(1e-3)


def test_loss_without_gradient_leaves_none_behind(group: dist.ProcessGroup) -> None:
    head = make_head(group)
    features, labels = make_rows(4, 6, 13, 1)
    with torch.no_grad():
        plain = loss_of(head, features, labels, everyone(labels), 0)
    assert len(head.gradient.values) == 0
    assert torch.equal(plain.sum, loss_of(head, features, labels, everyone(labels), 0).sum.detach())


class _Watch(TorchDispatchMode):
    """Notes the greatest tensor that is made, and what makes the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.greatest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.greatest = max(self.greatest, out.numel())
        if any(wait in str(func) for wait in self.WAITS):
            self.waits.append(str(func))
        return out


def test_no_tensor_approaches_the_matrix_of_scores(group: dist.ProcessGroup) -> None:
    rows, classes, dim = 512, 2048, 8
    head = make_head(group, classes, dim, torch.float32, sample_rate=1.0, chunk_bytes=64 * 1024 * 4)
    features, labels = make_rows(rows, dim, classes, 1, dtype=torch.float32)
    with _Watch() as watch:
        loss_of(head, features, labels, everyone(labels), 0).sum.backward()
        head.step(1e-3)
    assert watch.greatest <= 64 * 1024


@pytest.mark.parametrize("sample_rate", [0.1, 1.0])
def test_scoring_and_backward_never_wait_for_the_device(group: dist.ProcessGroup, sample_rate: float) -> None:
    head = make_head(group, 100, 8, torch.float32, sample_rate=sample_rate)
    features, labels = make_rows(20, 8, 100, 3, dtype=torch.float32)
    for micro_step in range(2):
        targets = targets_of(head, labels, everyone(labels), 0, first_row=20 * micro_step, draw_rows=5)
        assert len(targets.draws) == (4 if sample_rate < 1 else 1)
        with _Watch() as watch:
            gathered = GatheredFeatures(features, place_of(group))
            head.score(gathered, targets).sum.backward()
        # One check of finite features, which only a head on a processor makes at once.
        assert watch.waits == ["aten._local_scalar_dense.default"]
    with _Watch() as watch:
        head.grad_norm_squared()
        head.step(1e-3)
    # How many classes took part is asked for with one list, which gives their rows without asking again.
    assert set(watch.waits) <= {"aten.nonzero_static.default"}


def test_targets_that_the_host_made_reach_a_device_whole(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # needs a GPU
    head = make_head(group, 100, 8, torch.float32, sample_rate=0.1)
    _, labels = make_rows(20, 8, 100, 3, dtype=torch.float32)
    targets = targets_of(head, labels, everyone(labels), 0, draw_rows=5)
    there = targets.to(torch.device("meta"))
    for field in dataclasses.fields(targets):
        one, other = getattr(targets, field.name), getattr(there, field.name)
        if isinstance(one, Tensor):
            assert (other.device.type, other.shape, other.dtype) == ("meta", one.shape, one.dtype)
        else:
            assert other == one


def test_draw_is_the_same_for_any_sharding() -> None:
    labels = torch.tensor([[3, -1], [700, 42]])
    for rate, floor in ((0.1, 4), (0.001, 50), (1e-9, 0), (0.5, 1000)):
        whole = drawn_classes(9, 1000, range(1000), labels, rate, floor)
        for ranks in (2, 3, 7, 1200):
            share = -(-1000 // ranks)
            parts = []
            for rank in range(ranks):
                local = range(min(rank * share, 1000), min((rank + 1) * share, 1000))
                part = drawn_classes(9, 1000, local, labels, rate, floor)
                parts.append(torch.arange(local.start, local.stop) if part is None else part + local.start)
            found = torch.cat(parts)
            assert torch.equal(found, torch.arange(1000) if whole is None else whole)


@settings(max_examples=80, deadline=None)
@given(
    classes=st.integers(1, 400),
    rate=st.floats(1e-6, 0.999),
    floor=st.integers(0, 500),
    taken=st.integers(0, 400),
    key=st.integers(0, 2**64 - 1),
)
def test_draw_holds_all_positives_and_the_floor_of_negatives(
    classes: int, rate: float, floor: int, taken: int, key: int
) -> None:
    positives = set(range(0, classes, 2)[:taken])
    labels = torch.tensor([sorted(positives)], dtype=torch.int64).reshape(1, -1)
    found = drawn_classes(key, classes, range(classes), labels, rate, floor)
    drawn = set(range(classes)) if found is None else set(found.tolist())
    assert positives <= drawn
    assert len(drawn - positives) >= min(floor, classes - len(positives))


def test_draw_has_its_rate_and_other_steps_draw_independently() -> None:
    none = torch.empty((0, 1), dtype=torch.int64)
    draws = []
    for step, group_number, name in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        found = drawn_classes(draw_key(5, name, step, group_number), 200_000, range(200_000), none, 0.1, 64)
        assert found is not None
        assert abs(len(found) - 20_000) < 5 * 134  # five deviations of the binomial
        draws.append(set(found.tolist()))
    for one, other in itertools.combinations(draws, 2):
        assert abs(len(one & other) - 2_000) < 5 * 45


def test_hashes_spread_evenly_over_classes_and_keys() -> None:
    for key in (0, 1, 2**32, 2**63 + 12345):
        hashes = class_hashes(key, 0, 1 << 16, torch.device("cpu"))
        assert int(hashes.min()) >= 0
        assert int(hashes.max()) < 2**32
        counts = torch.histc(hashes.double(), bins=64, min=0, max=2**32)
        assert float(((counts - 1024) ** 2 / 1024).sum()) < 120  # chi-square with 63 degrees of freedom
        assert torch.equal(class_hashes(key, 100, 200, torch.device("cpu")), hashes[100:200])


def test_row_adamw_equals_torch_when_every_row_takes_part() -> None:
    config = OptimizerConfig(head_weight_decay=0.1)
    weight = torch.randn((7, 5), dtype=torch.float64)
    ours, theirs = RowAdamW(weight.clone(), config), torch.nn.Parameter(weight.clone())
    reference = torch.optim.AdamW(
        [theirs], lr=0.01, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.1
    )
    for step in range(5):
        gradient = torch.randn((7, 5), dtype=torch.float64)
        ours.step(None if step % 2 else torch.arange(7), gradient, 0.01, 0.5)
        theirs.grad = gradient * 0.5
        reference.step()
    assert_close(ours.weight, theirs.detach(), 1e-12)


def test_rows_that_take_no_part_keep_weight_and_moments_bit_for_bit(group: dist.ProcessGroup) -> None:
    optimizer = OptimizerConfig(head_weight_decay=0.5)
    head = make_head(group, 300, 8, torch.float32, sample_rate=0.1, min_negatives=0, optimizer=optimizer)
    features, labels = make_rows(10, 8, 300, 1, dtype=torch.float32)
    for step in range(4):
        before = {name: piece.tensor.clone() for name, piece in head.state().items()}
        loss_of(head, features, labels, everyone(labels), step).sum.backward()
        touched = torch.zeros(300, dtype=torch.bool)
        touched[head.gradient.rows] = True
        head.step(0.01)
        head.zero_grad()
        assert 20 < int(touched.sum()) < 90
        for name, piece in head.state().items():
            assert torch.equal(piece.tensor[~touched], before[name][~touched])
            changed = (piece.tensor != before[name]).reshape(300, -1).any(1)
            assert torch.equal(changed, touched) or name == "last_positive"


def test_bf16_moments_stay_close_to_wide_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((40, 8), generator=generator)
    wide = RowAdamW(weight.clone(), OptimizerConfig())
    narrow = RowAdamW(weight.clone(), OptimizerConfig(head_moments="bf16"))
    for step in range(60):
        gradient = torch.randn((40, 8), generator=generator) + weight
        rows = None if step % 2 else torch.arange(0, 40, 2)
        for optimizer in (wide, narrow):
            optimizer.step(rows, gradient[rows] if rows is not None else gradient, 0.01)
    moved = (wide.weight - weight).norm()
    assert narrow.exp_avg_sq.dtype == torch.bfloat16
    assert float((narrow.weight - wide.weight).norm() / moved) < 0.02


@pytest.mark.parametrize("loss", ["separated", "softmax"])
def test_bf16_operands_stay_close_to_a_dense_head(group: dist.ProcessGroup, loss: str) -> None:
    head = make_head(group, 300, 64, torch.float32, loss=loss, sample_rate=1.0, scale=16.0)
    head.operand = torch.bfloat16
    features, labels = make_rows(40, 64, 300, 1, dtype=torch.float32)
    assert_equals_dense(head, features, labels, 1e-2)


def test_dead_classes_are_idle_ones_and_centers_that_are_alike(
    group: dist.ProcessGroup,
) -> None:
    head = make_head(group, 40, 16, torch.float32, **ALL)
    head.weight[31] = head.weight[4] * 3.0 + 0.001
    features, labels = make_rows(6, 16, 40, 1, dtype=torch.float32)
    loss_of(head, features, torch.arange(6)[:, None], everyone(labels), step=10).sum.backward()
    found = head.find_dead_classes(step=100, idle_steps=95, probes=40)
    assert (found.idle, found.probed) == (34, 40)
    assert {(one, other) for one, other, _ in found.doubles} == {(4, 31), (31, 4)}
    assert head.find_dead_classes(step=200, idle_steps=95).idle == 40


def test_sampling_that_saves_nothing_warns_once(
    group: dist.ProcessGroup, caplog: pytest.LogCaptureFixture
) -> None:
    head = make_head(group, 20, 4, sample_rate=0.1, min_negatives=1)
    for step in range(2):
        targets_of(head, torch.arange(20)[:, None], torch.ones(20, dtype=torch.bool), step)
    assert [record.message for record in caplog.records if "saves less than 10%" in record.message] == [
        caplog.records[0].message
    ]


def test_a_center_counts_its_own_steps(group: dist.ProcessGroup) -> None:
    head = make_head(group, 50, 4, sample_rate=1e-9, min_negatives=0)
    features, _ = make_rows(1, 4, 50, 1)
    for step, label in enumerate((3, 3, 8)):
        loss_of(head, features, torch.tensor([[label]]), torch.ones(1, dtype=torch.bool), step).sum.backward()
        head.step(0.01)
        head.zero_grad()
    counts = head.state()["count"].tensor
    assert counts[3] == 2
    assert counts[8] == 1
    assert counts.sum() == 3


def test_first_centers_are_the_same_for_any_sharding() -> None:
    whole = random_centers(4, "object", range(10_000), 8)
    for local in (range(0, 10_000), range(4000, 4200), range(9_999, 10_000), range(10_000, 10_000)):
        assert torch.equal(random_centers(4, "object", local, 8), whole[local.start : local.stop])
    assert not torch.equal(random_centers(4, "text", range(10), 8), whole[:10])
    assert float(whole.norm(dim=1).mean()) == pytest.approx(1.0, abs=0.1)


def test_given_centers_keep_their_angles_when_the_head_is_wider() -> None:
    centers = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    wide = given_centers(centers, 1, "object", range(20), 16)
    same = given_centers(centers, 1, "object", range(20), 6)
    assert_close(wide @ wide.T, (same @ same.T).double(), 1e-5)
    assert torch.equal(given_centers(centers, 1, "object", range(5, 9), 16), wide[5:9])
    narrow = given_centers(centers, 1, "object", range(20), 3)
    assert narrow.shape == (20, 3)
    assert torch.allclose(narrow.norm(dim=1), torch.ones(20))


def test_centers_of_another_label_space_are_refused(group: dist.ProcessGroup) -> None:
    with pytest.raises(UserError, match="13 classes but was given 12 centers"):
        make_head(group).start_from(np.zeros((12, 6), np.float32))


def test_a_loaded_head_goes_on_as_the_saved_one(group: dist.ProcessGroup) -> None:
    features, labels = make_rows(5, 6, 13, 1)

    def train(head: ClassShardedHead, steps: range) -> None:
        for step in steps:
            loss_of(head, features, labels, everyone(labels), step).sum.backward()
            head.step(0.01)
            head.zero_grad()

    saved, loaded = make_head(group), make_head(group, seed=2)
    train(saved, range(3))
    kept = {name: piece.tensor.clone() for name, piece in saved.state().items()}
    loaded.load(lambda name, offset, shape: kept[name][offset[0] : offset[0] + shape[0]])
    loaded.rule = saved.rule
    train(saved, range(3, 5))
    train(loaded, range(3, 5))
    assert torch.equal(saved.weight, loaded.weight)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[0], [13]]), "label 13 of row 1 lies outside the 13 classes of head object"),
        (torch.tensor([[-2], [1]]), "label -2 of row 0"),
        (torch.tensor([[1, 2], [-1, -1]]), "row 1 belongs to head object but has no label"),
        (torch.tensor([[0.0], [1.0]]), "must be int64"),
        (torch.tensor([0, 1]), "must be int64"),
    ],
)
def test_wrong_labels_are_refused(group: dist.ProcessGroup, labels: Tensor, message: str) -> None:
    head = make_head(group)
    with pytest.raises(UserError, match=message):
        loss_of(head, torch.zeros((2, 6), dtype=torch.float64), labels, torch.ones(2, dtype=torch.bool), 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_features_that_are_not_finite_are_refused_and_named(group: dist.ProcessGroup, bad: float) -> None:
    head = make_head(group, dtype=torch.float32)
    features, labels = make_rows(6, 6, 13, 1, dtype=torch.float32)
    with torch.no_grad():
        features[2, 3] = features[5, 0] = bad
    before = head.weight.clone()
    with pytest.raises(NonFiniteFeatures, match="rows 2, 5 of the micro-step") as refused:
        loss_of(head, features, labels, everyone(labels), 0)
    assert refused.value.rows == [2, 5]
    head.step(0.1)
    assert torch.equal(head.weight, before)
    head.zero_grad()
    with torch.no_grad():
        features[2, 3] = features[5, 0] = 0.5
    loss_of(head, features, labels, everyone(labels), 0).sum.backward()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 700),
    classes=st.integers(0, 20_000),
    budget=st.integers(1, 10**9),
    itemsize=st.sampled_from((4, 8)),
    device=st.sampled_from(("processor", "gpu")),
)
def test_tiles_cover_the_scores_once_within_the_budget(
    rows: int, classes: int, budget: int, itemsize: int, device: str
) -> None:
    plan = tiles.plan_tiles(rows, classes, classes * 3 // 2, itemsize, budget, device)
    covered = [part for block in plan.blocks() for part in range(block.start, block.stop)]
    assert covered == list(range(rows))
    ends = [tile.stop for tile in plan.tiles()]
    assert sum(tile.stop - tile.start for tile in plan.tiles()) == classes
    assert (ends or [0])[-1] == classes
    held = min(plan.kept + 1, len(ends)) * plan.rows * plan.classes * itemsize
    assert held <= max(budget, itemsize * plan.rows)  # one column of a shortest block is the least there is


def test_slots_without_a_label_change_neither_a_draw_nor_the_blocks_that_it_is_cut_into() -> None:
    rule = DrawRule("text", 100_000, range(25_000), ranks=4, seed=3, rate=0.1, min_negatives=64)
    found = torch.randint(100_000, (600, 2), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([found, torch.full((600, 30), -1)], 1)
    draws = [
        build_targets(labels, everyone(labels), rule, step=0, first_row=0, draw_rows=0)
        for labels in (found, padded)
    ]
    assert torch.equal(draws[0].classes, draws[1].classes)
    [plain], [wide] = (targets.draws for targets in draws)
    assert plain.typical_size == wide.typical_size == pytest.approx(plain.size, rel=0.05)


def test_a_text_head_can_do_without_labels_on_its_last_slots(group: dist.ProcessGroup) -> None:
    features, labels = make_rows(6, 6, 13, 3)
    padded = torch.cat([labels, torch.full((6, 5), -1)], 1)
    plain = loss_of(make_head(group), features, labels, everyone(labels), 0)
    wide = loss_of(make_head(group), features, padded, everyone(labels), 0)
    assert_close(plain.sum.detach(), wide.sum.detach(), 1e-12)
