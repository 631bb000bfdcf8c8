"""The head on several ranks: the same loss, gradients and centers as on one, from one launch of four."""

from __future__ import annotations

import itertools
import os
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from head_reference import build_head, dense_center_gradient, loss_of, place_of, targets_of
from launch import launch, repository
from torch import Tensor

from megaregion.config import HeadConfig
from megaregion.errors import UserError
from megaregion.heads import GatheredFeatures, tiles
from megaregion.parallel import topology
from megaregion.parallel.topology import GatheringRows, scatter_sums

RANKS = 4
ROWS, DIM, STEPS = 24, 6, 2
LAYOUTS = {
    "one": (1, 1),
    "two": (2, 1),
    "three": (3, 1),
    "four": (4, 1),
    "two by two": (2, 2),
    "tensor": (1, 4),
    "two nodes": (4, 1),
}
"""Data-parallel and tensor-parallel ranks by name; tensor-parallel ranks are neighbours. The rows of "two
nodes" go node by node, two ranks on each."""

CASES: dict[str, dict[str, Any]] = {
    f"{loss}, {margin}, {labels} labels, rate {rate}": {
        "config": HeadConfig(loss=loss, margin_kind=margin, sample_rate=rate, min_negatives=5),
        "classes": 57,
        "labels": labels,
        "draw_rows": 0 if rate == 1.0 else 8,
        "chunk_bytes": 600,
    }
    for (loss, margin), labels, rate in itertools.product(
        (("separated", "cosface"), ("softmax", "cosface")), (1, 4), (0.2, 1.0)
    )
}
CASES["arcface"] = {
    **CASES["separated, cosface, 4 labels, rate 0.2"],
    "config": HeadConfig(margin_kind="arcface", sample_rate=0.2, min_negatives=5),
}
CASES["one class"] = {**CASES["separated, cosface, 1 labels, rate 1.0"], "classes": 1}
CASES["fewer classes than ranks"] = {**CASES["softmax, cosface, 1 labels, rate 1.0"], "classes": 3}
CASES["only the floor"] = {
    **CASES["separated, cosface, 1 labels, rate 1.0"],
    "config": HeadConfig(sample_rate=1e-9, min_negatives=2),
    "draw_rows": 6,
}
CASES["near classes"] = {
    **CASES["separated, cosface, 4 labels, rate 0.2"],
    "config": HeadConfig(sample_rate=0.2, min_negatives=5, near_classes=0.6),
}
CASES["scale beyond the bound"] = {
    **CASES["softmax, cosface, 4 labels, rate 1.0"],
    "config": HeadConfig(loss="softmax", scale=200.0, sample_rate=1.0),
}


def on_rank(folder: str) -> None:
    """What every rank does: all cases on all layouts that it belongs to, results to files."""
    dist.init_process_group("gloo")
    tiles.MIN_ROWS, tiles.SCORES["processor"] = 6, 24  # even toy problems become several blocks and tiles
    rank = dist.get_rank()
    groups = make_groups()
    dist.barrier()
    for layout in LAYOUTS:
        if rank < world_size(layout):
            found = {name: train(case, *groups[layout]) for name, case in CASES.items()}
            torch.save(found, Path(folder) / f"{layout}-{rank}.pt")
    dist.barrier()
    for saved, loaded in itertools.permutations(("one", "three", "four", "two by two"), 2):
        if rank < world_size(loaded):
            case = CASES["separated, cosface, 4 labels, rate 0.2"]
            found = train(case, *groups[loaded], resume=Path(folder) / saved)
            torch.save(found, Path(folder) / f"{saved} to {loaded}-{rank}.pt")
    errors = {"four": refuse(*groups["four"][:2])}
    torch.save(errors, Path(folder) / f"errors-{rank}.pt")
    torch.save(both_ways(*groups["two nodes"][1::2]), Path(folder) / f"ways-{rank}.pt")
    torch.save({"cut": [told(*case) for case in TOLD]}, Path(folder) / f"told-{rank}.pt")
    dist.destroy_process_group()


def world_size(layout: str) -> int:
    data, tensor = LAYOUTS[layout]
    return data * tensor


