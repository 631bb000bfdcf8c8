"""A batch: the samples of some positions as tensors.

Shapes: B samples, N regions of each, P patches in row-major order, T label slots, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

OBJECT, TEXT = 0, 1
"""Values of Batch.kinds."""

Color = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class TransformedSample:
    """One sample, ready to be stacked."""

    key: str
    position: int
    pixels: NDArray[np.uint8]
    """RGB, [H, W, 3]."""
    visible: NDArray[np.bool_]
    """[N, P]."""
    kinds: NDArray[np.int8]
    """[N]."""
    labels: NDArray[np.int64]
    """[N, T], padded with -1."""
    patch: int = 0
    """Side of a patch, in pixels, where samples of any size are to share one sequence; 0 to stack them."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of consecutive positions.

    Pixels travel as bytes, a quarter of the floats, between processes and to the device; `images`
    makes the floats where the batch is.
    """

    positions: Tensor
    """Places in the stream, int64 [B]."""
    keys: list[str]
    """Names of the samples, B of them."""
    pixels: Tensor
    """RGB, uint8 [B, 3, H, W]; of a packed batch the patches of all images in turn, [S, 3, p, p]."""
    visible: Tensor
    """True where a region sees a patch, bool [B, N, P]; of a packed batch [N, S]."""
    kinds: Tensor
    """OBJECT or TEXT, int8 [B, N]."""
    labels: Tensor
    """Positive classes, int64 [B, N, T], padded with -1; objects use slot 0 only."""
    mean: Color
    """Subtracted from R, G, B on the 0..1 scale."""
    std: Color
    """Divides R, G, B on the 0..1 scale."""
    grids: tuple[tuple[int, int], ...] | None = None
    """Rows and columns of each image's patches in a packed batch; None where all images have one size."""
    bad_keys: list[str] = field(default_factory=list)
    """Samples that could not be used and were replaced."""
    bad_reasons: list[str] = field(default_factory=list)
    """What was wrong with each of `bad_keys`."""
    empty: int = 0
    """Samples replaced because their crop held no region; nothing is wrong with them."""
    dropped_regions: int = 0
    """Regions left out because their box has no area inside its image."""
    lost: int = 0
    """Samples of `bad_keys` whose shard could not be read."""

    @property
    def bad(self) -> int:
        """Number of samples that could not be used and were replaced."""
        return len(self.bad_keys)

    @cached_property
    def images(self) -> Tensor:
        """Normalised pixels, float32 [B, 3, H, W], on the batch's device."""
        return normalise(self.pixels, self.mean, self.std)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory the copy does not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies on its own; as it is without a GPU."""
        return self._each(Tensor.pin_memory) if torch.cuda.is_available() else self

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            positions=change(self.positions),
            pixels=change(self.pixels),
            visible=change(self.visible),
            kinds=change(self.kinds),
            labels=change(self.labels),
        )


def collate(samples: Sequence[TransformedSample], mean: Color, std: Color) -> Batch:
    """Stack samples of one size, or pack samples of any size into one sequence of patches.

    Args:
        samples: B samples in the order of their positions.
        mean: Mean of R, G, B on the 0..1 scale.
        std: Standard deviation of R, G, B on the 0..1 scale.
    """
    grids, layout = None, _stack
    if samples[0].patch:
        grids, layout = tuple(_grid(sample) for sample in samples), _pack
    pixels, visible = layout(samples)
    return Batch(
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        keys=[sample.key for sample in samples],
        pixels=pixels,
        visible=visible,
        kinds=torch.from_numpy(np.stack([sample.kinds for sample in samples])),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
        mean=mean,
        std=std,
        grids=grids,
    )


def _stack(samples: Sequence[TransformedSample]) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    visible = torch.from_numpy(np.stack([sample.visible for sample in samples]))
    return pixels.permute(0, 3, 1, 2).contiguous(), visible


def _pack(samples: Sequence[TransformedSample]) -> tuple[Tensor, Tensor]:
    patches = []
    for sample in samples:
        (rows, columns), side = _grid(sample), sample.patch
        cut = sample.pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        patches.append(cut.reshape(rows * columns, 3, side, side))
    visible = np.concatenate([sample.visible for sample in samples], axis=1)
    return torch.from_numpy(np.concatenate(patches)), torch.from_numpy(visible)


def _grid(sample: TransformedSample) -> tuple[int, int]:
    height, width = sample.pixels.shape[:2]
    return height // sample.patch, width // sample.patch


def normalise(pixels: Tensor, mean: Color, std: Color) -> Tensor:
    """Bring bytes to zero mean and unit deviation.

    Args:
        pixels: RGB, uint8 [..., 3, H, W].
        mean: Mean of R, G, B on the 0..1 scale.
        std: Standard deviation of R, G, B on the 0..1 scale.

    Returns:
        float32 [..., 3, H, W] on the same device.
    """
    deviation = torch.tensor(std, dtype=torch.float32, device=pixels.device).view(3, 1, 1) * 255
    shift = torch.tensor(mean, dtype=torch.float32, device=pixels.device).view(3, 1, 1) * 255
    return pixels.to(torch.float32).sub_(shift).div_(deviation)
