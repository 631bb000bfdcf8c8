"""The run's network as an encoder of regions: with the weights of a checkpoint, or as it began.

Shapes: B images of a batch, N regions an image (the most of any image of the batch), P patches, R regions
of the batch one after another, D width, E embedding width, V text classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megaregion.checkpoint.format import step_folder
from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint, find_checkpoint
from megaregion.config import RunConfig, config_from_dict
from megaregion.data.sample import Box
from megaregion.data.transforms import EvalTransform
from megaregion.errors import UserError
from megaregion.evaluation.encoders import BoxedImage, Features
from megaregion.heads.centers import random_centers
from megaregion.models import RegionEncoder, initialise

BODY = "body.weight."
HEAD = "head.{}.weight"


class NetworkEncoder:
    """Region tokens of a network, after its last norm; padded to one batch, never cropped.

    Args:
        name: Name in the table.
        model: The network.
        transform: Resizes whole images, as the model expects them.
        device: Where the model computes, e.g. "cpu".
        projected: Compare regions by the heads' embeddings instead of the exported features.
        text_centers: Weight of the text head, [V, E]; None without one.
    """

    def __init__(
        self,
        name: str,
        model: RegionEncoder,
        transform: EvalTransform,
        device: str = "cpu",
        projected: bool = False,
        text_centers: NDArray[np.float32] | None = None,
    ) -> None:
        self.name = name
        self.text_centers = text_centers
        self._model = model.to(device).eval()
        self._transform = transform
        self._device = device
        self._projected = projected

    @property
    def model(self) -> RegionEncoder:
        """The network itself."""
        return self._model

    def prepare(
        self, image: Image.Image, boxes: Sequence[Box], size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One image as the model reads it, at the training size or at another.

        Args:
            image: RGB.
            boxes: Regions, in pixels of the image.
            size: Height and width; multiples of the patch.

        Returns:
            Pixels [1, 3, H, W] and which region sees which patch [1, N, P], on the model's device.
        """
        transform = self._transform if size is None else EvalTransform(
            self._transform.data, self._model.vit.config, size
        )  # fmt: skip
        pixels, visible = transform(image, boxes)
        return pixels[None].to(self._device), visible[None].to(self._device)

    @torch.inference_mode()
    def encode(self, items: Sequence[BoxedImage]) -> Features:
        """Encode every image once, and all its regions with it.

        Returns:
            Region features [R, D] (or the embeddings, if so asked) and embeddings [R, E], image by image.
        """
        images, visible, real = self._batch(items)
        tokens = self._model.vit(images, visible, regions_only=True)
        region = self._model.vit.pool(tokens.regions)[real]
        embedding = self._model.projection(region)
        return Features(_array(embedding if self._projected else region), _array(embedding))

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Feature of each whole image: its class token after the last norm, [B, D]."""
        pixels = torch.stack([self._transform(image, [])[0] for image in images]).to(self._device)
        tokens = self._model.vit(pixels).image
        return _array(self._model.vit.pool(tokens[:, 0]))

    @torch.inference_mode()
    def maps(self, images: Sequence[Image.Image]) -> list[NDArray[np.float32]]:
        """Patch features of each image at the training size, [h, w, D] each; see :func:`patch_map`."""
        pixels = torch.stack([self._transform(image, [])[0] for image in images]).to(self._device)
        return list(_array(patch_map(self._model, pixels)))

    def _batch(self, items: Sequence[BoxedImage]) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, H, W], what their regions see [B, N, P], and which regions are real [B, N]."""
        counts = torch.tensor([len(item.boxes) for item in items])
        real = torch.arange(max(1, int(counts.max()))) < counts[:, None]
        images, seen = zip(*(self._transform(item.image, item.boxes.tolist()) for item in items), strict=True)
        # A padding region sees the whole image: any would do, but one that sees nothing has no softmax.
        visible = torch.ones(*real.shape, seen[0].shape[-1], dtype=torch.bool)
        visible[real] = torch.cat(seen)
        return torch.stack(images).to(self._device), visible.to(self._device), real.to(self._device)


def patch_map(model: RegionEncoder, pixels: Tensor) -> Tensor:
    """Patch features as models that build on an encoder read them: those that enter the last block.

    No loss ever reaches what the last block makes of a patch, for region tokens read keys and values of
    what enters it; LLaVA-style models leave that block out for the same reason.

    Args:
        model: The network.
        pixels: Normalised images, [B, 3, H, W].

    Returns:
        [B, h, w, D], after the last norm.
    """
    entering: list[Tensor] = []
    last = model.vit.blocks[-1]
    hook = last.register_forward_pre_hook(lambda block, inputs: entering.append(inputs[0]))
    try:
        model.vit(pixels)
    finally:
        hook.remove()
    side = model.vit.config.patch_size
    rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
    tokens = entering[0].unflatten(0, (len(pixels), -1))
    return model.vit.pool(tokens[:, 1:]).unflatten(1, (rows, columns))


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
        """The network with the checkpoint's weights.

        Raises:
            UserError: The checkpoint lacks a parameter, or one has another shape.
        """
        model = self._model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = self._read(BODY + name)
                if value.shape != parameter.shape:
                    raise UserError(
                        f"{self.reader.folder}: {BODY}{name} has the shape {list(value.shape)}, its settings "
                        f"ask for {list(parameter.shape)}; the checkpoint and its config do not match"
                    )
                parameter.copy_(value)
        return NetworkEncoder("trained", model, self._transform, device, projected, self._centers("text"))

    def untrained(self, device: str = "cpu", projected: bool = False) -> NetworkEncoder:
        """The same network with the weights that the run began with."""
        model, centers = self._model(), None
        initialise(model, self.config.seed)
        if HEAD.format("text") in self.reader.names():
            classes, width = self.reader.shape(HEAD.format("text"))
            centers = _array(random_centers(self.config.seed, "text", range(classes), width))
        return NetworkEncoder("untrained", model, self._transform, device, projected, centers)

    def object_centers(self) -> NDArray[np.float32] | None:
        """Weight of the object head, [K, E]; None if the run has none."""
        return self._centers("object")

    def _model(self) -> RegionEncoder:
        return RegionEncoder(self.config.model, self.config.head.embedding_dim)

    @property
    def _transform(self) -> EvalTransform:
        return EvalTransform(self.config.data, self.config.model)

    def _centers(self, kind: str) -> NDArray[np.float32] | None:
        name = HEAD.format(kind)
        return _array(self._read(name)) if name in self.reader.names() else None

    def _read(self, name: str) -> Tensor:
        try:
            return self.reader.read(name)
        except DamagedCheckpoint as error:
            raise UserError(f"{error}; evaluate another step with --checkpoint") from None


def open_run(path: Path, step: int | None = None) -> TrainedRun:
    """Open a run's checkpoint and check it against its checksums.

    Args:
        path: A run folder, its checkpoints folder or one checkpoint's folder.
        step: Which step of a run folder; the newest if None.

    Raises:
        UserError: There is no such checkpoint, or it is damaged.
    """
    folder = find_checkpoint(path if step is None else step_folder(path / "checkpoints", step))
    try:
        reader = CheckpointReader(folder)
        reader.verify()
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; evaluate another step with --checkpoint") from None
    return TrainedRun(reader, config_from_dict(reader.manifest["config"]))


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array
