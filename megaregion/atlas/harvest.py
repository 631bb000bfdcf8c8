"""The second pass: reads each sample that some page needs once, and cuts what is wanted from it.

Shapes: m wanted crops.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.crops import cut_tile, decode, encode, shrink
from megaregion.atlas.members import mix
from megaregion.atlas.source import Sample, Source
from megaregion.atlas.spool import Cut
from megaregion.data.sample import BadSample
from megaregion.errors import UserError

TOGETHER = 32
"""Samples that a worker does at once."""
IMAGE_SIDE = 720
"""Longest side of a browsed sample, in pixels."""
IMAGE_QUALITY = 84


@dataclass(frozen=True)
class Errand:
    """One sample, and what to bring from it."""

    sample: int
    clusters: NDArray[np.int64]
    """Region, group and slot of each crop, [m, 3]."""
    tokens: NDArray[np.int64]
    browsed: bool
    """Whether the whole sample is shown, too."""


@dataclass
class Harvest:
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


def plan_errands(
    clusters: NDArray[np.int64], tokens: NDArray[np.int64], browsed: NDArray[np.int64]
) -> tuple[int, Iterator[Errand]]:
    """Sort the wanted crops by sample.

    Args:
        clusters: Sample, region, group and slot of each crop, [m, 4].
        tokens: The same for tokens.
        browsed: Numbers of the samples to browse, rising.

    Returns:
        The number of samples, and their errands in rising order.
    """
    clusters, tokens = (wants[np.argsort(wants[:, 0], kind="stable")] for wants in (clusters, tokens))
    samples = np.unique(np.concatenate([clusters[:, 0], tokens[:, 0], browsed]))

    def errands() -> Iterator[Errand]:
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
            yield Errand(sample, own, words, bool(shown[place]))

    return len(samples), errands()


def harvest(source: Source, errands: Iterator[Errand], tile: int, workers: int) -> Iterator[Harvest]:
    """Do the errands, in order; the outcome is the same for any number of workers.

    Raises:
        UserError: A worker died.
    """
    baskets = _together(errands)
    if workers <= 1:
        yield from (_bring(source, basket, tile) for basket in baskets)
        return
    # Not forked: a parent that holds threads (torch, BLAS) would hand its locks to the child.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (source, tile)) as pool:
        waiting = []
        try:
            # A few ahead and no more, or all tiles of the atlas could pile up here.
            for basket in baskets:
                waiting.append(pool.submit(_work, basket))
                if len(waiting) > 3 * workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        except BrokenProcessPool:
            raise UserError("a worker died, most likely of memory; try again with --workers 1") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _together(errands: Iterator[Errand]) -> Iterator[list[Errand]]:
    basket: list[Errand] = []
    for errand in errands:
        basket.append(errand)
        if len(basket) == TOGETHER:
            yield basket
            basket = []
    if basket:
        yield basket


def _bring(source: Source, errands: list[Errand], tile: int) -> Harvest:
    found = Harvest(samples=len(errands))
    for errand in errands:
        try:
            sample = source.read(errand.sample)
            image = decode(sample.image)
        except BadSample:
            found.damaged.append(errand.sample)
            continue
        # The record's boxes are in pixels of the stored image, whatever the record says of its size.
        regions = sample.record.regions
        for wants, cuts in ((errand.clusters, found.clusters), (errand.tokens, found.tokens)):
            for place, group, slot in wants.tolist():
                region = regions[place]
                cuts.append(Cut(group, slot, cut_tile(image, region.box, tile), region.text))
        if errand.browsed:
            jpeg = encode(shrink(image, IMAGE_SIDE), IMAGE_QUALITY)
            found.browsed.append((_describe(errand.sample, sample), jpeg))
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


_source: Source | None = None
_tile = 0


def _start(source: Source, tile: int) -> None:
    global _source, _tile
    _source, _tile = source, tile


def _work(errands: list[Errand]) -> Harvest:
    assert _source is not None  # the pool's initializer ran
    return _bring(_source, errands, _tile)
