"""Muon: the blocks' matrices move along their orthogonalised momentum, all else as AdamW moves it.

    momentum of this rank's parts -> all-to-all -> whole matrices at their owners: orthogonalise
    -> all-to-all -> this rank's parts move

After Jordan et al., Muon (2024), with the scale of Liu et al., Muon is Scalable for LLM Training (2025), by
which an update has the size of AdamW's and one learning rate serves both. ZeRO cuts the flattened matrices
anywhere, and tensor parallelism their rows or columns, but the orthogonal factor belongs to a whole matrix.
So each matrix has an owner among the ranks, which all have about as much to do, and nothing is computed
twice. The parts travel in the type of the products, which loses nothing.

DeepSpeed's Muon puts the update in the gradient's place, so that guard and clipping would judge updates; it
knows no tensor parallelism, and each data rank orthogonalises what it has a part of. megatron-core's refuses
partitioned states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.parallel.tensor_parallel import Placement
from megaregion.parallel.topology import Group

MOMENTUM = 0.95
"""What a step leaves of the momentum, which looks ahead (Nesterov)."""
ITERATIONS = 5
"""Of Newton and Schulz."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5: singular values end between 0.7 and 1.2, which is near enough."""
SIZE = 0.2
"""Root mean square of AdamW's updates."""


class Fused(NamedTuple):
    """How a weight holds matrices: its rows are laid out (groups, matrices, rows)."""

    matrices: int
    rows: int

    def apart(self, weight: Tensor) -> Tensor:
        """Its matrices, [matrices, groups * rows, columns], of one that is whole."""
        return weight.unflatten(0, (-1, self.matrices, self.rows)).transpose(0, 1).flatten(1, 2)

    def together(self, matrices: Tensor) -> Tensor:
        """The weight of its matrices."""
        return matrices.unflatten(1, (-1, self.rows)).transpose(0, 1).flatten(0, 2)

    def shape(self, weight: Sequence[int]) -> tuple[int, int]:
        """Of one matrix."""
        return weight[0] // self.matrices, weight[1]


@dataclass(frozen=True)
class Matrix:
    """A weight that Muon moves, and which parts of it the ranks hold."""

    fused: Fused
    places: tuple[Placement, ...]
    """Of each tensor rank's tensor."""
    owner: int
    """The rank that orthogonalises it."""
    runs: tuple[tuple[int, int], ...]
    """Start and length of each rank's run of its flattened tensor."""

    @property
    def scale(self) -> float:
        """Factor of the learning rate."""
        return SIZE * math.sqrt(max(self.fused.shape(self.places[0].full_shape)))


def flops(rows: int, columns: int) -> int:
    """Operations that orthogonalise one matrix."""
    short, long = sorted((rows, columns))
    return ITERATIONS * (4 * short * short * long + 2 * short**3)


