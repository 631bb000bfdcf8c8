"""Box-to-box semantic correspondence: an object in one scene points at its like in another.

Each seed draws pairs of held-out scenes that hold a class exactly once each. Two questions a pair:

- right box: of all boxes of the other scene (objects and words), is the one with the most similar feature of
  the same class? By chance, one over the boxes.
- peak inside: is the place of the other scene's map that is most similar to the source mask's mean feature
  inside the true mask? By chance, the mask's share of the scene.

Shapes: R regions of a scene (its objects, then its words), C feature width, h x w cells of a map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.classifiers import unit
from megaregion.evaluation.encoders import Floats
from megaregion.evaluation.encoding import MappedScenes, pooled
from megaregion.evaluation.measures import share
from megaregion.evaluation.scenes import Scene
from megaregion.schemas.evaluation import Column, Estimate, Table

PAIRS = 400
"""Most pairs that one seed draws."""


class Place(NamedTuple):
    """An object by the place of its scene and its own place in the scene."""

    scene: int
    number: int


Pair = tuple[Place, Place]
"""An object and its like in another scene."""


def correspondence_table(asked: MappedScenes, seeds: int) -> Table | None:
    """Measure every encoder; None where no two scenes share a class."""
    drawn = [draw_pairs(asked.scenes, seed) for seed in range(seeds)]
    if not drawn[0]:
        return None
    targets = [target for pairs in drawn for _, target in pairs]
    boxes = np.mean([1 / len(asked.scenes[target.scene].boxes) for target in targets])
    areas = np.mean([_mask(asked, target).mean() for target in targets])
    columns = (Column("box", "right box", float(boxes)), Column("peak", "peak inside", float(areas)))
    told = (
        f"{len(drawn[0])} pairs of held-out scenes a seed, {seeds} seeds, in which an object has one like: "
        "does its box pick that object's box among all boxes of the other scene, and does its mean feature "
        "have its peak on that object's mask?"
    )
    rows = {name: _row(name, asked, drawn) for name in asked.regions}
    return Table("correspondence", "Pointing at the like", told, columns, rows, "random place")


def draw_pairs(scenes: Sequence[Scene], seed: int) -> list[Pair]:
    """Draw pairs of objects of one class from two scenes that hold it once each."""
    single: dict[str, list[Place]] = {}
    for place, scene in enumerate(scenes):
        counts = Counter(item.name for item in scene.objects)
        for number, item in enumerate(scene.objects):
            if counts[item.name] == 1:
                single.setdefault(item.name, []).append(Place(place, number))
    sources = [(name, own) for name, found in sorted(single.items()) if len(found) > 1 for own in found]
    rng = np.random.Generator(np.random.Philox(key=seed))
    pairs = []
    for chosen in rng.permutation(len(sources))[:PAIRS]:
        name, source = sources[chosen]
        others = [own for own in single[name] if own != source]
        pairs.append((source, others[int(rng.integers(len(others)))]))
    return pairs


def _row(encoder: str, asked: MappedScenes, drawn: Sequence[Sequence[Pair]]) -> dict[str, Estimate | None]:
    # Every seed draws as many pairs, so that one bootstrap over their source cut-outs serves all.
    cutouts = [[asked.scenes[s.scene].objects[s.number].instance for s, _ in pairs] for pairs in drawn]
    regions, maps = asked.regions[encoder], asked.maps.get(encoder)
    boxes = [[right_box(regions, asked, pair) for pair in pairs] for pairs in drawn]
    row: dict[str, Estimate | None] = {"box": share(boxes, cutouts), "peak": None}
    if maps is not None:
        row["peak"] = share([[peak_inside(maps, asked, pair) for pair in pairs] for pairs in drawn], cutouts)
    return row


def right_box(regions: Sequence[Floats], asked: MappedScenes, pair: Pair) -> bool:
    """Whether the target scene's most similar region, by features [R, C], is of the source's class."""
    source, target = pair
    best = int((unit(regions[target.scene]) @ unit(regions[source.scene][source.number])).argmax())
    named = [item.name for item in asked.scenes[target.scene].objects]
    return best < len(named) and named[best] == asked.scenes[source.scene].objects[source.number].name


def peak_inside(maps: Sequence[Floats], asked: MappedScenes, pair: Pair) -> bool:
    """Whether the target's most similar cell, by maps [h, w, C], has its middle on the target's mask."""
    source, target = pair
    feature, other = pooled(maps[source.scene], _mask(asked, source)), maps[target.scene]
    cell = np.unravel_index(int((unit(other) @ unit(feature)).argmax()), other.shape[:2])
    mask = _mask(asked, target)
    y, x = (
        int((place + 0.5) / cells * side)
        for place, cells, side in zip(cell, other.shape[:2], mask.shape, strict=True)
    )
    return bool(mask[y, x])


def _mask(asked: MappedScenes, place: Place) -> NDArray[np.bool_]:
    return asked.truths[place.scene] == place.number + 1
