"""First values of the centers: random, or from k-means centers; the same for any sharding.

Shapes: K classes, E embedding width, C width of the given centers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024
"""Classes that share one random generator."""


def random_centers(seed: int, name: str, local: range, dim: int) -> Tensor:
    """Gaussian centers of length about 1 for a range of classes, float32 [len(local), E].

    Each block of classes has a generator of its own, so a class's center does not depend on the range.

    Args:
        seed: Seed of the run.
        name: Name of the head.
        local: Class numbers.
        dim: E.
    """
    centers = torch.empty((len(local), dim))
    for block in range(local.start // BLOCK, -(-local.stop // BLOCK) if len(local) else 0):
        drawn = torch.randn((BLOCK, dim), generator=_generator(seed, f"{name}/{block}"))
        first = block * BLOCK
        start, stop = max(local.start, first), min(local.stop, first + BLOCK)
        centers[start - local.start : stop - local.start] = drawn[start - first : stop - first]
    return centers.mul_(dim**-0.5)


def given_centers(centers: np.ndarray | Tensor, seed: int, name: str, local: range, dim: int) -> Tensor:
    """Unit centers from given ones, float32 [len(local), E].

    Where the widths differ the centers are mapped by one fixed random matrix with orthonormal columns or
    rows (the Q of a Gaussian matrix under ``seed``): wider keeps all angles, narrower keeps them on average.

    Args:
        centers: Given centers, [K, C]; may be a memory map, of which only the range is read.
        seed: Seed of the map.
        name: Name of the head.
        local: Class numbers.
        dim: E.
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
