"""Does the picture of principal components tell objects from their background? AUC against true masks.

One basis of three components is fitted on the cells of training scenes, without any label: the red, green and
blue of the pictures. Three readings, each fixed on training scenes and asked of all places of held-out ones
but words: one colour, the best with its sign; all three colours, by a linear reading; and, for what the
picture leaves out, all channels. Shapes: C channels, h x w cells, n cells of all training scenes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.classifiers import DECAYS, fit_probe
from megaregion.evaluation.encoders import Floats
from megaregion.evaluation.encoding import MappedScenes, coverage, fit_basis, resized
from megaregion.evaluation.measures import Sums, estimate
from megaregion.schemas.evaluation import Column, Estimate, Table

BINS = 512
"""Steps of the ROC curve, evenly many places of the held-out scenes in each."""
MOST_CELLS = 20_000
"""Training cells that the linear readings are fitted on."""
READINGS = ("one_colour", "three_colours", "all_channels")

Reading = Callable[[Floats], Floats]
"""From features or colours, [n, C], to how much each looks like an object, [n]."""


def separation_table(known: MappedScenes, asked: MappedScenes) -> Table:
    """Measure every encoder that has maps."""
    told = (
        "Area under the ROC curve of object against background over all places of "
        f"{len(asked.scenes)} held-out scenes; the map's basis and how it is read are fixed on "
        f"{len(known.scenes)} training scenes."
    )
    columns = tuple(Column(key, key.replace("_", " "), 0.5) for key in READINGS)
    rows = {name: _row(known, asked, name) for name in known.maps}
    return Table("separation", "Objects against background", told, columns, rows, "blind")


def _row(known: MappedScenes, asked: MappedScenes, encoder: str) -> dict[str, Estimate | None]:
    basis = fit_basis(known.maps[encoder])
    cells, inside = _clear_cells(known, encoder)
    if inside.all() or not inside.any():
        return dict.fromkeys(READINGS)
    colours = basis.project(cells)
    best, sign = best_colour(colours, inside)
    by_three, by_all = _linear(colours, inside), _linear(cells, inside)
    readings: tuple[Reading, ...] = (
        lambda features: sign * basis.project(features)[:, best],
        lambda features: by_three(basis.project(features)),
        by_all,
    )
    judged = (_judge(reading, asked, encoder) for reading in readings)
    return dict(zip(READINGS, judged, strict=True))


def best_colour(colours: Floats, inside: NDArray[np.bool_]) -> tuple[int, float]:
    """Component of [n, 3] that tells inside from outside best, and the sign by which it is high inside."""
    areas = [exact_area(colour, inside) for colour in colours.T]
    best = int(np.argmax([abs(area - 0.5) for area in areas]))
    return best, 1.0 if areas[best] >= 0.5 else -1.0


def exact_area(scores: Floats, inside: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of scores [n], ties counting half."""
    values, bins = np.unique(scores, return_inverse=True)
    return float(area_under_curve(_histograms(bins, inside, len(values))))


def _histograms(bins: NDArray[np.int64], owner: NDArray[np.int16 | np.bool_], total: int) -> Sums:
    """How many places of the background (0) and then of objects (above 0) each bin holds, [2 * total]."""
    counts = [np.bincount(bins[own], minlength=total) for own in (owner == 0, owner > 0)]
    return np.concatenate(counts).astype(np.float64)


def area_under_curve(sums: Sums) -> Sums:
    """Area under the ROC curve from histograms over the same bins, [..., 2 * bins] to [...].

    The first half counts the negatives of each bin, from the lowest score to the highest, the second the
    positives; a pair in one bin counts half.
    """
    negative, positive = np.split(sums, 2, axis=-1)
    below = np.cumsum(negative, axis=-1) - negative / 2
    pairs = positive.sum(axis=-1) * negative.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide((positive * below).sum(axis=-1), pairs)


def _clear_cells(known: MappedScenes, encoder: str) -> tuple[Floats, NDArray[np.bool_]]:
    """Features of cells that lie mostly inside objects or mostly outside, [n, C], and which they do, [n]."""
    features, verdicts = [], []
    for own, truth in zip(known.maps[encoder], known.truths, strict=True):
        inside, outside = (coverage(mask, *own.shape[:2]) for mask in (truth > 0, truth == 0))
        clear = np.maximum(inside, outside) > 0.5
        features.append(own[clear])
        verdicts.append(inside[clear] > 0.5)
    joined, verdict = np.concatenate(features), np.concatenate(verdicts)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(joined))[:MOST_CELLS]
    return joined[order], verdict[order]


def _linear(features: Floats, inside: NDArray[np.bool_]) -> Reading:
    fitted = fit_probe(features, np.where(inside, "inside", "outside").tolist(), DECAYS[0])
    # The classes are sorted: of its two scores, the first is for inside.
    return lambda asked: np.negative(np.diff(fitted.scores(asked)))[:, 0]


def _judge(reading: Reading, asked: MappedScenes, encoder: str) -> Estimate | None:
    """AUC over all places of the held-out scenes, with the scenes as groups."""
    scores = []
    for own in asked.maps[encoder]:
        plane = reading(own.reshape(-1, own.shape[-1])).reshape(*own.shape[:2], 1)
        scores.append(resized(plane.astype(np.float32))[..., 0])
    edges = np.quantile(np.stack(scores), np.linspace(0, 1, BINS + 1)[1:-1])
    parts = [
        _histograms(np.searchsorted(edges, plane), truth, BINS)
        for plane, truth in zip(scores, asked.truths, strict=True)
    ]
    return estimate(np.asarray(parts)[None], area_under_curve)
