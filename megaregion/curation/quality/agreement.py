"""How far two labellings of the same things agree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def nmi(some: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Normalised mutual information, with the mean of both entropies below.

    Args:
        some: Labels, [n].
        others: Other labels of the same things, [n].

    Returns:
        0 for independent labellings, 1 for equal ones whatever the names; 1 if neither tells anything apart.
    """
    if not len(some):
        return 1.0
    _, rows = np.unique(some, return_inverse=True)
    _, columns = np.unique(others, return_inverse=True)
    pairs, counts = np.unique(rows * (columns.max() + 1) + columns, return_counts=True)
    joint = counts / len(some)
    first, second = np.bincount(rows) / len(some), np.bincount(columns) / len(some)
    cells = first[pairs // len(second)] * second[pairs % len(second)]
    shared = float((joint * np.log(joint / cells)).sum())
    mean = (_entropy(first) + _entropy(second)) / 2
    return shared / mean if mean > 0 else 1.0


def _entropy(shares: NDArray[np.float64]) -> float:
    return float(-(shares * np.log(shares)).sum())