def make_groups() -> dict[str, tuple[Any, Any, Any]]:
    """World, data-parallel and tensor-parallel group of this rank in each layout."""
    groups = {}
    for layout, (data, tensor) in LAYOUTS.items():
        rank, ranks = dist.get_rank(), data * tensor
        world = dist.new_group(list(range(ranks)))
        columns = [dist.new_group(list(range(first, ranks, tensor))) for first in range(tensor)]
        lines = [dist.new_group(list(range(first, first + tensor))) for first in range(0, ranks, tensor)]
        line = lines[rank // tensor] if rank < ranks else None
        groups[layout] = (world, columns[rank % tensor], line, None)
    groups["two nodes"] = (*groups["four"][:3], told("2", "2", "2", "2", keep=True))
    return groups


TOLD = (("2", "2", "2", "2"), ("4", "4", "4", "4"), ("1", "1", "1", "1"), ("3", "3", "3", "1"))
"""LOCAL_WORLD_SIZE of each of the four ranks."""


def told(*ranks_per_node: str, keep: bool = False) -> Any:
    """The groups by nodes that follow from what the launcher tells; without keep, whether there are any."""
    os.environ["LOCAL_WORLD_SIZE"] = ranks_per_node[dist.get_rank()]
    found = topology.join(1).node_groups
    return found if keep else found is not None


def both_ways(data: Any, nodes: Any) -> dict[str, list[Tensor]]:
    """What flat and node-by-node collectives bring to this rank; whole numbers, whose sums are exact."""
    generator = torch.Generator().manual_seed(data.rank())
    found: dict[str, list[Tensor]] = {"gather": [], "scatter": [], "wide": []}
    rows = torch.randint(0, 1000, (4, 2, 3), generator=generator)
    whole = torch.randint(0, 1000, (16, 3), generator=generator).float()
    for way in (None, nodes):
        found["gather"].append(GatheringRows(rows, data, way).arrive())
        found["scatter"].append(scatter_sums(whole, data, way))
        # No bf16 number holds the sums.
        found["wide"].append(scatter_sums(whole.bfloat16(), data, way, torch.float32))
    return found


def train(
    case: dict[str, Any], world: Any, data: Any, tensor: Any, nodes: Any, resume: Path | None = None
) -> dict[str, Any]:
    """Some steps of two micro-steps each; what this rank saw."""
    place = place_of(world, data, tensor, nodes)
    head = build_head(case["config"], case["classes"], DIM, place, seed=3, chunk_bytes=case["chunk_bytes"])
    if case["config"].near_classes:
        head.spare_near(torch.randn((case["classes"], 4), generator=torch.Generator().manual_seed(0)))
    first = 0
    if resume is not None:
        head.load(reader(resume, "separated, cosface, 4 labels, rate 0.2"))
        first = STEPS
    found: dict[str, list[Any]] = {"loss": [], "features": [], "centers": [], "norm": [], "metrics": []}
    for step in range(first, first + STEPS):
        for micro_step in range(2):
            features, labels, rows = micro_batch(case, step, micro_step, data)
            # The head's own gather or, as for two heads, one that was made before.
            targets = targets_of(head, labels, rows, step, micro_step * ROWS, case["draw_rows"])
            result = head.score(GatheredFeatures(features, place), targets)
            (result.sum / (2 * ROWS)).backward()
            found["loss"].append(result.sum.detach())
            found["metrics"].append({name: float(value) for name, value in result.metrics.items()})
            found["features"].append(features.grad / data.size())
        found["norm"].append(head.grad_norm_squared())
        found["centers"].append(dense_center_gradient(head))
        head.step(0.01)
        head.zero_grad()
    census = head.find_dead_classes(step=first + STEPS, idle_steps=1, threshold=0.5)
    found["census"] = [census.idle, census.probed, [line[:2] for line in census.doubles]]
    return {**found, "state": {name: tuple(piece) for name, piece in head.state().items()}}


def micro_batch(case: dict[str, Any], step: int, micro_step: int, data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows of a micro-step whose global rows are the same in every layout."""
    generator = torch.Generator().manual_seed(1000 * step + micro_step)
    features = torch.randn((ROWS, DIM), generator=generator)
    labels = torch.randint(-1, case["classes"], (ROWS, case["labels"]), generator=generator)
    labels[:, 0] = labels[:, 0].clamp_min(0)
    rows = torch.rand(ROWS, generator=generator) < 0.7
    share = ROWS // data.size()
    features, labels, rows = (whole.split(share)[data.rank()] for whole in (features, labels, rows))
    return features.clone().requires_grad_(), labels, rows


def reader(saved: Path, case: str) -> Callable[[str, Sequence[int], Sequence[int]], Tensor]:
    """Any piece of what all ranks of a layout held at the end of a case."""
    files = sorted(saved.parent.glob(f"{saved.name}-*.pt"))
    pieces = [torch.load(file, weights_only=True)[case]["state"] for file in files]

    def read(name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        full = torch.cat([piece[name][2] for piece in pieces])
        assert full.shape == pieces[0][name][0]
        return full[offset[0] : offset[0] + shape[0]]

    return read


def refuse(world: Any, data: Any) -> list[str]:
    """Errors that this rank reports when only the last rank's rows are wrong."""
    messages = []
    for broken in ("label", "feature"):
        head = build_head(HeadConfig(), 9, DIM, place_of(world, data), seed=3)
        features, labels = torch.ones((2, DIM)), torch.zeros((2, 1), dtype=torch.int64)
        if data.rank() == data.size() - 1:
            labels[1] = 9 if broken == "label" else 0
            features[1, 2] = 1.0 if broken == "label" else float("nan")
        try:
            loss_of(head, features.requires_grad_(), labels, torch.ones(2, dtype=torch.bool), 0)
        except UserError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    launch(on_rank, RANKS, str(folder))
    return folder


def pieces(results: Path, layout: str) -> list[dict[str, Any]]:
    return [torch.load(file, weights_only=True) for file in sorted(results.glob(f"{layout}-*.pt"))]


def assert_agrees(found: list[dict[str, Any]], expected: dict[str, Any], tensor: int) -> None:
    """Ranks of a layout together against the one rank of another."""
    for one, other in zip(found[0]["loss"], expected["loss"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for rank in found:
        assert rank["census"] == expected["census"]
        assert [float(loss) for loss in rank["loss"]] == [float(loss) for loss in found[0]["loss"]]
        assert rank["metrics"] == [pytest.approx(metrics, abs=1e-5) for metrics in expected["metrics"]]
        torch.testing.assert_close(rank["norm"], expected["norm"], rtol=1e-4, atol=1e-6)
    for number, features in enumerate(expected["features"]):
        together = torch.cat([rank["features"][number] for rank in found[::tensor]])
        torch.testing.assert_close(together, features, rtol=1e-4, atol=1e-5)
        for rank, whole in enumerate(found):
            same = found[rank - rank % tensor]["features"][number]
            assert torch.equal(whole["features"][number], same), (
                "tensor-parallel ranks must agree bit for bit"
            )
    for number, centers in enumerate(expected["centers"]):
        together = torch.cat([rank["centers"][number] for rank in found])
        torch.testing.assert_close(together, centers, rtol=1e-4, atol=1e-5)
    for name, (shape, _, whole) in expected["state"].items():
        together = torch.cat([rank["state"][name][2] for rank in found])
        assert all(tuple(rank["state"][name][0]) == tuple(shape) for rank in found)
        torch.testing.assert_close(together, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_ranks_together_equal_one_rank(results: Path, layout: str, case: str) -> None:
    found = [rank[case] for rank in pieces(results, layout)]
    assert len(found) == world_size(layout)
    assert_agrees(found, pieces(results, "one")[0][case], LAYOUTS[layout][1])


def test_near_classes_were_there_and_make_a_difference(results: Path) -> None:
    [one] = pieces(results, "one")
    spared, plain = (one[name]["loss"] for name in ("near classes", "separated, cosface, 4 labels, rate 0.2"))
    assert all(less < more for less, more in zip(spared, plain, strict=True))


@pytest.mark.parametrize("saved", ["one", "three", "four", "two by two"])
def test_a_head_saved_on_some_ranks_goes_on_on_others(results: Path, saved: str) -> None:
    others = [name for name in ("one", "three", "four", "two by two") if name not in (saved, "one")]
    reference = "one" if saved != "one" else "three"
    [expected] = [_whole(pieces(results, f"{saved} to {reference}"))]
    for loaded in others if saved != "one" else others[1:]:
        assert_agrees(pieces(results, f"{saved} to {loaded}"), expected, LAYOUTS[loaded][1])


def test_rows_that_go_node_by_node_come_in_the_same_order_with_the_same_sums(results: Path) -> None:
    for found in pieces(results, "ways"):
        for way in ("gather", "scatter", "wide"):
            flat, by_node = found[way]
            assert torch.equal(flat, by_node)
    numbers = [found["gather"][1] for found in pieces(results, "ways")]
    assert all(torch.equal(one, numbers[0]) for one in numbers)
    assert len(numbers[0]) == 16


def test_rows_in_bf16_add_up_in_fp32_if_they_are_asked_to(results: Path) -> None:
    parts = [torch.Generator().manual_seed(rank) for rank in range(4)]
    for part in parts:
        torch.randint(0, 1000, (4, 2, 3), generator=part)  # What both_ways drew first.
    whole = [torch.randint(0, 1000, (16, 3), generator=part).float().bfloat16().float() for part in parts]
    expected = torch.stack(whole).sum(0)
    assert not torch.equal(expected.bfloat16().float(), expected)
    wide = [found["wide"][0] for found in pieces(results, "ways")]
    assert wide[0].dtype == torch.float32
    assert torch.equal(torch.cat(wide), expected)


def test_rows_go_node_by_node_only_between_equal_nodes_of_several_ranks(results: Path) -> None:
    for found in pieces(results, "told"):
        assert found["cut"] == [True, False, False, False]


@pytest.mark.parametrize(("ranks", "tensor", "per_node"), [(64, 1, 8), (64, 2, 8), (64, 4, 8), (12, 1, 4)])
def test_groups_by_nodes_cut_each_data_group_in_the_order_of_its_ranks(
    ranks: int, tensor: int, per_node: int
) -> None:
    found = topology.node_lists(ranks, tensor, per_node)
    assert found is not None
    inside, between = found
    for first in range(tensor):
        members = list(range(first, ranks, tensor))
        own = [group for group in inside if group[0] % tensor == first]
        assert [rank for group in own for rank in group] == members
        assert all(len({rank // per_node for rank in group}) == 1 for group in own)
        places = [group for group in between if group[0] % tensor == first]
        assert places == [list(place) for place in zip(*own, strict=True)]


@pytest.mark.parametrize(
    ("ranks", "tensor", "per_node"), [(8, 8, 8), (64, 8, 8), (8, 1, 1), (8, 1, 3), (8, 4, 2)]
)
def test_nothing_is_cut_by_nodes_that_hold_less_than_two_copies(
    ranks: int, tensor: int, per_node: int
) -> None:
    assert topology.node_lists(ranks, tensor, per_node) is None


def _whole(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Join a layout without tensor parallelism as if one rank had held it."""
    count = len(ranks[0]["features"])
    return {
        **ranks[0],
        "features": [torch.cat([rank["features"][number] for rank in ranks]) for number in range(count)],
        "centers": [torch.cat([rank["centers"][number] for rank in ranks]) for number in range(STEPS)],
        "state": {
            name: (shape, (0,), torch.cat([rank["state"][name][2] for rank in ranks]))
            for name, (shape, _, _) in ranks[0]["state"].items()
        },
    }


def test_every_rank_refuses_what_one_rank_got_wrong(results: Path) -> None:
    """Or the others would wait for it for ever."""
    for errors in pieces(results, "errors"):
        label, feature = errors["four"]
        assert "label 9 of row 7" in label
        assert "rows 7 of the micro-step" in feature


def test_a_torch_that_does_not_know_the_collectives_new_names_gives_them_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As 2.11 and 2.12."""
    for name in ("all_gather_single", "reduce_scatter_single"):
        monkeypatch.delattr(dist, name)
    found = runpy.run_path(str(repository() / "megaregion" / "parallel" / "topology.py"))
    assert found["all_gather"] is dist.all_gather_into_tensor
    assert found["reduce_scatter"] is dist.reduce_scatter_tensor
