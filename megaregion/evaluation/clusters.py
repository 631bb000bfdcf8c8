"""Confusion of clusters: which cluster the object head names for regions that curation gave another one.

Regions are those of the training shards, encoded as whole images without augmentation. Which clusters run
into each other says more than a loss: two halves of one thing, or two things that look alike.

Shapes: R regions, K clusters, E embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.data.image import decode_image
from megaregion.data.sample import BadSample, Box, parse_sample
from megaregion.data.shards import ShardedDataset
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


class LabelledRegion(NamedTuple):
    """One region of the shards."""

    sample: int
    box: Box
    label: int


@dataclass(frozen=True)
class Confusion:
    """What the head named."""

    regions: Sequence[LabelledRegion]
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


def confuse(
    shards: ShardedDataset,
    encoder: Encoder,
    centers: Floats,
    seed: int,
    batch: int = 32,
    progress: Progress = quiet,
) -> Confusion | None:
    """Ask the object head, whose centers are [K, E], about regions of shards' images that a seed draws.

    Returns:
        What the trained network confused; None if no image that was drawn has an object.
    """
    drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(len(shards))[:SAMPLES].tolist()
    regions: list[LabelledRegion] = []
    embeddings = []
    for start in range(0, len(drawn), batch):
        items = []
        for sample in drawn[start : start + batch]:
            raw = shards.read(sample)
            try:
                record, image = parse_sample(raw.record), decode_image(raw.image)
            except (BadSample, OSError):
                continue  # Training skips it too.
            own = [LabelledRegion(sample, r.box, r.label) for r in record.regions if r.label is not None]
            if own:
                items.append(BoxedImage(image, np.asarray([region.box for region in own], np.float32)))
                regions += own
        if items:
            embeddings.append(encoder.encode(items).embedding)
        progress("clusters", min(start + batch, len(drawn)), len(drawn))
    parts = [part for part in embeddings if part is not None]
    if not parts:
        return None
    return _confusion(regions, nearest(np.concatenate(parts), centers, neighbours=5).index, centers)


def sample_image(shards: ShardedDataset, sample: int) -> Image.Image:
    """The stored image of a sample, RGB."""
    return decode_image(shards.read(sample).image)


def _confusion(regions: Sequence[LabelledRegion], named: NDArray[np.int64], centers: Floats) -> Confusion:
    """Count what was named, five clusters for each region with the most similar first, [R, 5]."""
    label = np.asarray([region.label for region in regions])
    samples = [region.sample for region in regions]
    hit = named == label[:, None]
    counts = Counter(label.tolist())
    both = Counter(zip(label.tolist(), named[:, 0].tolist(), strict=True))
    shown = like_order([cluster for cluster, _ in counts.most_common(SHOWN)], centers)
    matrix = np.array([[both[true, first] / counts[true] for first in shown] for true in shown])
    wrong = [(*pair, n) for pair, n in both.most_common() if pair[0] != pair[1] and pair[1] in counts]
    top1, top5 = share(hit[:, 0], samples), share(hit.any(axis=1), samples)
    return Confusion(regions, top1, top5, shown, matrix, wrong[:PAIRS])


def like_order(clusters: Sequence[int], centers: Floats) -> list[int]:
    """Clusters along the first principal direction of their centers [K, E]: like ones are neighbours."""
    own = unit(centers[list(clusters)])
    centred = own - own.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    along = centred @ directions[0]
    return [clusters[place] for place in np.argsort(along, kind="stable")]
