"""The classes nearest to a feature, over all ranks, in chunks of classes.

Shapes: R rows, E embedding width, k classes wanted.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.heads.lengths import inverse_lengths, unit_scale

CHUNK = 8192
"""Classes ranked at a time."""


@torch.no_grad()
def nearest_classes(
    features: Tensor, weight: Tensor, local: range, group: dist.ProcessGroup, k: int
) -> tuple[Tensor, Tensor]:
    """Find the k classes whose centers are most like each feature.

    Args:
        features: Region embeddings, the same on every rank, [R, E].
        weight: Centers of this rank, [len(local), E].
        local: This rank's classes.
        group: All ranks.
        k: Classes wanted; no more than there are over all ranks.

    Returns:
        Falling cosines and their classes, both [R, k], the same on every rank.
    """
    unit = features.to(weight.dtype)
    unit = unit * unit_scale(unit)
    cosines = unit.new_full((len(unit), k), -2.0)
    classes = torch.full_like(cosines, -1, dtype=torch.int64)
    for start in range(0, len(weight), CHUNK):
        part = weight[start : start + CHUNK]
        found = (unit @ part.T) * inverse_lengths(part)
        numbers = torch.arange(len(part), device=weight.device) + local.start + start
        cosines, classes = _best(cosines, classes, found, numbers.expand_as(found), k)
    gathered = cosines.new_empty((group.size() * len(unit), k))
    numbers = classes.new_empty((group.size() * len(unit), k))
    dist.all_gather_single(gathered, cosines, group=group)
    dist.all_gather_single(numbers, classes, group=group)
    shape = (group.size(), len(unit), k)
    wide, wide_numbers = (x.view(shape).transpose(0, 1).flatten(1) for x in (gathered, numbers))
    return _best(wide[:, :0], wide_numbers[:, :0], wide, wide_numbers, k)


def _best(cosines: Tensor, classes: Tensor, more: Tensor, numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    together = torch.cat([cosines, more], 1)
    top, place = together.topk(min(k, together.shape[1]), dim=1)
    return top, torch.cat([classes, numbers], 1).gather(1, place)
