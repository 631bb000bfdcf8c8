"""An encoder of whole images as MTEB takes it for its image tasks; nothing else here needs mteb."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from PIL import Image

from megaregion.errors import UserError
from megaregion.evaluation.encoders import Floats


class EncodesImages(Protocol):
    """What :func:`mteb_model` asks of an encoder."""

    @property
    def name(self) -> str:
        """Name of its results."""

    def images(self, images: list[Image.Image]) -> Floats:
        """Encode whole images, RGB, [B, C]."""


def mteb_model(encoder: EncodesImages, revision: str = "unknown") -> Any:
    """A model for ``mteb.evaluate(model, tasks)``, with cosine similarity and images as its one modality.

    Raises:
        UserError: mteb is not installed.
    """
    try:
        from mteb.models.abs_encoder import AbsEncoder
        from mteb.models.model_meta import ModelMeta
    except ImportError as error:
        raise UserError(f"mteb cannot be imported ({error}); install it: pip install mteb") from None

    class Model(AbsEncoder):  # type: ignore[misc]
        """Encodes the images of a task's batches; a task that gives text is refused."""

        mteb_model_meta = ModelMeta(
            loader=None, name=f"megaregion/{encoder.name.replace('/', '-')}", revision=revision,
            release_date=None, languages=None, n_parameters=None, memory_usage_mb=None, max_tokens=None,
            embed_dim=None, license=None, open_weights=None, public_training_code=None,
            public_training_data=None, framework=["PyTorch"], similarity_fn_name="cosine",
            use_instructions=False, training_datasets=None, modalities=["image"],
        )  # fmt: skip

        def encode(self, inputs: Any, **_: Any) -> Floats:
            """Embeddings of all batches, [N, C]."""
            parts = []
            for batch in inputs:
                if batch.get("image") is None:
                    raise UserError(
                        "this MTEB task asks for text; an image encoder takes tasks of images alone"
                    )
                parts.append(encoder.images([image.convert("RGB") for image in batch["image"]]))
            return np.concatenate(parts)

    return Model()
