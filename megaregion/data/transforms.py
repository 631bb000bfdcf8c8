"""From an image and its regions to what the model reads: pixels, visible patches and labels.

:class:`Transform` is for training: a random crop, perhaps mirrored, of image and regions together, all
drawn from (seed, position). :class:`EvalTransform` is for measuring: the whole image, no randomness.

A region stays if enough of its box lies inside the crop; what sticks out is left out. An image with text
is never mirrored, whether or not the text is inside the crop, because mirrored letters are other letters.

Shapes: N regions of a sample, R regions of a record, T label slots, P = rows * columns patches in row-major
order, H x W pixels of the crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from megaregion.config import DataConfig, ModelConfig, StageConfig
from megaregion.data.batch import OBJECT, TEXT, Sample, normalise
from megaregion.data.image import Crop, Jpeg, decode_crop, eighths_needed, fitting_grid, random_crop
from megaregion.data.order import Purpose, SeededRng
from megaregion.data.sample import RLE, BadSample, Box, RegionRecord, SampleRecord, mask_area, overlap
from megaregion.errors import UserError

TOLERANCE = 1e-9
"""Rounding must not decide whether a patch that is covered by exactly the threshold is visible."""

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class Transform:
    """The training transform; `stages` are other sizes of the crop, from some position on."""

    data: DataConfig
    model: ModelConfig
    seed: int
    stages: tuple[StageConfig, ...] = ()

    @cached_property
    def _rng(self) -> SeededRng:
        return SeededRng(self.seed, Purpose.AUGMENTATION)

    @cached_property
    def _label_rng(self) -> SeededRng:
        return SeededRng(self.seed, Purpose.LABELS)

    def __call__(
        self, image: Image.Image | Jpeg, record: SampleRecord, position: int, key: str = ""
    ) -> Sample | None:
        """Transform one sample; the same (seed, position) gives the same bits anywhere.

        Returns:
            The sample, or None if no region is left in the crop.

        Raises:
            BadSample: The image cannot be decoded, or has another size than the record says.
        """
        check_size(image, record)
        sample = self.frame(record, position, key)
        return None if sample is None else self.decode(image, sample)

    def frame(self, record: SampleRecord, position: int, key: str = "") -> Sample | None:
        """Draw and find all of a sample but its pixels; None if no region is left in the crop."""
        if not record.regions:
            return None
        grid = self._grid(position)
        data, native, drawn = self.data, self.data.packing == "native", self.data.object_labels == "drawn"
        rng = self._rng.at(position)
        crop = self.draw_crop(record, rng, grid)
        rows, columns = fitting_grid(crop, grid**2) if native else (grid, grid)
        boxes = np.array([region.box for region in record.regions], dtype=np.float64)
        share = crop.share_inside(boxes)
        kept = np.flatnonzero((share > 0) & (share >= data.min_visible))
        if not kept.size:
            return None
        places = kept[sample_regions(kept.size, data.regions_per_image, rng)]
        chosen = [record.regions[place] for place in places.tolist()]
        masks = [region.mask for region in chosen]
        return Sample(
            key=key,
            position=position,
            crop=crop,
            rows=rows,
            columns=columns,
            factors=_jitter_factors(data.color_jitter, rng),
            visible=visibility(boxes[places], masks, crop, rows, columns, data.patch_coverage),
            kinds=np.array([OBJECT if region.kind == "object" else TEXT for region in chosen], dtype=np.int8),
            labels=pad_labels(chosen, data, self._label_rng.at(position) if drawn else None),
        )

    def decode(self, image: Image.Image | Jpeg, sample: Sample) -> Sample:
        """The sample with its pixels.

        Raises:
            BadSample: The image cannot be decoded.
        """
        patch = self.model.patch_size
        pixels = decode_crop(image, sample.crop, sample.columns * patch, sample.rows * patch, shrink=True)
        return sample._replace(pixels=jitter(pixels, sample.factors))

    def draw_crop(self, record: SampleRecord, rng: np.random.Generator, grid: int) -> Crop:
        """Draw the crop of an image and whether it is mirrored, first of all from the sample's generator."""
        data, side = self.data, grid * self.model.patch_size
        mirrored = rng.random() < data.flip and not any(region.kind == "text" for region in record.regions)
        # In packed mode an image keeps its own shape.
        own = record.width / record.height if data.packing == "native" else 1.0
        ratio = data.crop_ratio[0] * own, data.crop_ratio[1] * own
        crop = random_crop(rng, record.width, record.height, data.crop_scale, ratio, mirrored)
        if data.packing != "native" and eighths_needed(crop, side, side) < 8:
            crop = crop.on_blocks(record.width, record.height)
        return crop

    def _grid(self, position: int) -> int:
        passed = [stage.image_size for stage in self.stages if stage.from_image <= position]
        return (passed[-1] if passed else self.model.image_size) // self.model.patch_size