@torch.no_grad()
def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest matrix, [m, n], whose singular values are about 1, by products in its type."""
    a, b, c = COEFFICIENTS
    found = matrix.T if len(matrix) > matrix.shape[1] else matrix
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if len(matrix) > matrix.shape[1] else found


class Muon:
    """Moves groups of AdamW's parameters in its place: those whose ``muon`` names their matrices."""

    def __init__(self, matrices: Mapping[str, Matrix], ranks: Group, dtype: torch.dtype) -> None:
        """Of matrices by name, which these ranks hold and own; ``dtype`` is that of the products."""
        self._matrices, self._ranks, self._dtype = matrices, ranks, dtype

    @torch.no_grad()
    def before_step(self, adamw: torch.optim.Optimizer, *_: Any) -> None:
        """Move them if they have gradients, and take these away, so that AdamW passes over; a collective."""
        for group in adamw.param_groups:
            if group["muon"] and group["params"][0].grad is not None:
                self._move(group, adamw)
                for held in group["params"]:
                    held.grad = None

    def _move(self, group: dict[str, Any], adamw: torch.optim.Optimizer) -> None:
        held, matrices = group["params"], [self._matrices[name] for name in group["muon"]]
        lengths = [matrix.runs[self._ranks.rank()][1] for matrix in matrices]
        gradients = [one.grad for one in held]
        momenta = [adamw.state[one]["exp_avg"] for one in held]
        if (scale := getattr(adamw, "grad_scale", None)) is not None:
            torch._foreach_div_(gradients, scale)
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = [g.lerp(m, MOMENTUM).to(self._dtype) for g, m in zip(gradients, momenta, strict=True)]
        updates = self._exchange(_parts(ahead, lengths), matrices)
        torch._foreach_mul_(held, 1 - group["lr"] * group["weight_decay"])
        for weight, update, matrix in zip(_parts(held, lengths), updates, matrices, strict=True):
            if len(update):
                weight.add_(update, alpha=-group["lr"] * matrix.scale)

    def _exchange(self, parts: list[Tensor], matrices: list[Matrix]) -> list[Tensor]:
        """This rank's parts of the matrices to those of their orthogonal factors."""
        ranks, own = range(self._ranks.size()), self._ranks.rank()
        by_owner = sorted(range(len(matrices)), key=lambda number: matrices[number].owner)
        owned = [matrix for matrix in matrices if matrix.owner == own]
        sizes = [sum(one.runs[own][1] for one in matrices if one.owner == rank) for rank in ranks]
        owned_sizes = [sum(one.runs[rank][1] for one in owned) for rank in ranks]
        arrived = self._all_to_all(torch.cat([parts[number] for number in by_owner]), sizes, owned_sizes)
        by_rank = arrived.split([one.runs[rank][1] for rank in ranks for one in owned])
        for number, matrix in enumerate(owned):
            _orthogonalise(matrix, by_rank[number :: len(owned)])
        back = self._all_to_all(arrived, owned_sizes, sizes)
        found = dict(zip(by_owner, back.split([len(parts[number]) for number in by_owner]), strict=True))
        return [found[number] for number in range(len(matrices))]

    def _all_to_all(self, sent: Tensor, sizes: list[int], received: list[int]) -> Tensor:
        if len(sizes) == 1:
            return sent
        arrived = sent.new_empty(sum(received))
        dist.all_to_all_single(arrived, sent, received, sizes, group=self._ranks)
        return arrived


def _parts(held: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Flat views of what a rank holds of each matrix, of tensors of their own or of one padded flat piece."""
    if len(held) > 1:
        return [one.flatten() for one in held]
    return list(held[0].view(-1)[: sum(lengths)].split(list(lengths)))


def _orthogonalise(matrix: Matrix, parts: Sequence[Tensor]) -> None:
    """Put the orthogonal factors in the place of a matrix's parts, one of each rank."""
    whole = parts[0].new_empty(matrix.places[0].full_shape)
    boxes = [
        box
        for rank, ((start, _), part) in enumerate(zip(matrix.runs, parts, strict=True))
        for box in matrix.places[rank % len(matrix.places)].boxes(start, part)
    ]
    for place, values in boxes:
        place.shard(whole).copy_(values)
    factors = torch.stack([orthogonalised(one) for one in matrix.fused.apart(whole)])
    whole = matrix.fused.together(factors)
    for place, values in boxes:
        values.copy_(place.shard(whole))


def shared_out(
    groups: Iterable[tuple[Mapping[str, tuple[Fused, Placement]], int]], tensor: int, data: int
) -> dict[str, Matrix]:
    """Who holds and who owns what of some groups' matrices.

    Args:
        groups: Of each group of parameters, in order, how each weight holds matrices and this rank's place in
            it; and of how many numbers a data rank's flat piece of the group is.
        tensor: Tensor ranks, which lie next to each other.
        data: Ranks that share the flattened groups.
    """
    busy, found = [0] * (tensor * data), dict[str, Matrix]()
    for weights, size in groups:
        offset = 0
        for name, (fused, place) in weights.items():
            end = offset + math.prod(place.shape)
            cuts = [min(max(size * rank, offset), end) - offset for rank in range(data + 1)]
            runs = tuple((a, b - a) for a, b in pairwise(cuts) for _ in range(tensor))
            owner = busy.index(min(busy))
            busy[owner] += fused.matrices * flops(*fused.shape(place.full_shape))
            found[name] = Matrix(fused, place.of_all(tensor), owner, runs)
            offset = end
    return found
