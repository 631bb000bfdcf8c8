"""The measures, one file each, and what they share: a number is a mean over seeds with its uncertainty.

A measure takes what encoders say of training scenes (known) and of held-out scenes (asked), and how many
seeds draw (seeds); it gives a table with a row of named estimates for each encoder.

Test regions are not independent: the same few cut-outs stand in many scenes, and all patches of a scene
share its background. So whole groups (cut-outs, scenes, images) are drawn with replacement, never single
regions, and the seeds behind the mean are drawn again with them.

Shapes: S seeds, Q queries, G groups, K numbers that a statistic is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megaregion.schemas.evaluation import Estimate

DRAWS = 1000
"""Bootstrap draws behind an interval."""

Reduce = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From sums over groups, [..., K], to the statistic, [...]; nan where it cannot be said."""


def estimate(parts: NDArray[np.float64], reduce: Reduce, seed: int = 0) -> Estimate | None:
    """Estimate a statistic of sums over groups.

    Args:
        parts: What each group adds under each seed, [S, G, K].
        reduce: From sums to the statistic.
        seed: Of the draws.

    Returns:
        The estimate; None when there is no group, or the statistic cannot be said of all of them.
    """
    seeds, groups, _ = parts.shape
    if groups == 0:
        return None
    values = reduce(parts.sum(axis=1))
    if not np.isfinite(values).all():
        return None
    rng = np.random.Generator(np.random.Philox(key=seed))
    # How often each group is drawn; the same draw for all seeds, for they were asked about the same groups.
    counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=DRAWS).astype(np.float64)
    drawn = np.stack([reduce(counts @ part) for part in parts])
    chosen = rng.integers(seeds, size=(seeds, DRAWS))
    means = np.take_along_axis(drawn, chosen, axis=0).mean(axis=0)
    mean = float(values.mean())
    low, high = np.nanquantile(means, (0.025, 0.975)) if np.isfinite(means).any() else (mean, mean)
    # A draw can miss what few groups hold, so that the plain quantiles would leave the estimate outside.
    return Estimate(mean, min(float(low), mean), max(float(high), mean), tuple(values.tolist()))


def share(
    right: ArrayLike,
    groups: Sequence[object] | Sequence[Sequence[object]],
    asked: ArrayLike | None = None,
    seed: int = 0,
) -> Estimate | None:
    """Estimate a mean of single verdicts, such as an accuracy.

    Args:
        right: Verdict on each query under each seed, [S, Q] or [Q]; between 0 and 1.
        groups: Group of each query, [Q], or under each seed, [S, Q].
        asked: Whether each query was asked under each seed, [S, Q]; all of them if None.
        seed: Of the draws.
    """
    verdicts = np.atleast_2d(np.asarray(right, np.float64))
    tries = np.ones_like(verdicts) if asked is None else np.asarray(asked, np.float64)
    names = np.asarray(groups, dtype=np.str_)
    group = np.broadcast_to(np.unique(names, return_inverse=True)[1].reshape(names.shape), verdicts.shape)
    total = int(group.max()) + 1 if group.size else 0
    hits, sizes = (
        np.stack(
            [np.bincount(own, weights, minlength=total) for own, weights in zip(group, each, strict=True)]
        )
        for each in (verdicts * tries, tries)
    )
    return estimate(np.stack([hits, sizes], axis=-1), _ratio, seed)


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hits over tries, [..., 2] to [...]; nan without a try."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient: NDArray[np.float64] = sums[..., 0] / sums[..., 1]
    return quotient