class EvalTransform:
    """The whole image stretched to a fixed height and width, and the patches that each box sees.

    Raises:
        UserError: The patch does not divide the size.
    """

    def __init__(self, data: DataConfig, model: ModelConfig, size: tuple[int, int] | None = None) -> None:
        self.data, self.patch = data, model.patch_size
        self.height, self.width = size or (model.image_size, model.image_size)
        if self.height % self.patch or self.width % self.patch:
            raise UserError(
                f"evaluation size must be a multiple of model.patch_size {self.patch}, "
                f"got {self.height} x {self.width}"
            )

    def __call__(
        self, image: Image.Image | Jpeg, boxes: Sequence[Box], masks: Sequence[RLE | None] = ()
    ) -> tuple[Tensor, Tensor]:
        """Transform one image and its boxes.

        Args:
            image: The image, decoded or not; it stays as it is.
            boxes: x0, y0, x1, y1 of R regions, in pixels of this image.
            masks: Exact shapes of the regions, where they are known.

        Returns:
            Normalised pixels, float32 [3, H, W], and which region sees which patch, bool [R, P].

        Raises:
            BadSample: The image cannot be decoded.
        """
        crop = Crop(0, 0, image.width, image.height)
        visible = self.visible(image.size, boxes, masks)
        pixels = torch.from_numpy(decode_crop(image, crop, self.width, self.height).transpose(2, 0, 1).copy())
        return normalise(pixels, self.data.mean, self.data.std), torch.from_numpy(visible.copy())

    def visible(
        self, size: tuple[int, int], boxes: Sequence[Box], masks: Sequence[RLE | None] = ()
    ) -> NDArray[np.bool_]:
        """Which region sees which patch of an image of this width and height, bool [R, P]."""
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        rows, columns = self.height // self.patch, self.width // self.patch
        shapes = masks or [None] * len(corners)
        return visibility(corners, shapes, Crop(0, 0, *size), rows, columns, self.data.patch_coverage)


def check_size(image: Image.Image | Jpeg, record: SampleRecord) -> None:
    """Refuse a record that was written for another image.

    Raises:
        BadSample: The sizes differ, so the boxes would point elsewhere.
    """
    if image.size != (record.width, record.height):
        raise BadSample(
            f"image has {image.width} x {image.height} pixels, "
            f"its record says {record.width} x {record.height}"
        )


def pad_labels(
    regions: Sequence[RegionRecord], data: DataConfig, rng: np.random.Generator | None
) -> NDArray[np.int64]:
    """Positive classes of each region, int64 [N, T], padded with -1.

    A longer text keeps its first tokens, an object with more clusters the nearest or what ``rng`` draws.
    """
    labels = np.full((len(regions), data.label_slots), -1, dtype=np.int64)
    labels[:, 0] = [-1 if region.label is None else region.label for region in regions]
    for row, region in enumerate(regions):
        if region.label is None:
            positives = region.labels[: data.max_text_tokens]
        elif region.others:
            positives = region.labels
            places = range(len(positives)) if rng is None else rng.permutation(len(positives)).tolist()
            positives = tuple(positives[place] for place in places[: data.max_object_labels])
        else:
            continue
        labels[row, : len(positives)] = positives
    return labels


