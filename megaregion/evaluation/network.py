"""The run's network as an encoder of regions: with the weights of a checkpoint, or as it began.

Shapes: B images of a batch, N regions an image (the most of any image of the batch), P patches, h x w of
them, R regions of the batch one after another, D width, E embedding width, V text classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from megaregion.checkpoint.format import ENCODER, step_folder
from megaregion.checkpoint.reader import (
    CheckpointReader,
    DamagedCheckpoint,
    copy_again,
    open_checkpoint,
    run_config,
)
from megaregion.config import DataConfig, RunConfig
from megaregion.data.sample import Box
from megaregion.data.transforms import EvalTransform
from megaregion.errors import UserError
from megaregion.evaluation.encoders import BoxedImage, Features, Floats, PooledEncoder, as_array, pixels_of
from megaregion.heads.centers import random_centers
from megaregion.models import RegionEncoder, initialise
from megaregion.schemas.evaluation import TRAINED


@dataclass(frozen=True)
class NetworkEncoder:
    """Region tokens of a network, after its last norm; padded to one batch, never cropped."""

    name: str
    model: RegionEncoder
    data: DataConfig
    """Mean and deviation of its images."""
    device: str = "cpu"
    projected: bool = False
    """Compare regions by the heads' embeddings instead of the exported features."""
    text_centers: Floats | None = None
    """Weight of the text head, [V, E]; None without one."""
    names_images: ClassVar[bool] = True
    sees_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.model.to(self.device).eval()

    def reading(self, tokens: int) -> NetworkEncoder:
        """The same, whose text head names one of the first so many classes."""
        centers = self.text_centers
        return replace(self, text_centers=None if centers is None else centers[:tokens])

    @cached_property
    def transform(self) -> EvalTransform:
        """Resizes whole images to the training size."""
        return EvalTransform(self.data, self.model.vit.config)

    def prepare(self, image: Image.Image, boxes: Sequence[Box], side: int) -> tuple[Tensor, Tensor]:
        """Pixels [1, 3, H, W] and which region sees which patch [1, N, P], on the model's device.

        Boxes are in pixels of the image; side is the longest at which the network reads it, in pixels; it is
        rounded to whole patches.
        """
        config = self.model.vit.config
        size = fitting_size(image.size, side, config.patch_size)
        pixels, visible = EvalTransform(self.data, config, size)(image, boxes)
        return pixels[None].to(self.device), visible[None].to(self.device)

    @torch.inference_mode()
    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Features [R, D] (or embeddings, if so asked) and embeddings [R, E]; an image is encoded once."""
        counts = torch.tensor([len(item.boxes) for item in images])
        real = torch.arange(max(1, int(counts.max()))) < counts[:, None]
        pixels, seen = zip(
            *(self.transform(item.image, item.boxes.tolist(), item.masks) for item in images), strict=True
        )
        # A padding region sees the whole image: any would do, but one that sees nothing has no softmax.
        visible = torch.ones(*real.shape, seen[0].shape[-1], dtype=torch.bool)
        visible[real] = torch.cat(seen)
        vit = self.model.vit
        tokens = vit(torch.stack(pixels).to(self.device), visible.to(self.device), regions_only=True)
        region = vit.pool(tokens.regions)[real.to(self.device)]
        embedding = self.model.projection(region)
        return Features(as_array(embedding if self.projected else region), as_array(embedding))

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Floats:
        """Feature of each whole image: its class token after the last norm, [B, D]."""
        tokens = self.model.vit(pixels_of(images, self.transform, self.device)).image
        return as_array(self.model.vit.pool(tokens[:, 0]))

    @torch.inference_mode()
    def maps(self, images: Sequence[Image.Image]) -> list[Floats]:
        """Patch features of each image at the training size, [h, w, D] each; see :func:`patch_map`."""
        return list(as_array(patch_map(self.model, pixels_of(images, self.transform, self.device))))

    def pooled(self) -> PooledEncoder:
        """The same network without its region tokens: regions as the mean of their patches."""
        return PooledEncoder(f"{self.name}/pooled", self.maps, self.transform)


def fitting_size(size: tuple[int, int], side: int, patch: int) -> tuple[int, int]:
    """Height and width in whole patches, for a picture of this width and height and a longest side."""
    scale = side / max(size)
    width, height = (max(1, round(edge * scale / patch)) * patch for edge in size)
    return height, width


# ---- inside the last block -------------------------------------------------------------------------


def patch_map(model: RegionEncoder, pixels: Tensor) -> Tensor:
    """Patch features that enter the last block, from normalised images [B, 3, H, W] to [B, h, w, D].

    Without a teacher no loss ever reaches what the last block makes of a patch, for region tokens read keys
    and values of what enters it; LLaVA-style models leave that block out for the same reason. The last norm
    is applied.
    """
    entering, _ = _last_block(model, pixels)
    tokens = entering[0].unflatten(0, (len(pixels), -1))
    return model.vit.pool(tokens[:, model.vit.config.leading :]).unflatten(1, _grid(model, pixels))


class Attention(NamedTuple):
    """Attention over patches, mean over heads, [N, h, w] each; an image's weights sum to at most 1."""

    inside: Floats
    """As the network computes it: zero outside of the region."""
    anywhere: Floats
    """The same query without its mask."""


