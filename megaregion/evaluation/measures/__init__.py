"""The measures, one file each, and what they share: a number is a mean over seeds with its uncertainty.

A measure takes what encoders say of training scenes (known) and of held-out scenes (asked), and how many
seeds draw (seeds); it gives a table with a row of named estimates for each encoder.

Test regions are not independent: the same few cut-outs stand in many scenes, and a scene's patches share its
background. So whole groups (cut-outs, scenes, images) are drawn with replacement, and the seeds with them.

Shapes: S seeds, Q queries, G groups, K numbers that a statistic is made of.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megaregion.schemas.evaluation import Estimate

DRAWS = 1000
"""Bootstrap draws behind an interval."""

Sums = NDArray[np.float64]
Reduce = Callable[[Sums], Sums]
"""From sums over groups, [..., K], to the statistic, [...]; nan where it cannot be said."""


def estimate(parts: Sums, reduce: Reduce, seed: int = 0) -> Estimate | None:
    """Estimate a statistic of what each group adds under each seed, [S, G, K]; a seed draws the interval.

    None when there is no group, or the statistic cannot be said of all of them.
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
    right: ArrayLike, groups: ArrayLike, asked: ArrayLike | None = None, seed: int = 0
) -> Estimate | None:
    """Estimate a mean of single verdicts between 0 and 1, such as an accuracy.

    Each query has a verdict under each seed, [S, Q] or [Q], and a group, [S, Q] or [Q]. It was ``asked`` or
    not under each seed, [S, Q]; under all of them if None. A seed draws the interval.
    """
    verdicts = np.atleast_2d(np.asarray(right, np.float64))
    tries = np.ones_like(verdicts) if asked is None else np.asarray(asked, np.float64)
    named = np.asarray(groups, np.str_)
    names, group = np.unique(named, return_inverse=True)
    parts = np.zeros((len(verdicts), len(names), 2))
    rows = np.arange(len(verdicts))[:, None], np.broadcast_to(group.reshape(named.shape), verdicts.shape)
    np.add.at(parts, rows, np.stack([verdicts * tries, tries], axis=-1))
    return estimate(parts, _ratio, seed)


def _ratio(sums: Sums) -> Sums:
    """Hits over tries, [..., 2] to [...]; nan without a try."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(sums[..., 0], sums[..., 1])
