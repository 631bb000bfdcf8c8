"""What a run's network sees, as pictures: PCA maps, the attention of regions, the confusion of clusters.

A region token reads only patches of its region. What it reads of them shows what the region is known by;
the same query over the whole image shows what else looks like it.

Shapes: N regions of one image, P patches, h x w of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megaregion.data.shards import ShardedDataset
from megaregion.evaluation.clusters import Confusion, confuse
from megaregion.evaluation.network import NetworkEncoder
from megaregion.evaluation.pca_maps import Frame, FrameMaps, fitting_size, paint, read_frames
from megaregion.evaluation.scenes import Scene, open_image
from megaregion.evaluation.study import Study
from megaregion.files import new_folder
from megaregion.models import RegionEncoder

FRAMES = 6
"""Held-out scenes that are painted where no frames are named."""
ATTENDED = 4
"""Held-out scenes whose regions' attention is shown."""

Progress = Callable[[str, int, int], None]


class Attention(NamedTuple):
    """Attention over patches, mean over heads, [N, h, w] each; an image's weights sum to at most 1."""

    inside: NDArray[np.float32]
    """As the network computes it: zero outside of the region."""
    anywhere: NDArray[np.float32]
    """The same query without its mask."""


@dataclass(frozen=True)
class SceneAttention:
    """A scene and where its regions look."""

    scene: Scene
    image: Image.Image
    regions: Attention
    """Of the scene's objects, then its words."""


@dataclass(frozen=True)
class Visuals:
    """All that was made of one run."""

    frames: Sequence[Frame]
    maps: Sequence[FrameMaps]
    """By the trained network, then by the untrained one."""
    side: int
    """Longest side at which the frames were read, in pixels."""
    attention: Sequence[SceneAttention]
    confusion: Confusion | None
    shards: ShardedDataset


def visualise(
    study: Study,
    frames: Path | None = None,
    side: int = 0,
    progress: Progress = lambda split, done, images: None,
) -> Visuals:
    """Make all pictures.

    Args:
        study: What was measured.
        frames: An image or a folder of frames to paint; random held-out scenes if None.
        side: Longest side of the painted frames, in pixels; 0 takes three times the training size.
        progress: Told of images.
    """
    run, config = study.run, study.config
    trained, untrained = run.trained(config.device), run.untrained(config.device)
    side = side or 3 * run.config.model.image_size
    drawn = _draw(len(study.queries.scenes), config.seed)
    scenes = [study.queries.scenes[place] for place in drawn]
    chosen = read_frames(frames) if frames else [Frame(s.key, open_image(s)) for s in scenes[:FRAMES]]
    done, total = 0, 2 * len(chosen)

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress("PCA maps", done, total)

    maps = [paint(encoder, chosen, side, count) for encoder in (trained, untrained)]
    attention = [_attend(trained, scene, side) for scene in [s for s in scenes if s.objects][:ATTENDED]]
    shards = ShardedDataset(config.dataset)
    centers = run.object_centers()
    confusion = None
    if centers is not None:
        confusion = confuse(shards, trained, centers, config.seed, config.batch, progress)
    return Visuals(chosen, maps, side, attention, confusion, shards)


def save_pictures(visuals: Visuals, folder: Path) -> None:
    """Write the frames and the trained network's maps as files into a folder, replacing older ones."""
    with new_folder(folder) as partial:
        for frame, own in zip(visuals.frames, visuals.maps[0].maps, strict=True):
            small = frame.image.copy()
            small.thumbnail(own.size, Image.Resampling.LANCZOS)
            small.save(partial / f"{frame.name}.frame.jpg", quality=88)
            own.save(partial / f"{frame.name}.map.jpg", quality=90)


@torch.inference_mode()
def region_attention(model: RegionEncoder, pixels: Tensor, visible: Tensor) -> Attention:
    """Attention of the region tokens of one image in the last block.

    Args:
        model: The network.
        pixels: One normalised image, [1, 3, H, W].
        visible: What each region sees, [1, N, P].
    """
    last: Any = model.vit.blocks[-1]
    seen: dict[str, Any] = {}
    hooks = [
        last.register_forward_pre_hook(lambda block, inputs: seen.update(inputs=inputs)),
        last.register_forward_hook(lambda block, inputs, outputs: seen.update(image=outputs[0])),
    ]
    try:
        model.vit(pixels, visible)
    finally:
        for hook in hooks:
            hook.remove()
    image, regions, angles, mask, _ = seen["inputs"]
    # A copy of the block for regions reads what the block has written, shared weights what enters it.
    block, image = (last, image) if last.region is None else (last.region, seen["image"])
    query = block.attention.project_regions(block.norm1(regions), angles, visible.shape[1])
    _, key, _ = block.attention.project(block.norm1(image), angles)
    scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
    patch = model.vit.config.patch_size
    grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    return Attention(_weights(scores + mask, grid), _weights(scores, grid))


def _weights(scores: Tensor, grid: tuple[int, int]) -> NDArray[np.float32]:
    """Attention scores [1, heads, N, 1 + P] as weights of the patches, [N, h, w]."""
    weights = scores.float().softmax(dim=-1).mean(dim=1)[0, :, 1:]
    array: NDArray[np.float32] = weights.unflatten(1, grid).cpu().numpy()
    return array


def _attend(encoder: NetworkEncoder, scene: Scene, side: int) -> SceneAttention:
    image = open_image(scene)
    size = fitting_size(image.size, side, encoder.model.vit.config.patch_size)
    pixels, visible = encoder.prepare(image, scene.boxes.tolist(), size)
    return SceneAttention(scene, image, region_attention(encoder.model, pixels, visible))


def _draw(scenes: int, seed: int) -> list[int]:
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(scenes)
    return [int(place) for place in order[: max(FRAMES, 2 * ATTENDED)]]
