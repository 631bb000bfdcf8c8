"""Networks of transformers: from folders that save_pretrained wrote, and asked in batches of one shape.

Rows of many images share a batch, so that an image with few regions leaves no GPU idle. All batches have the
same shape, the last one is padded: so no result depends on what else is in a batch. On a GPU weights are
bf16, and nothing waits for it but who takes a result, some batches later. On a processor weights are fp32.

Shapes: B rows of a batch, s side in pixels of a network's square, C channels.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaregion.curation.embeddings import unit
from megaregion.curation.picture import Pixels, resize
from megaregion.errors import UserError
from megaregion.models import foreign

Item = TypeVar("Item")
Row = tuple[NDArray[Any], ...]
"""What a network reads of one crop or image, an array for each of its operands."""
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of R, G, B on the 0..1 scale."""

CLIP_STATISTICS: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PROCESSOR_ROWS = 16
"""Rows of a batch on a processor: more is not faster there."""
GPU_ROWS = 512
"""Most rows of a batch on a GPU; a ViT-L fills one with fewer."""
FLYING = 2
"""Batches that a GPU may still work on when the next is sent."""


class _Sent(NamedTuple):
    """A batch that is on its way."""

    told: Tensor
    """On the host as soon as ``event`` says so, [B, ...]."""
    kept: Sequence[Any]
    """What stays on the device, one of each row; or nothing."""
    event: torch.cuda.Event | None
    rows: int

    def results(self) -> Iterator[tuple[NDArray[Any], Any]]:
        """Waits; what was told, and kept, of each row that is no padding."""
        if self.event is not None:
            self.event.synchronize()
        for row in range(self.rows):
            yield self.told[row].numpy(), self.kept[row] if self.kept else None


