"""Masks of SAM, SAM 2 and all that AutoModelForMaskGeneration loads, from a grid of points on each image.

The images of a batch are embedded once. Their prompts go through the mask decoder in batches of one shape,
and what its own scores refuse is dropped on the device; only the runs of good masks reach the host.

Shapes: B images, s side in pixels of the network's square, P points prompted at once, M masks of an image,
3 to each point of the grid, t side of the decoder's masks, h x w pixels of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils._pytree import tree_map

from megaregion.curation.engines.pretrained import (
    Batches,
    Statistics,
    fitting_rows,
    load_model,
    loading,
    normaliser,
    read_processor,
)
from megaregion.curation.picture import Pixels, Proposal, resize
from megaregion.data.sample import RLE

Item = TypeVar("Item")
View = tuple[Pixels, NDArray[np.float32], tuple[int, int]]
"""The network's square, [s, s, 3], width and height of the image in it, and height and width of the image."""

STATISTICS: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PADDED = ("sam", "sam_hq")
"""Kinds of model that see an image with its aspect, in the upper left corner; others see it squeezed."""
POINTS = 64
"""Points that are prompted at once."""
MASKS = 64
"""Masks that are brought to an image's size at once."""
MOST = 8
"""Most images of a batch on a GPU; the decoder's work on one fills it anyway."""
MIN_IOU = 0.88
"""Masks whose own predicted IoU is less are dropped, as in SAM's automatic generator."""
MIN_STABILITY = 0.95
"""Masks whose area shrinks more when the threshold rises are dropped, likewise."""
STABILITY_OFFSET = 1.0
"""How far the threshold moves, in logits, when stability is judged."""


