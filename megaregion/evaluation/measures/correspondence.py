"""Box-to-box semantic correspondence: an object in one scene points at its like in another.

Pairs of held-out scenes that hold a class exactly once each are drawn. Two questions a pair:

- right box: of all true boxes of the other scene (objects and words), is the one whose feature is most
  similar to the source box of the same class?
- peak inside: is the place of the other scene's feature map that is most similar to the source box's mean
  feature inside the true mask? Asked of encoders with feature maps.

Each seed draws other pairs; chance is one over the boxes, and the mask's share of the scene.

Shapes: n pairs, R regions of a scene (its objects, then its words), C feature width, h x w cells of a map,
T x T truth cells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.classifiers import unit
from megaregion.evaluation.encoders import Floats
from megaregion.evaluation.encoding import MappedScenes, pooled
from megaregion.evaluation.measures import share
from megaregion.evaluation.scenes import Scene, TrueObject, TruthMap
from megaregion.schemas.evaluation import Column, Estimate, Table

PAIRS = 400
"""Most pairs that one seed draws."""


@dataclass(frozen=True)
class Pair:
    """An object of one scene and its like in another; scenes and objects by their places."""

    source: tuple[int, int]
    target: tuple[int, int]


def correspondence_table(
    features: Mapping[str, Sequence[Floats]], asked: MappedScenes, seeds: int
) -> Table | None:
    """Measure every encoder by each scene's features, [R, C]; None where no two scenes share a class."""
    scenes, truths = asked.scenes, asked.truths
    drawn = [draw_pairs(scenes, seed) for seed in range(seeds)]
    if not drawn[0]:
        return None
    boxes = np.mean([1 / len(scenes[p.target[0]].boxes) for pairs in drawn for p in pairs])
    areas = np.mean([_mask(truths, p.target).mean() for pairs in drawn for p in pairs])
    columns = (Column("box", "right box", float(boxes)), Column("peak", "peak inside", float(areas)))
    told = (
        f"{len(drawn[0])} pairs of held-out scenes a seed, {seeds} seeds, in which an object has one like: "
        "does its box pick that object's box among all boxes of the other scene, and does its mean feature "
        "have its peak on that object's mask?"
    )
    rows = {name: _row(features[name], asked.maps.get(name), asked, drawn) for name in features}
    return Table("correspondence", "Pointing at the like", told, columns, rows, "random place")


def draw_pairs(scenes: Sequence[Scene], seed: int) -> list[Pair]:
    """Draw pairs of objects of one class from two scenes that hold it once each."""
    single: dict[str, list[tuple[int, int]]] = {}
    for place, scene in enumerate(scenes):
        counts = Counter(item.name for item in scene.objects)
        for number, item in enumerate(scene.objects):
            if counts[item.name] == 1:
                single.setdefault(item.name, []).append((place, number))
    sources = [(name, own) for name, found in sorted(single.items()) if len(found) > 1 for own in found]
    rng = np.random.Generator(np.random.Philox(key=seed))
    pairs = []
    for chosen in rng.permutation(len(sources))[:PAIRS]:
        name, source = sources[chosen]
        others = [own for own in single[name] if own != source]
        pairs.append(Pair(source, others[int(rng.integers(len(others)))]))
    return pairs


def _row(
    features: Sequence[Floats],
    maps: Sequence[Floats] | None,
    asked: MappedScenes,
    drawn: Sequence[Sequence[Pair]],
) -> dict[str, Estimate | None]:
    # Every seed draws as many pairs, so that one bootstrap over their source cut-outs serves all.
    cutouts = [[_object(asked.scenes, pair.source).instance for pair in pairs] for pairs in drawn]
    boxes = [[right_box(features, asked.scenes, pair) for pair in pairs] for pairs in drawn]
    row: dict[str, Estimate | None] = {"box": share(boxes, cutouts), "peak": None}
    if maps is not None:
        peaks = [[peak_inside(maps, asked.truths, pair) for pair in pairs] for pairs in drawn]
        row["peak"] = share(peaks, cutouts)
    return row


def right_box(features: Sequence[Floats], scenes: Sequence[Scene], pair: Pair) -> bool:
    """Whether the most similar region of the target scene is of the source's class."""
    (source, own), (target, _) = pair.source, pair.target
    best = int((unit(features[target]) @ unit(features[source][own])).argmax())
    named = scenes[target].objects
    return best < len(named) and named[best].name == _object(scenes, pair.source).name


def peak_inside(maps: Sequence[Floats], truths: Sequence[TruthMap], pair: Pair) -> bool:
    """Whether the target's most similar cell has its middle on the target's mask."""
    asked = pooled(maps[pair.source[0]], _mask(truths, pair.source))
    target = maps[pair.target[0]]
    row, column = np.unravel_index(int((unit(target) @ unit(asked)).argmax()), target.shape[:2])
    mask = _mask(truths, pair.target)
    y, x = ((place + 0.5) / cells for place, cells in zip((row, column), target.shape[:2], strict=True))
    return bool(mask[int(y * mask.shape[0]), int(x * mask.shape[1])])


def _mask(truths: Sequence[TruthMap], place: tuple[int, int]) -> NDArray[np.bool_]:
    scene, number = place
    return truths[scene].owner == number + 1


def _object(scenes: Sequence[Scene], place: tuple[int, int]) -> TrueObject:
    return scenes[place[0]].objects[place[1]]
