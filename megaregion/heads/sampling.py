"""Which negatives a draw holds: a function of (seed, step, group, head, class), never of ranks.

A *draw* is the set of classes that one group of rows is scored against: the positives of the group's
rows, always, and each other class if its hash lies under a threshold. The hash knows the class by its
global number, so a rank finds its part of the draw alone and any sharding finds the same draw.

The floor: at least ``min_negatives`` classes that are no row's positive are drawn (all of them, if
there are fewer), however many classes the positives take. When the rate alone gives that many with
probability 1 - 1e-15, nothing more is done; when it may not, the threshold is raised to the hash of rank
``min_negatives`` among all K classes that are not positive, which every rank computes for itself.
Both depend on counts that all ranks know, so they hold for any number of ranks.

Shapes: K classes in all, C classes in the draw on this rank, R rows, T labels of a row.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

HASH_SPAN = 2**32
"""Hashes are the integers [0, HASH_SPAN), held in int64."""


def draw_key(seed: int, name: str, step: int, group: int) -> int:
    """The 64-bit key of one draw.

    Args:
        seed: Seed of the run.
        name: Name of the head.
        step: Optimizer step.
        group: Number of the group of rows within the step.
    """
    text = f"{seed}/{name}/{step}/{group}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def class_hashes(key: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Hashes of the classes [start, stop) under a key, int64 in [0, HASH_SPAN), [stop - start].

    Two rounds of a 32-bit finaliser (Wellons' lowbias32), each keyed by one half of the key.
    """
    word = torch.arange(start, stop, dtype=torch.int64, device=device)
    for half in (key & 0xFFFFFFFF, key >> 32):
        word.bitwise_xor_(half)
        word.bitwise_xor_(word >> 16).mul_(0x7FEB352D).bitwise_and_(0xFFFFFFFF)
        word.bitwise_xor_(word >> 15).mul_(0x846CA68B).bitwise_and_(0xFFFFFFFF)
        word.bitwise_xor_(word >> 16)
    return word


def drawn_classes(
    key: int, classes: int, local: range, labels: Tensor, rate: float, min_negatives: int
) -> Tensor | None:
    """The part of a draw that lies in a rank's class range.

    Args:
        key: Key of the draw.
        classes: Number K of classes over all ranks.
        local: The rank's class range.
        labels: Positives of all rows of the group, -1 where there is none, int64 [R, T].
        rate: Share of the classes that is drawn.
        min_negatives: The floor.

    Returns:
        Rising class numbers counted from ``local.start``, int64 [C]; None for all of the range.
    """
    if rate >= 1.0 or classes <= min_negatives:
        return None
    device = labels.device
    positives = labels[labels >= 0]
    threshold = math.ceil(rate * HASH_SPAN)
    if _rate_reaches_floor(classes - min(classes, labels.numel()), rate, min_negatives):
        drawn = class_hashes(key, local.start, local.stop, device) < threshold
        is_positive = torch.zeros(len(local), dtype=torch.bool, device=device)
        inside = (positives >= local.start) & (positives < local.stop)
        is_positive[positives[inside] - local.start] = True
    else:
        hashes = class_hashes(key, 0, classes, device)
        everywhere = torch.zeros(classes, dtype=torch.bool, device=device)
        everywhere[positives] = True
        rivals = hashes.masked_fill(everywhere, HASH_SPAN)
        floor = rivals.kthvalue(min_negatives).values if min_negatives else rivals.new_tensor(-1)
        drawn = ((rivals <= floor) | (hashes < threshold))[local.start : local.stop]
        is_positive = everywhere[local.start : local.stop]
    return (drawn | is_positive).nonzero().squeeze(1)


def _rate_reaches_floor(rivals: int, rate: float, min_negatives: int) -> bool:
    """Whether a binomial draw from this many classes reaches the floor but for a chance of 1e-15."""
    mean = rivals * rate
    # Chernoff: P(X <= mean - t) <= exp(-t * t / (2 * mean)).
    return mean - math.sqrt(2 * mean * 35.0) >= min_negatives