class SamProposer:
    """Masks from a grid of so many points a side, with least predicted IoU and stability.

    Args:
        model: The network.
        where: Its device.
        statistics: Of the pixels that it expects.
        grid: Points along each side.
        min_iou: Least predicted IoU.
        min_stability: Least stability.
        rows: Images of a batch; 0 takes 1 on a processor, and on a GPU what its memory allows.
    """

    def __init__(
        self,
        model: Any,
        where: torch.device,
        grid: int,
        statistics: Statistics = STATISTICS,
        min_iou: float = MIN_IOU,
        min_stability: float = MIN_STABILITY,
        rows: int = 0,
    ) -> None:
        self._model, self._normalise = model, normaliser(statistics, where, model.dtype)
        self._min_iou, self._min_stability = min_iou, min_stability
        _fix_places(model)
        self.view, self.side = _view(model.config), _side(model.config)
        steps = (torch.arange(grid, dtype=torch.float64, device=where) + 0.5) / grid
        down, across = torch.meshgrid(steps, steps, indexing="ij")
        self._grid = torch.stack((across, down), dim=-1).view(-1, 2)
        if where.type != "cuda":
            rows = rows or 1
        self.batches = Batches(self.masks, where, rows or fitting_rows(self._attempt, where, MOST))

    @torch.no_grad()
    def _attempt(self, images: int) -> None:
        where = self._grid.device
        blank = torch.zeros(images, self.side, self.side, 3, dtype=torch.uint8, device=where)
        self.masks(blank, torch.full((images, 2), float(self.side), device=where))

    def stream(self, images: Iterable[tuple[Item, View | None]]) -> Iterator[tuple[Item, list[Proposal]]]:
        """Propose a region for every good mask, see :class:`megaregion.curation.engines.Proposer`."""
        rows = (((item, view), [] if view is None else [view[:2]]) for item, view in images)
        for (item, view), found in self.batches.stream(rows):
            yield item, [] if view is None else self._proposals(*found[0], view)

    def masks(self, pixels: Tensor, extent: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """All masks of a batch.

        Args:
            pixels: uint8 [B, s, s, 3].
            extent: Width and height of the image in each square, [B, 2].

        Returns:
            Predicted IoU of each mask, and 1 where it is good, [B, 2, M]; and logits [M, t, t] of each image.
        """
        places = torch.arange(self.side, device=pixels.device)
        inside = (places < extent[:, 1:, None]).transpose(1, 2) & (places < extent[:, None, :1])
        features = self._model.get_image_embeddings(self._normalise(pixels) * inside[:, None])
        told, kept = [], []
        for number in range(len(pixels)):
            own = tree_map(itemgetter(slice(number, number + 1)), features)
            ious, logits = self._prompted(own, extent[number])
            high, low = ((logits > edge).sum((1, 2)) for edge in (STABILITY_OFFSET, -STABILITY_OFFSET))
            good = (ious >= self._min_iou) & (high >= self._min_stability * low) & (high > 0)
            told.append(torch.stack((ious, good.to(ious.dtype))))
            kept.append(logits)
        return torch.stack(told), kept

    def _prompted(self, features: Any, extent: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted IoU, [M], and logits, [M, t, t], of one image's masks; the last prompts are padded."""
        points = (self._grid * extent).float()
        count = min(POINTS, len(points))
        padded = torch.cat((points, points[-1:].expand(-len(points) % count, -1)))
        embedded: dict[str, Any] = {"image_embeddings": features}
        if isinstance(features, tuple):
            embedded = dict(zip(("image_embeddings", "intermediate_embeddings"), features, strict=True))
        ious, logits = [], []
        for prompts in padded.view(-1, count, 1, 2):
            labels = torch.ones((1, count, 1), dtype=torch.long, device=points.device)
            found = self._model(
                **embedded, input_points=prompts[None], input_labels=labels, multimask_output=True
            )
            ious.append(found.iou_scores.flatten().float())
            logits.append(found.pred_masks.flatten(0, 2))
        most = 3 * len(points)
        return torch.cat(ious)[:most], torch.cat(logits)[:most]

    def _proposals(self, told: NDArray[np.float32], logits: Tensor, view: View) -> list[Proposal]:
        """What is good at the image's size; waits for the device."""
        _, extent, size = view
        width, height = map(int, extent)
        chosen = np.flatnonzero(told[1])
        found: list[Proposal] = []
        for start in range(0, len(chosen), MASKS):
            rows = chosen[start : start + MASKS]
            small = logits[torch.from_numpy(rows).to(logits.device)]
            framed = encode_masks(self.enlarged(small, (height, width), size))
            pairs = zip(framed, told[0, rows].clip(0, 1).tolist(), strict=True)
            found += [Proposal(frame[0], score, frame[1]) for frame, score in pairs if frame is not None]
        return found

    @torch.no_grad()
    def enlarged(self, logits: Tensor, extent: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Masks, bool [n, h, w], of logits, [n, t, t]; given height and width in the square, and h and w."""
        height, width = extent
        large = interpolate(
            logits[:, None].float(), (self.side, self.side), mode="bilinear", align_corners=False
        )
        large = interpolate(large[..., :height, :width], size, mode="bilinear", align_corners=False)
        return large[:, 0] > 0


def load_sam(
    folder: Path, grid: int, min_iou: float = MIN_IOU, min_stability: float = MIN_STABILITY
) -> SamProposer:
    """The proposer with a folder's weights; raises UserError where they cannot be loaded."""
    from transformers import AutoModelForMaskGeneration

    statistics, _ = read_processor(folder, STATISTICS)
    model, where = load_model(AutoModelForMaskGeneration, folder)
    return SamProposer(model, where, grid, statistics, min_iou, min_stability)


def load_view(folder: Path) -> Callable[[Pixels], View]:
    """What makes a proposer's views; raises UserError where the folder has no settings of SAM."""
    from transformers import AutoConfig

    with loading(folder, "settings of SAM"):
        return _view(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def _view(config: Any) -> Callable[[Pixels], View]:
    return partial(fitted, side=_side(config), padded=config.model_type in PADDED)


def _side(config: Any) -> int:
    side = config.prompt_encoder_config.image_size
    return int(side if isinstance(side, int) else side[0])


def fitted(image: Pixels, side: int, padded: bool) -> View:
    """An image as SAM sees it."""
    height, width = image.shape[:2]
    shrink = side / max(height, width)
    columns, rows = (max(1, round(edge * shrink)) if padded else side for edge in (width, height))
    square = np.zeros((side, side, 3), dtype=np.uint8)
    square[:rows, :columns] = resize(image, columns, rows)
    return square, np.array([columns, rows], dtype=np.float32), (height, width)


def encode_masks(masks: Tensor) -> list[tuple[tuple[float, float, float, float], RLE] | None]:
    """Box and run lengths of each mask, bool [n, h, w], as encode_mask gives them; None of an empty one.

    Where runs end is found on the masks' device; nothing else travels.
    """
    changes, *sides = edges(masks)
    owner, place = torch.nonzero(changes).cpu().numpy().T
    return run_lengths(owner, place, *(side.cpu().numpy() for side in sides))


def edges(masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What tells the runs of masks, bool [n, h, w], column by column.

    Where the next pixel differs, [n, h * w - 1], the first pixel, [n], and which rows, [n, h], and columns,
    [n, w], are touched.
    """
    columns = masks.transpose(1, 2).flatten(1)
    return columns[:, 1:] != columns[:, :-1], columns[:, 0], masks.any(2), masks.any(1)


def run_lengths(
    owner: NDArray[np.int64],
    place: NDArray[np.int64],
    first: NDArray[np.bool_],
    down: NDArray[np.bool_],
    across: NDArray[np.bool_],
) -> list[tuple[tuple[float, float, float, float], RLE] | None]:
    """The host's part of it: a mask and a pixel for each end of a run, and what else :func:`edges` found."""
    count, height, width = len(first), down.shape[1], across.shape[1]
    # Where the runs of all masks end: at 0 where the first pixel is in, at changes, and at the last pixel.
    stops = np.cumsum(np.bincount(owner, minlength=count) + first + 1)
    starts = np.concatenate([[0], stops[:-1]])
    ends, inner = np.empty(stops[-1], dtype=np.int64), np.ones(stops[-1], dtype=bool)
    ends[starts[first]], ends[stops - 1] = 0, height * width
    inner[starts[first]] = inner[stops - 1] = False
    ends[inner] = place + 1
    runs = np.diff(ends, prepend=0)
    runs[starts] = ends[starts]
    told = runs.tolist()
    boxes = np.stack(
        [
            across.argmax(1), down.argmax(1),
            width - across[:, ::-1].argmax(1), height - down[:, ::-1].argmax(1),
        ], axis=1,
    ).astype(float).tolist()  # fmt: skip
    return [
        (tuple(box), RLE((height, width), tuple(told[start:stop]))) if seen else None
        for box, start, stop, seen in zip(boxes, starts, stops, across.max(1), strict=True)
    ]


def _fix_places(model: Any) -> None:
    """Keep frequencies of places in fp32, for bf16 tells few apart; make what else depends on places once."""
    kind = model.dtype  # It is that of the first weights, which change here.
    for name, module in model.named_modules():
        if hasattr(module, "get_rel_pos"):
            # They depend on weights and sizes alone; made anew, they would be copied from the host.
            module.get_rel_pos = cache(module.get_rel_pos)
        if name.endswith(("shared_image_embedding", "shared_embedding")):
            module.float()
            module.register_forward_hook(lambda _, given, found: found.to(kind))
