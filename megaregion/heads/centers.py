"""Centers of classes: their first values, their norms, and those that do no work any more.

First values are random or made from k-means centers, the same for any sharding. Two kinds of classes waste
capacity: one that no region shows any more, and two whose centers have become alike and push each other
apart.

Shapes: K classes over all ranks, C width of given centers, n probed centers, E embedding width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.heads.sampling import class_hashes, draw_key
from megaregion.heads.tiles import lines_at_a_time

BLOCK = 1024
"""Classes that share one random generator."""


def random_centers(seed: int, name: str, local: range, dim: int) -> Tensor:
    """Gaussian centers of length about 1 for the classes ``local`` of head ``name``, float32 [len(local), E].

    Each block of classes has a generator of its own, so a class's center does not depend on the range.
    """
    centers = torch.empty((len(local), dim))
    for block in range(local.start // BLOCK, -(-local.stop // BLOCK) if len(local) else 0):
        drawn = torch.randn((BLOCK, dim), generator=_generator(seed, f"{name}/{block}"))
        first = block * BLOCK
        start, stop = max(local.start, first), min(local.stop, first + BLOCK)
        centers[start - local.start : stop - local.start] = drawn[start - first : stop - first]
    return centers.mul_(dim**-0.5)


def given_centers(centers: np.ndarray | Tensor, seed: int, name: str, local: range, dim: int) -> Tensor:
    """Unit centers of the classes ``local`` from given ones [K, C], float32 [len(local), E].

    Of a memory map only the range is read. Where the widths differ the centers are mapped by one fixed random
    matrix with orthonormal columns or rows (the Q of a Gaussian matrix under ``seed``): wider keeps all
    angles, narrower keeps them on average.
    """
    part = torch.from_numpy(np.array(centers[local.start : local.stop], dtype=np.float32))
    width = part.shape[1]
    if width != dim:
        gaussian = torch.randn(
            (max(width, dim), min(width, dim)), generator=_generator(seed, f"{name}/map"), dtype=torch.float64
        )
        ortho = torch.linalg.qr(gaussian).Q.float()
        part = part @ (ortho if width > dim else ortho.T)
    return torch.nn.functional.normalize(part, dim=1)


def _generator(seed: int, place: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/centers/{place}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def inverse_norms(centers: Tensor) -> Tensor:
    """1 / length of centers [C, E], [C]; 1 for one shorter than 1e-8, which thus scores 0 and can grow."""
    lengths = torch.linalg.vector_norm(centers, dim=1)
    return torch.where(lengths > 1e-8, lengths.reciprocal(), 1.0)


def normalise(centers: Tensor) -> Tensor:
    """Divide centers [C, E] by their lengths in place, as ``inverse_norms`` has them; return them."""
    for part in centers.split(lines_at_a_time(centers)) if len(centers) else ():
        part.mul_(inverse_norms(part)[:, None])
    return centers


CHUNK = 8192
"""Centers compared with the probed ones at a time."""
SHOWN = 5
"""Pairs of doubles that a report names."""


@dataclass(frozen=True)
class DeadClasses:
    """What was found; the same on every rank."""

    idle: int
    """Classes that were nobody's positive for the given number of steps."""
    probed: int
    """Centers whose doubles were looked for."""
    doubles: tuple[tuple[int, int, float], ...]
    """Probed class, the other center most like it, and their cosine, where it is above the threshold."""

    def report(self, head: str, classes: int, idle_steps: int) -> str:
        """One line for the log of a head of so many classes."""
        pairs = ", ".join(f"{one} ~ {other} ({cosine:.2f})" for one, other, cosine in self.doubles[:SHOWN])
        more = ", ..." if len(self.doubles) > SHOWN else ""
        return (
            f"head {head}: {self.idle} of {classes} classes had no region in the last {idle_steps} steps; "
            f"{len(self.doubles)} of {self.probed} probed centers have a double"
            f"{f' ({pairs}{more})' if pairs else ''}"
        )


@torch.no_grad()
def find_doubles(
    weight: Tensor,
    local: range,
    classes: int,
    group: dist.ProcessGroup,
    step: int,
    probes: int,
    threshold: float,
) -> tuple[int, tuple[tuple[int, int, float], ...]]:
    """Look for centers of a cosine above ``threshold``; a collective.

    All pairs of a million centers are too many: a random sample of ``probes``, another one in each step,
    reaches other centers each time.

    Returns:
        Number of probed centers, and the doubles as in :class:`DeadClasses`.
    """
    hashes = class_hashes(draw_key(0, "census", step, 0), 0, classes, weight.device)
    chosen = hashes.topk(min(probes, classes), largest=False).indices.sort().values
    unit = weight * inverse_norms(weight)[:, None] if len(weight) else weight
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
    return len(chosen), tuple(line for line in found if line[2] > threshold)


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