@torch.inference_mode()
def region_attention(model: RegionEncoder, pixels: Tensor, visible: Tensor) -> Attention:
    """Attention in the last block of one image's [1, 3, H, W] region tokens, which see patches [1, N, P]."""
    (image, regions, angles, mask, *_), written = _last_block(model, pixels, visible)
    last: Any = model.vit.blocks[-1]
    # A copy of the block for regions reads what the block has written, shared weights what enters it.
    block, image = (last, image) if last.region is None else (last.region, written[0])
    query = block.attention.project_regions(block.norm1(regions), angles, visible.shape[1])
    _, key, _ = block.attention.project(block.norm1(image), angles)
    scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
    # From [1, heads, N, T]; what comes before the patches has weights of its own.
    leading = model.vit.config.leading
    weights = (each.float().softmax(dim=-1).mean(dim=1)[0, :, leading:] for each in (scores + mask, scores))
    return Attention(*(as_array(each.unflatten(1, _grid(model, pixels))) for each in weights))


def _last_block(model: RegionEncoder, *inputs: Tensor) -> tuple[Any, Any]:
    """What enters the last block when the network reads these inputs, and what it writes."""
    seen: list[Any] = []
    hook = model.vit.blocks[-1].register_forward_hook(
        lambda _, entering, written: seen.append((entering, written))
    )
    try:
        model.vit(*inputs)
    finally:
        hook.remove()
    return seen[0]


def _grid(model: RegionEncoder, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    patch = model.vit.config.patch_size
    return pixels.shape[-2] // patch, pixels.shape[-1] // patch


# ---- the run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint opened for evaluation."""

    reader: CheckpointReader
    config: RunConfig

    @property
    def step(self) -> int:
        """Optimizer steps behind the weights."""
        return self.reader.step

    @property
    def folder(self) -> Path:
        """The run's folder, where its metrics lie and its report belongs."""
        step = self.reader.folder
        return step.parent.parent if step.parent.name == "checkpoints" else step

    def trained(self, device: str = "cpu", projected: bool = False) -> NetworkEncoder:
        """The network with the checkpoint's weights; a UserError where one is missing or of another shape."""
        model = self._model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = self._read(self.reader.encoder(name))
                if value.shape != parameter.shape:
                    raise UserError(
                        f"{self.reader.folder}: {ENCODER}{name} has the shape {list(value.shape)}, its "
                        f"settings ask for {list(parameter.shape)}; the checkpoint and its config differ"
                    )
                parameter.copy_(value)
        return NetworkEncoder(TRAINED, model, self.config.data, device, projected, self.centers("text"))

    def untrained(self, device: str = "cpu", projected: bool = False) -> NetworkEncoder:
        """The same network with the weights that the run began with."""
        model, centers = self._model(), None
        initialise(model, self.config.seed)
        if _head("text") in self.reader.names():
            classes, width = self.reader.shape(_head("text"))
            centers = as_array(random_centers(self.config.seed, "text", range(classes), width))
        return NetworkEncoder("untrained", model, self.config.data, device, projected, centers)

    def _model(self) -> RegionEncoder:
        return RegionEncoder(self.config.model, self.config.head.embedding_dim)

    def centers(self, kind: str) -> Floats | None:
        """Weight of the object or the text head, [classes, E]; None if the run has none."""
        return as_array(self._read(_head(kind))) if _head(kind) in self.reader.names() else None

    def _read(self, name: str) -> Tensor:
        try:
            return self.reader.read(name)
        except DamagedCheckpoint as error:
            raise copy_again(error) from None


def _head(kind: str) -> str:
    return f"head.{kind}.weight"


def open_run(path: Path, step: int | None = None) -> TrainedRun:
    """Open a step of a run folder, the newest if None, or a checkpoint's folder; checksums must match.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    reader = open_checkpoint(path if step is None else step_folder(path / "checkpoints", step))
    return TrainedRun(reader, run_config(reader))
