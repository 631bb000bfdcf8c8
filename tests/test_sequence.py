"""Sequence parallelism by itself, in fp64: linears, norms and streams of three ranks against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import launch
from torch import Tensor, nn

from megaregion.parallel.tensor_parallel import CutStream, shared_linear, sum_over_ranks

RANKS, WIDTH, HIDDEN = 3, 8, 12
TOKENS = {"divided": (2, 6), "one row over": (1, 7), "fewer than ranks": (1, 2)}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Residual(nn.Module):
    """A norm and two linears around which tokens pass, as in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.double()
        for number, parameter in enumerate(self.parameters()):
            parameter.data = noise(*parameter.shape, seed=number)


class Whole(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(self.norm(x))))


class Cut(Residual):
    """The same on one rank of several: its rows of the first linear, its columns of the second."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.stream = group, CutStream(group)
        own = slice(group.rank() * HIDDEN // RANKS, (group.rank() + 1) * HIDDEN // RANKS)
        self.first.weight.data, self.first.bias.data = self.first.weight.data[own], self.first.bias.data[own]
        self.second.weight.data = self.second.weight.data[:, own]

    def forward(self, x: Tensor) -> Tensor:
        part = self.stream.scatter(x)
        shared = self.group.group_name
        rows = shared_linear(self.norm(part), self.first.weight, self.first.bias, shared, column=True)
        hidden = F.gelu(rows)[: x.shape[0] * x.shape[1]]
        part = part + shared_linear(hidden, self.second.weight, self.second.bias, shared, column=False)
        return self.stream.gather(part, *x.shape[:2])


def _three_ranks(folder: str) -> None:
    dist.init_process_group("gloo")
    group, reduced = dist.group.WORLD, []
    assert group is not None
    plain = dist.all_reduce
    for name, (images, tokens) in TOKENS.items():
        model = Cut(group)
        sum_over_ranks(model, ["norm.weight", "norm.bias"], group)
        x = noise(images, tokens, WIDTH, seed=9).requires_grad_()
        y = model(x)
        reduced.clear()
        dist.all_reduce = lambda *a, **k: reduced.append(a) or plain(*a, **k)
        (y * noise(images, tokens, WIDTH, seed=10)).sum().backward()
        dist.all_reduce = plain
        found = {n: p.grad for n, p in model.named_parameters()} | {"x": x.grad, "y": y.detach()}
        torch.save((found, len(reduced), "weight" in vars(model.norm)), f"{folder}/{name}-{dist.get_rank()}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequence")
    launch(_three_ranks, RANKS, str(folder))
    return folder


@pytest.mark.parametrize("name", TOKENS)
def test_cut_tokens_give_the_values_and_gradients_of_whole_ones(name: str, three_ranks: Path) -> None:
    whole = Whole()
    x = noise(*TOKENS[name], WIDTH, seed=9).requires_grad_()
    y = whole(x)
    (y * noise(*TOKENS[name], WIDTH, seed=10)).sum().backward()
    expected = {n: p.grad for n, p in whole.named_parameters()} | {"x": x.grad, "y": y.detach()}
    ranks = [torch.load(three_ranks / f"{name}-{rank}", weights_only=True)[0] for rank in range(RANKS)]
    joined = {key: [rank[key] for rank in ranks] for key in expected}
    for key, axis in (("first.weight", 0), ("first.bias", 0), ("second.weight", 1)):
        joined[key] = [torch.cat(joined[key], dim=axis)]
    for key, found in joined.items():
        for own in found:
            torch.testing.assert_close(own, expected[key], rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", TOKENS)
def test_one_collective_sums_the_gradients_of_all_norms_and_nothing_is_left_behind(
    name: str, three_ranks: Path
) -> None:
    for rank in range(RANKS):
        _, sums, left = torch.load(three_ranks / f"{name}-{rank}", weights_only=True)
        assert (sums, left) == (1, False)
