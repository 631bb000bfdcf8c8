"""Centers that do no work: classes that no region shows any more, and centers that have become alike.

Both waste capacity: an idle class is only ever a negative, and two centers of one concept push apart what
belongs together. Idleness is known exactly; likeness is measured for a random sample of centers against
all, since all pairs of a million centers are too many.

Shapes: K classes over all ranks, n probed centers, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.heads.lengths import inverse_lengths
from megaregion.heads.sampling import class_hashes, draw_key

CHUNK = 8192
"""Centers compared with the probed ones at a time."""
SHOWN = 5
"""Pairs of doubles that a report names."""


@dataclass(frozen=True)
class Census:
    """What was found; the same on every rank."""

    idle: int
    """Classes that were nobody's positive for the given number of steps."""
    probed: int
    """Centers whose likes were looked for."""
    alike: tuple[tuple[int, int, float], ...]
    """Probed class, the other center most like it, and their cosine, where it is above the threshold."""

    def report(self, head: str, classes: int, patience: int) -> str:
        """One line for the log.

        Args:
            head: Name of the head.
            classes: K.
            patience: Steps after which a class counts as idle.
        """
        pairs = ", ".join(f"{one} ~ {other} ({cosine:.2f})" for one, other, cosine in self.alike[:SHOWN])
        more = ", ..." if len(self.alike) > SHOWN else ""
        return (
            f"head {head}: {self.idle} of {classes} classes had no region in the last {patience} steps; "
            f"{len(self.alike)} of {self.probed} probed centers have a double"
            f"{f' ({pairs}{more})' if pairs else ''}"
        )


@torch.no_grad()
def take_census(
    weight: Tensor,
    last_positive: Tensor,
    local: range,
    classes: int,
    group: dist.ProcessGroup,
    step: int,
    patience: int,
    probes: int,
    threshold: float,
) -> Census:
    """Count idle classes and look for centers that are alike.

    Args:
        weight: Centers of this rank, [len(local), E].
        last_positive: Step at which each was last a positive, -1 for never, [len(local)].
        local: This rank's classes.
        classes: K.
        group: All ranks.
        step: Present step.
        patience: Steps after which a class counts as idle.
        probes: Centers to probe.
        threshold: Cosine above which two centers are alike.
    """
    idle = (last_positive < step - patience).sum()
    dist.all_reduce(idle, group=group)
    hashes = class_hashes(draw_key(0, "census", step, 0), 0, classes, weight.device)
    chosen = hashes.topk(min(probes, classes), largest=False).indices.sort().values
    unit = weight * inverse_lengths(weight)[:, None] if len(weight) else weight
    here = (chosen >= local.start) & (chosen < local.stop)
    probed = weight.new_zeros((len(chosen), weight.shape[1]))
    probed[here] = unit[chosen[here] - local.start]
    dist.all_reduce(probed, group=group)
    cosine, other = _nearest(probed, chosen, unit, local)
    top = cosine.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    other = torch.where(cosine == top, other, -1)
    dist.all_reduce(other, op=dist.ReduceOp.MAX, group=group)
    found = zip(chosen.tolist(), other.tolist(), top.tolist(), strict=True)
    return Census(int(idle), len(chosen), tuple(line for line in found if line[2] > threshold))


def _nearest(probed: Tensor, chosen: Tensor, unit: Tensor, local: range) -> tuple[Tensor, Tensor]:
    """Best cosine of each probed center with another one of this rank, and which that is."""
    best = probed.new_full((len(probed),), -2.0)
    other = torch.full_like(chosen, -1)
    for start in range(0, len(unit), CHUNK):
        cosines = probed @ unit[start : start + CHUNK].T
        own = chosen - local.start - start
        inside = (own >= 0) & (own < cosines.shape[1])
        cosines[inside, own[inside]] = -2.0
        top, place = cosines.max(1)
        better = top > best
        best = torch.where(better, top, best)
        other = torch.where(better, place + local.start + start, other)
    return best, other
