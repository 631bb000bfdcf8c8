"""Confusion of clusters: which cluster the object head names for regions that curation gave another one.

Regions are those of the training shards, encoded as whole images without augmentation. Which clusters run
into each other says more than a loss: two halves of one thing, or two things that look alike.

Shapes: R regions, K clusters, E embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.data.image import decode_image
from megaregion.data.sample import BadSample, Box, parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.evaluation.classifiers import nearest, unit
from megaregion.evaluation.encoders import BoxedImage, Encoder
from megaregion.evaluation.estimates import share
from megaregion.schemas.evaluation import Estimate

SAMPLES = 300
"""Images of the shards that are asked about."""
SHOWN = 28
"""Clusters in the matrix: those with the most regions."""
PAIRS = 6
"""Most confused pairs that are shown with examples."""


@dataclass(frozen=True)
class LabelledRegion:
    """One region of the shards."""

    sample: int
    box: Box
    label: int


@dataclass(frozen=True)
class Confusion:
    """What the head named."""

    regions: Sequence[LabelledRegion]
    named: NDArray[np.int64]
    """Five clusters named for each region, most similar first, [R, 5]."""
    top1: Estimate | None
    """Share of regions whose own cluster is named first, with the images as groups."""
    top5: Estimate | None
    shown: list[int]
    """Clusters of the matrix, like ones beside each other."""
    matrix: NDArray[np.float64]
    """Share of the regions of each shown cluster (rows) that get each shown cluster's name, [S, S]."""
    pairs: list[tuple[int, int, int]]
    """True cluster, named cluster and how many regions, most first."""

    def example(self, cluster: int) -> LabelledRegion | None:
        """A region of this cluster; None if none was drawn."""
        return next((region for region in self.regions if region.label == cluster), None)


def confuse(
    shards: ShardedDataset,
    encoder: Encoder,
    centers: NDArray[np.float32],
    seed: int,
    batch: int = 32,
    progress: Callable[[str, int, int], None] = lambda split, done, images: None,
) -> Confusion | None:
    """Ask the object head about regions of the shards.

    Args:
        shards: The run's dataset.
        encoder: The trained network.
        centers: Weight of the object head, [K, E].
        seed: Draws the images.
        batch: Images that go through the network at once.
        progress: Told of images.

    Returns:
        What was confused; None if no image that was drawn has an object.
    """
    drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(len(shards))[:SAMPLES].tolist()
    regions: list[LabelledRegion] = []
    embeddings = []
    for start in range(0, len(drawn), batch):
        items = []
        for sample in drawn[start : start + batch]:
            image, own = _read(shards, sample)
            if image is not None and own:
                items.append(BoxedImage(image, np.asarray([region.box for region in own], np.float32)))
                regions += own
        if items:
            embeddings.append(encoder.encode(items).embedding)
        progress("clusters", min(start + batch, len(drawn)), len(drawn))
    parts = [part for part in embeddings if part is not None]
    if not parts:
        return None
    named = nearest(np.concatenate(parts), centers, neighbours=5).index
    return _summary(regions, named, centers)


def sample_image(shards: ShardedDataset, sample: int) -> Image.Image:
    """The stored image of a sample, RGB."""
    return decode_image(shards.read(sample).image)


def _read(shards: ShardedDataset, sample: int) -> tuple[Image.Image | None, list[LabelledRegion]]:
    raw = shards.read(sample)
    try:
        record = parse_sample(raw.record)
        image = decode_image(raw.image)
    except (BadSample, OSError):
        return None, []  # Training skips it too.
    return image, [LabelledRegion(sample, r.box, r.label) for r in record.regions if r.label is not None]


def _summary(
    regions: Sequence[LabelledRegion], named: NDArray[np.int64], centers: NDArray[np.float32]
) -> Confusion:
    label = np.asarray([region.label for region in regions])
    samples = [region.sample for region in regions]
    hit = named == label[:, None]
    counts = Counter(label.tolist())
    shown = like_order([cluster for cluster, _ in counts.most_common(SHOWN)], centers)
    place = {cluster: number for number, cluster in enumerate(shown)}
    matrix = np.zeros((len(shown), len(shown)))
    for true, first in zip(label.tolist(), named[:, 0].tolist(), strict=True):
        if true in place and first in place:
            matrix[place[true], place[first]] += 1 / counts[true]
    wrong = Counter(
        (true, first)
        for true, first in zip(label.tolist(), named[:, 0].tolist(), strict=True)
        if true != first
    )
    pairs = [(true, first, count) for (true, first), count in wrong.most_common() if first in counts]
    return Confusion(
        regions,
        named,
        share(hit[:, 0], samples),
        share(hit.any(axis=1), samples),
        shown,
        matrix,
        pairs[:PAIRS],
    )


def like_order(clusters: Sequence[int], centers: NDArray[np.float32]) -> list[int]:
    """Clusters in an order in which like centers are neighbours: along their first principal direction.

    Args:
        clusters: Clusters to order.
        centers: Centers of all clusters, [K, E].
    """
    own = unit(centers[list(clusters)])
    centred = own - own.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    along = centred @ directions[0]
    return [clusters[place] for place in np.argsort(along, kind="stable")]