def jitter(pixels: NDArray[np.uint8], factors: Sequence[float]) -> NDArray[np.uint8]:
    """Change brightness, contrast and saturation of RGB [H, W, 3] by a factor each, if there are any."""
    if not factors:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    for enhance, factor in zip(_ENHANCERS, factors, strict=True):
        image = enhance(image).enhance(factor)
    return np.asarray(image)


def _jitter_factors(strength: float, rng: np.random.Generator) -> tuple[float, ...]:
    """A factor from 1 - strength to 1 + strength for each of the three."""
    if strength == 0:
        return ()
    return tuple(rng.uniform(1 - strength, 1 + strength) for _ in _ENHANCERS)


def sample_regions(kept: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose exactly n of the regions that an image has left: a random subset, or all and random repeats.

    Returns:
        Indices below `kept`, [n].
    """
    if kept >= n:
        # As choice() without replacement, at half its time.
        return np.sort(rng.permutation(kept)[:n])
    return np.concatenate([np.arange(kept), rng.integers(kept, size=n - kept)])


def visibility(
    boxes: NDArray[np.float64],
    masks: Sequence[RLE | None],
    crop: Crop,
    rows: int,
    columns: int,
    coverage: float,
) -> NDArray[np.bool_]:
    """Find the patches that each region sees, bool [N, P]: those it covers by at least a given share.

    A region that would see no patch sees the one nearest to its center, because attention over
    nothing is undefined.

    Args:
        boxes: Boxes in pixels of the stored image, [N, 4].
        masks: Exact shapes where known; a region with a mask is judged by it and not by its box.
        crop: The part of the stored image that is divided into rows x columns patches.
        rows: Patches from top to bottom.
        columns: Patches from left to right.
        coverage: Least share of a patch that a region must cover.
    """
    x_edges, y_edges = crop.edges(rows, columns)
    width, height = x_edges[1] - x_edges[0], y_edges[1] - y_edges[0]
    x_share = overlap(x_edges, boxes[:, 0], boxes[:, 2])
    y_share = overlap(y_edges, boxes[:, 1], boxes[:, 3])
    x_share /= width
    y_share /= height
    share = y_share.T[:, :, None] * x_share.T[:, None, :]
    for n, mask in enumerate(masks):
        if mask is not None:
            share[n] = mask_area(mask, x_edges, y_edges) / (width * height)
    visible = share >= max(coverage - TOLERANCE, np.nextafter(0, 1))
    blind = np.flatnonzero(~visible.reshape(len(boxes), rows * columns).any(axis=1))
    for n in blind.tolist():
        x, y = _middle(boxes[n], share[n] if masks[n] is not None else None, crop, x_edges, y_edges)
        column = min(max(int(np.searchsorted(x_edges, x, side="right")) - 1, 0), columns - 1)
        row = min(max(int(np.searchsorted(y_edges, y, side="right")) - 1, 0), rows - 1)
        visible[n, row, column] = True
    if crop.flipped:
        visible = visible[:, :, ::-1]
    return visible.reshape(len(boxes), rows * columns)


def _middle(
    box: NDArray[np.float64],
    share: NDArray[np.float64] | None,
    crop: Crop,
    x_edges: NDArray[np.float64],
    y_edges: NDArray[np.float64],
) -> tuple[float, float]:
    """Center of the part of a region that is in the crop: of its mask, if that has any area there."""
    if share is not None and (total := share.sum()) > 0:
        x = share.sum(axis=0) @ (x_edges[:-1] + x_edges[1:]) / 2 / total
        y = share.sum(axis=1) @ (y_edges[:-1] + y_edges[1:]) / 2 / total
        return float(x), float(y)
    x0, y0, x1, y1 = np.clip(box, (crop.x0, crop.y0) * 2, (crop.x1, crop.y1) * 2).tolist()
    return (x0 + x1) / 2, (y0 + y1) / 2
