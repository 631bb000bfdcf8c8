"""Which part of the demo each cut-out, background and word belongs to: train, val or test, never two."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, get_args

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = get_args(Part)

TEST_SHARE = 0.25
"""Share of the instances of a class that only test scenes show."""
VAL_SHARE = 0.10
"""Share of the instances of a class that only val scenes show."""


def split_names(names: Iterable[str]) -> dict[str, Part]:
    """Deal the names of one stratum to the three parts.

    The names are put in the order of their hashes and cut at the shares, so the parts are
    stratified to the unit, do not depend on the order of the files, and stay disjoint from each
    other in every run. One name alone trains; of two, one is for test; from three on, every part
    gets at least one.

    Args:
        names: Names of one stratum (a class, or all words); repeated names count once.

    Returns:
        The part of each name.
    """
    ordered = sorted(set(names), key=_hash)
    count = len(ordered)
    test = max(round(TEST_SHARE * count), 1 if count >= 2 else 0)
    val = max(round(VAL_SHARE * count), 1 if count >= 3 else 0)
    cuts: tuple[tuple[Part, int], ...] = (("test", test), ("val", val), ("train", count - test - val))
    return dict(zip(ordered, (part for part, size in cuts for _ in range(size)), strict=True))


def split_strata(strata: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Part]:
    """Deal every (stratum, name) to a part, each stratum by itself."""
    names: dict[str, list[str]] = defaultdict(list)
    for stratum, name in strata:
        names[stratum].append(name)
    return {
        (stratum, name): part
        for stratum, members in names.items()
        for name, part in split_names(f"{stratum}/{member}" for member in members).items()
        for name in [name.removeprefix(f"{stratum}/")]
    }


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
