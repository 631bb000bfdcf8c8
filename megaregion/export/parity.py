"""How far the features of two encoders are apart; the one file that loads transformers.

Shapes: B images, T = 1 + P image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaregion.checkpoint.pretrained import EncoderFolder, Pretrained, is_encoder_folder, open_pretrained
from megaregion.config import DataConfig, ModelConfig
from megaregion.data.image import open_image
from megaregion.data.sample import BadSample
from megaregion.data.transforms import EvalTransform
from megaregion.errors import UserError
from megaregion.models import VisionTransformer

Features = Callable[[Tensor], tuple[Tensor, Tensor]]

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Encoder:
    """An encoder whose features can be compared."""

    features: Features
    """From images [B, 3, H, W] to tokens [B, T, D] and the normed class token [B, D]."""
    model: ModelConfig
    """Size of its training images and of a patch."""
    data: DataConfig
    """Mean and deviation of its images."""


@dataclass(frozen=True)
class Difference:
    """How two encoders differ on one size of images."""

    height: int
    width: int
    patches: float
    """Largest difference of a patch token's value."""
    class_token: float
    """Largest difference of a class token's value."""
    pooled: float
    """Largest difference of a normed class token's value."""
    share: float
    """The largest of the three, each as a share of the largest feature of its kind."""


def load_transformer(pretrained: Pretrained, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """Build the transformer of some weights in float32, rounded to a type on the way."""
    vit = VisionTransformer(pretrained.model)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.copy_(pretrained.read(name).to(dtype))
    return vit.eval()


def open_encoder(path: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    """Open a checkpoint with our code, its weights rounded to `dtype`, or an HF folder with transformers.

    Raises:
        UserError: It is neither, or another architecture.
    """
    if not is_encoder_folder(path):
        pretrained = open_pretrained(path)
        vit = load_transformer(pretrained, dtype)

        def ours(images: Tensor) -> tuple[Tensor, Tensor]:
            tokens = vit(images).image
            return tokens, vit.pool(tokens[:, 0])

        return Encoder(ours, pretrained.model, pretrained.data)
    folder = EncoderFolder(path)
    if folder.architecture != "MLCD":
        raise UserError(
            f"{path} is a {folder.architecture} tower, whose features are not those of its weights here; "
            "convert it with from-hf and check what was written"
        )
    from transformers import AutoModel, logging

    from megaregion.export.modeling_megaregion import RegionVisionModel, RegisterVisionModel

    logging.disable_progress_bar()
    # Our class and not the folder's copy of it: a check runs no foreign code.
    own = RegisterVisionModel if folder.model.registers else RegionVisionModel
    kind: Any = own if folder.of_regions else AutoModel
    model = kind.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()

    def theirs(images: Tensor) -> tuple[Tensor, Tensor]:
        output = model(pixel_values=images)
        return output.last_hidden_state, output.pooler_output

    return Encoder(theirs, folder.model, folder.data)


@torch.no_grad()
def compare(a: Encoder, b: Encoder, pictures: Sequence[Path] = ()) -> list[Difference]:
    """Compare all features at a's training size, at a larger one and at a non-square one.

    Pictures are stretched to these sizes; noise is looked at if there is none.

    Raises:
        UserError: The encoders' patches or features have different shapes, or a picture cannot be read.
    """
    side, patch = a.model.image_size, a.model.patch_size
    if patch != b.model.patch_size:
        raise UserError(f"check: patches of {patch} and {b.model.patch_size} px cannot be compared")
    found = []
    for height, width in ((side, side), (side + patch, side + patch), (side + patch, side)):
        images = _pixels(pictures, EvalTransform(a.data, a.model, (height, width)))
        (ours, our_pool), (theirs, their_pool) = a.features(images), b.features(images)
        if ours.shape != theirs.shape:
            raise UserError(
                f"check: features of {list(ours.shape[1:])} and {list(theirs.shape[1:])} tokens and values "
                "cannot be compared"
            )
        pairs = ((ours[:, 1:], theirs[:, 1:]), (ours[:, 0], theirs[:, 0]), (our_pool, their_pool))
        patches, class_token, pooled = (float((x - y).abs().max()) for x, y in pairs)
        tops = zip((patches, class_token, pooled), pairs, strict=True)
        share = max(top / float(x.abs().max()) for top, (x, _) in tops)
        found.append(Difference(height, width, patches, class_token, pooled, share))
    return found


def picture_files(folder: Path, count: int = 8) -> list[Path]:
    """The first images of a folder, by name.

    Raises:
        UserError: There is none.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)[:count]
    if not files:
        raise UserError(f"--images: {folder} holds no image ({', '.join(PICTURES)})")
    return files


def _pixels(pictures: Sequence[Path], transform: EvalTransform) -> Tensor:
    if not pictures:
        noise = torch.Generator().manual_seed(0)
        return torch.randn(1, 3, transform.height, transform.width, generator=noise)
    images = []
    for picture in pictures:
        try:
            pixels, _ = transform(open_image(picture.read_bytes()), boxes=[])
        except (BadSample, OSError) as error:
            raise UserError(f"--images: {picture}: {error}; take it out of the folder") from error
        images.append(pixels)
    return torch.stack(images)
