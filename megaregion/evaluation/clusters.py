"""Confusion of clusters: which cluster the object head names for regions that curation gave another one.

Clusters that run into each other say more than a loss: two halves of one thing, or things that look alike.

Shapes: R regions, K clusters, E embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.data.image import decode_image
from megaregion.data.sample import BadSample, RegionRecord, parse_sample
from megaregion.data.shards import Datasets
from megaregion.evaluation.classifiers import nearest, unit
from megaregion.evaluation.encoders import BoxedImage, Encoder, Floats
from megaregion.evaluation.encoding import Progress, quiet
from megaregion.evaluation.measures import share
from megaregion.schemas.evaluation import Estimate

SAMPLES = 300
"""Images of the shards that are asked about."""
SHOWN = 28
"""Clusters in the matrix: those with the most regions."""
PAIRS = 6
"""Most confused pairs that are shown with examples."""


@dataclass(frozen=True)
class Confusion:
    """What the head named."""

    regions: Sequence[tuple[int, RegionRecord]]
    """Samples and objects in them that were asked about."""
    top1: Estimate | None
    """Share of regions whose own cluster is named first, with the images as groups."""
    top5: Estimate | None
    """Share of regions whose own cluster is among the first five."""
    shown: list[int]
    """Clusters of the matrix, like ones beside each other."""
    matrix: NDArray[np.float64]
    """Share of the regions of each shown cluster (rows) that get each shown cluster's name, [S, S]."""
    pairs: list[tuple[int, int, int]]
    """True cluster, named cluster and how many regions, most first."""
    unreadable: int
    """Samples that were drawn and cannot be read; nothing is asked about them."""


def confuse(
    datasets: Datasets,
    encoder: Encoder,
    centers: Floats,
    seed: int,
    batch: int = 32,
    progress: Progress = quiet,
) -> Confusion | None:
    """Ask the object head, whose centers are [K, E], about regions of images that a seed draws.

    None if no image that was drawn has an object.
    """
    drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(len(datasets))[:SAMPLES].tolist()
    regions: list[tuple[int, RegionRecord]] = []
    embeddings, unreadable = [], 0
    for start in range(0, len(drawn), batch):
        items = []
        for sample in drawn[start : start + batch]:
            raw = datasets.read(sample)
            try:
                record = datasets.labelled(sample, raw.key, parse_sample(raw.record))
                image = decode_image(raw.image)
            except BadSample:
                unreadable += 1  # Training skips it too.
                continue
            own = [region for region in record.regions if region.kind == "object"]
            if own:
                items.append(BoxedImage(image, np.asarray([region.box for region in own], np.float32)))
                regions += [(sample, region) for region in own]
        if items and (embedding := encoder.encode(items).embedding) is not None:
            embeddings.append(embedding)
        progress("clusters", min(start + batch, len(drawn)), len(drawn))
    if not embeddings:
        return None
    named = nearest(np.concatenate(embeddings), centers, neighbours=5).index
    samples, objects = zip(*regions, strict=True)
    label = np.asarray([region.label for region in objects])
    hit = named == label[:, None]
    counts = Counter(label.tolist())
    both = Counter(zip(label.tolist(), named[:, 0].tolist(), strict=True))
    shown = like_order([cluster for cluster, _ in counts.most_common(SHOWN)], centers)
    wrong = [(*pair, n) for pair, n in both.most_common() if pair[0] != pair[1] and pair[1] in counts]
    return Confusion(
        regions, share(hit[:, 0], samples), share(hit.any(axis=1), samples), shown,
        matrix=np.array([[both[true, first] / counts[true] for first in shown] for true in shown]),
        pairs=wrong[:PAIRS], unreadable=unreadable,
    )  # fmt: skip


def like_order(clusters: Sequence[int], centers: Floats) -> list[int]:
    """Clusters along the first principal direction of their centers [K, E]: like ones are neighbours."""
    own = unit(centers[list(clusters)])
    centred = own - own.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    along = centred @ directions[0]
    return [clusters[place] for place in np.argsort(along, kind="stable")]