class Batches:
    """Sends rows of many images through a network.

    Args:
        network: From operands on the device, [B, ...] each, to what the host is told of each row, [B, ...],
            and what is kept on the device of each row.
        device: Where the operands go.
        rows: B.
    """

    def __init__(
        self, network: Callable[..., tuple[Tensor, Sequence[Any]]], device: torch.device, rows: int
    ) -> None:
        self._network, self._device, self.rows = network, device, rows
        self._flying = FLYING if device.type == "cuda" else 0

    def stream(
        self, images: Iterable[tuple[Item, Sequence[Row]]]
    ) -> Iterator[tuple[Item, list[tuple[NDArray[Any], Any]]]]:
        """Each item with the results of its rows, in order; it may have no rows."""
        rows: list[Row] = []
        flying, ready = deque[_Sent](), deque[tuple[NDArray[Any], Any]]()
        waiting = deque[tuple[Item, int]]()
        for item, own in images:
            waiting.append((item, len(own)))
            rows += own
            while len(rows) >= self.rows:
                flying.append(self._send(rows[: self.rows]))
                del rows[: self.rows]
                if len(flying) > self._flying:
                    ready += flying.popleft().results()
            while waiting and len(ready) >= waiting[0][1]:
                item, count = waiting.popleft()
                yield item, [ready.popleft() for _ in range(count)]
        if rows:
            flying.append(self._send(rows))
        for sent in flying:
            ready += sent.results()
        for item, count in waiting:
            yield item, [ready.popleft() for _ in range(count)]

    def _send(self, rows: Sequence[Row]) -> _Sent:
        filled = [*rows, *[rows[-1]] * (self.rows - len(rows))]
        operands = []
        for values in zip(*filled, strict=True):
            operand = self._pinned((self.rows, *values[0].shape), torch.from_numpy(values[0]).dtype)
            np.stack(values, out=operand.numpy())
            operands.append(operand)
        return self.enqueue(operands, len(rows))

    def enqueue(self, operands: Sequence[Tensor], rows: int) -> _Sent:
        """Start a batch of which so many rows count; the host waits for nothing."""
        with torch.no_grad():
            found, kept = self._network(*(each.to(self._device, non_blocking=True) for each in operands))
            if self._device.type != "cuda":
                return _Sent(found.float(), kept, None, rows)
            told = self._pinned(found.shape, torch.float32)
            told.copy_(found.float(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Sent(told, kept, event, rows)

    def _pinned(self, shape: Sequence[int], kind: torch.dtype) -> Tensor:
        # Torch uses such memory again only when the copy that was started from it has ended.
        on_gpu = self._device.type == "cuda"
        return torch.zeros(0, dtype=kind).new_empty(tuple(shape), pin_memory=on_gpu)


def fitting_rows(run: Callable[[int], Any], device: torch.device, most: int) -> int:
    """Rows of a batch, a power of two, for which half of a GPU's free memory suffices; ``run`` tries some."""
    if device.type != "cuda":
        return min(most, PROCESSOR_ROWS)
    run(1)  # Also what is made once.
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(2)
    each = max(1, (torch.cuda.max_memory_allocated(device) - before) // 2)
    room = torch.cuda.mem_get_info(device)[0] // 2
    return min(most, 2 ** int(math.log2(max(1, room // each))))


class PretrainedEmbedder:
    """The pooled output of a vision encoder, or its class token; crops are squeezed to a square.

    Args:
        model: The network.
        where: Its device.
        statistics: Of the pixels that it expects.
        side: Of the square, in pixels.
        rows: Crops of a batch; 0 takes what a GPU's memory allows.
    """

    def __init__(
        self, model: Any, where: torch.device, statistics: Statistics, side: int, rows: int = 0
    ) -> None:
        self.side = side
        network = partial(_pooled, model, normaliser(statistics, where, model.dtype))
        blank = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=where)
        with torch.no_grad():
            self.dim = int(network(blank)[0].shape[1])
            rows = rows or fitting_rows(lambda n: network(blank.expand(n, -1, -1, -1)), where, GPU_ROWS)
        self.batches = Batches(network, where, rows)

    def stream(
        self, images: Iterable[tuple[Item, Sequence[Pixels]]]
    ) -> Iterator[tuple[Item, NDArray[np.float32]]]:
        """Embed the crops of many images, see :class:`megaregion.curation.engines.Embedder`."""
        squares = ((item, [(squeezed(crop, self.side),) for crop in crops]) for item, crops in images)
        for item, found in self.batches.stream(squares):
            vectors = np.reshape([told for told, _ in found], (len(found), self.dim))
            yield item, unit(vectors)

    def embed(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        """Embed crops, see :class:`megaregion.curation.engines.Embedder`."""
        [(_, vectors)] = self.stream([(None, crops)])
        return vectors


def load_encoder(folder: Path, clip: bool = False) -> PretrainedEmbedder:
    """The embedder with a folder's weights, of CLIP or of any vision encoder.

    Raises UserError where they cannot be loaded, or are no vision encoder's.
    """
    kind, config = _clip() if clip else _encoder(folder)
    # The folders that --clip takes may have no processor, or one for another use.
    statistics, side = (CLIP_STATISTICS, 0) if clip else read_processor(folder)
    model, where = load_model(kind, folder, config)
    if model.main_input_name != "pixel_values":
        raise UserError(f"{folder} holds {kind.__name__}, which is no vision encoder; give one of images")
    side = side or model.config.image_size
    return PretrainedEmbedder(model, where, statistics, int(side if isinstance(side, int) else side[0]))


def squeezed(crop: Pixels, side: int) -> Pixels:
    """A crop at the size of a square, which it may have already."""
    return crop if crop.shape[:2] == (side, side) else resize(crop, side, side)


def normaliser(statistics: Statistics, where: torch.device, kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    """From uint8 [B, h, w, 3] to a network's pixels, [B, 3, h, w]."""
    mean, std = (
        255 * torch.tensor(values, dtype=torch.float32, device=where).view(3, 1, 1) for values in statistics
    )
    return lambda pixels: ((pixels.permute(0, 3, 1, 2) - mean) / std).to(kind)


def _pooled(
    model: Any, normalise: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[Tensor, Sequence[Any]]:
    return foreign.pooled(model(**foreign.inputs(model, normalise(images)))), ()


def _clip() -> tuple[Any, Any]:
    from transformers import CLIPVisionModel

    return CLIPVisionModel, None


def _encoder(folder: Path) -> tuple[Any, Any]:
    """Class and settings of a folder's vision part; code of a folder is never run, nor of our exports."""
    from transformers import MODEL_MAPPING, AutoConfig

    with loading(folder, "vision encoder"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        vision = getattr(config, "vision_config", config)
        return MODEL_MAPPING[type(vision)], vision


def read_processor(folder: Path, default: Statistics | None = None) -> tuple[Statistics, int]:
    """What preprocessor_config.json says of mean and deviation, and of the side in pixels, 0 if nothing.

    Raises UserError where it is missing or damaged; with a default a missing one will do.
    """
    path = folder / "preprocessor_config.json"
    if default is not None and not path.exists():
        return default, 0
    try:
        found = json.loads(path.read_text())
        size = found.get("crop_size") if found.get("do_center_crop", True) else None
        size = size or found.get("size") or 0
        side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge") or 0
        mean, std = (tuple(map(float, found[key])) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError
        return (mean, std), int(side)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is missing or has no image_mean and image_std of three numbers, by which the encoder's "
            "pixels are normalised; copy it from where the weights come from"
        ) from None


def device() -> torch.device:
    """A GPU if there is one; else the CPU, on one thread: workers are the unit of parallelism."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


@contextmanager
def loading(folder: Path, what: str) -> Iterator[None]:
    """Turn what transformers says of a folder that it cannot load into one line."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{folder} holds no {what} that can be loaded: {reason}") from None


def load_model(kind: Any, folder: Path, config: Any = None) -> tuple[Any, torch.device]:
    """Load a model of a class for inference on a device, from safetensors alone and without the network.

    Raises UserError where the folder has no such model, or not all of its weights.
    """
    where = device()
    options: dict[str, Any] = {"config": config} if config is not None else {}
    with loading(folder, kind.__name__):
        model, report = kind.from_pretrained(
            folder,
            dtype=torch.bfloat16 if where.type == "cuda" else torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{folder} lacks {len(missing)} weights of {kind.__name__}, {missing[0]} first; "
            "give a folder that save_pretrained wrote"
        )
    return model.eval().to(where), where
