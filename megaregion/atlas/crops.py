"""The second pass: reads each sample that some page needs once, and cuts what is wanted from it.

Shapes: m wanted crops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.source import Sample, Source, mix
from megaregion.atlas.tiles import Cut, cut_tile, encode, shrink
from megaregion.data.sample import BadSample
from megaregion.processes import spread

TOGETHER = 32
"""Samples that a worker does at once."""
IMAGE_SIDE = 720
"""Longest side of a browsed sample, in pixels."""
IMAGE_QUALITY = 84


@dataclass(frozen=True)
class SampleCrops:
    """What to cut from one sample."""

    sample: int
    clusters: NDArray[np.int64]
    """Region, group and slot of each crop, [m, 3]."""
    tokens: NDArray[np.int64]
    browsed: bool
    """Whether the whole sample is shown, too."""


@dataclass
class Cropped:
    """What some samples gave."""

    samples: int = 0
    clusters: list[Cut] = field(default_factory=list)
    tokens: list[Cut] = field(default_factory=list)
    browsed: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    """What the page says of each sample, and its JPEG."""
    damaged: list[int] = field(default_factory=list)
    """Samples that cannot be read."""


def draw_samples(samples: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """Numbers of the samples to browse, in rising order; all if `wanted` is 0 or no less than there are."""
    numbers = np.arange(samples)
    if not wanted or wanted >= samples:
        return numbers
    return np.sort(np.argsort(mix(numbers, seed + 1), kind="stable")[:wanted])


def plan_crops(
    clusters: NDArray[np.int64], tokens: NDArray[np.int64], browsed: NDArray[np.int64]
) -> tuple[int, Iterator[SampleCrops]]:
    """Sort the wanted crops by sample.

    Args:
        clusters: Sample, region, group and slot of each crop, [m, 4].
        tokens: The same for tokens.
        browsed: Numbers of the samples to browse, rising.

    Returns:
        The number of samples, and what to cut from each, in rising order.
    """
    clusters, tokens = (wants[np.argsort(wants[:, 0], kind="stable")] for wants in (clusters, tokens))
    samples = np.unique(np.concatenate([clusters[:, 0], tokens[:, 0], browsed]))

    def requests() -> Iterator[SampleCrops]:
        bounds = [
            (np.searchsorted(wants[:, 0], samples, "left"), np.searchsorted(wants[:, 0], samples, "right"))
            for wants in (clusters, tokens)
        ]
        shown = np.isin(samples, browsed)
        for place, sample in enumerate(samples.tolist()):
            own, words = (
                wants[low[place] : high[place], 1:]
                for wants, (low, high) in zip((clusters, tokens), bounds, strict=True)
            )
            yield SampleCrops(sample, own, words, bool(shown[place]))

    return len(samples), requests()


def cut_crops(source: Source, requests: Iterator[SampleCrops], tile: int, workers: int) -> Iterator[Cropped]:
    """Cut what is wanted, in order; the outcome is the same for any number of workers.

    Raises:
        UserError: A worker died.
    """
    batches = iter(lambda: list(islice(requests, TOGETHER)), [])
    return spread(partial(_cut, source, tile), batches, workers)


def _cut(source: Source, tile: int, requests: list[SampleCrops]) -> Cropped:
    found = Cropped(samples=len(requests))
    for request in requests:
        try:
            sample = source.read(request.sample)
        except BadSample:
            found.damaged.append(request.sample)
            continue
        # The record's boxes are in pixels of the stored image, whatever the record says of its size.
        regions = sample.record.regions
        for wants, cuts in ((request.clusters, found.clusters), (request.tokens, found.tokens)):
            for place, group, slot in wants.tolist():
                region = regions[place]
                cuts.append(Cut(group, slot, cut_tile(sample.image, region.box, tile), region.text))
        if request.browsed:
            jpeg = encode(shrink(sample.image, IMAGE_SIDE), IMAGE_QUALITY)
            found.browsed.append((_describe(request.sample, sample), jpeg))
    return found


def _describe(number: int, sample: Sample) -> dict[str, Any]:
    """What the page of a sample says: 0 is an object with its cluster, 1 a text with its tokens."""
    regions: list[list[Any]] = []
    for region in sample.record.regions:
        box = [round(edge, 1) for edge in region.box]
        if region.kind == "object":
            regions.append([0, *box, round(region.score, 3), region.label])
        else:
            regions.append([1, *box, round(region.score, 3), region.text, list(region.labels)])
    record = sample.record
    return {"n": number, "key": sample.key, "w": record.width, "h": record.height, "r": regions}
