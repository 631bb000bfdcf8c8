"""The heads that ours is measured against, written here after what the peers' users run.

Both compute a softmax with the CosFace margin over L2-normalised rows and centers and use a dense AdamW,
as ours does with ``loss: softmax``.

Shapes: r rows on this rank, R rows over all ranks, K classes, n classes sampled on this rank,
E embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class DenseHead(nn.Module):
    """All logits at once, as one would write it in five lines."""

    def __init__(self, classes: int, dim: int, margin: float, scale: float, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((classes, dim), device=device).mul_(0.01))
        self._margin, self._scale = margin, scale

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of rows [R, E] with labels [R]."""
        logits = F.linear(F.normalize(features), F.normalize(self.weight))
        rows = torch.arange(len(labels), device=labels.device)
        logits[rows, labels] -= self._margin
        return F.cross_entropy(logits * self._scale, labels)


class PartialFCHead(nn.Module):
    """Sampled softmax over class shards in the manner of PartialFC.

    Kept from it: every rank samples its own rate of its classes with all positives among them, the sampled
    centers are taken by index (so their gradient is dense), the fp32 logits are stored, and the
    cross-entropy turns them into probabilities in place. Not kept, since it only slows it down: the
    dense one-hot matrix of its backward and the ``.item()`` there.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        sample_rate: float,
        margin: float,
        scale: float,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__()
        share = -(-classes // group.size())
        self._start = min(group.rank() * share, classes)
        local = min(share, classes - self._start)
        self.weight = nn.Parameter(torch.randn((local, dim), device=device).mul_(0.01))
        self._sampled = max(1, int(sample_rate * local))
        self._margin, self._scale, self._group = margin, scale, group

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of all ranks' rows; features [r, E], labels [r]."""
        features = _Gather.apply(features, self._group)
        gathered = labels.new_empty(len(labels) * self._group.size())
        dist.all_gather_single(gathered, labels, group=self._group)
        here = (gathered >= self._start) & (gathered < self._start + len(self.weight))
        columns = torch.where(here, gathered - self._start, -1)
        weight: Tensor = self.weight
        if self._sampled < len(self.weight):
            index, columns = self._sample(columns, here)
            weight = self.weight[index]
        logits = F.linear(F.normalize(features), F.normalize(weight)).clamp(-1, 1)
        rows = here.nonzero().squeeze(1)
        logits[rows, columns[rows]] -= self._margin
        return _CrossEntropy.apply(logits * self._scale, columns, rows, self._group)

    def _sample(self, columns: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        positives = columns[here].unique()
        index = positives
        if len(positives) <= self._sampled:
            order = torch.rand(len(self.weight), device=columns.device)
            order[positives] = 2.0
            index = order.topk(self._sampled).indices.sort().values
        columns = columns.clone()
        columns[here] = torch.searchsorted(index, columns[here])
        return index, columns


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty((len(rows) * group.size(), rows.shape[1]))
        dist.all_gather_single(gathered, rows.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group: dist.ProcessGroup = ctx.group
        dist.all_reduce(gradient, group=group)
        own = gradient.chunk(group.size())[group.rank()]
        return own * group.size(), None


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over class shards; the logits are overwritten by their probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        top = logits.amax(1, keepdim=True)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        logits.sub_(top).exp_()
        mass = logits.sum(1, keepdim=True)
        dist.all_reduce(mass, group=group)
        logits.div_(mass)
        found = logits.new_zeros(len(logits))
        found[rows] = logits[rows, columns[rows]]
        dist.all_reduce(found, group=group)
        ctx.save_for_backward(logits, columns, rows)
        return -found.clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, columns, rows = ctx.saved_tensors
        logits[rows, columns[rows]] -= 1
        return logits.mul_(by_loss / len(logits)), None, None, None
