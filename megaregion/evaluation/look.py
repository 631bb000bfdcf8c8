"""Everything of a run that is a picture: PCA maps, attention of regions, confusion of clusters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megaregion.data.shards import ShardedDataset
from megaregion.evaluation.attention import Looks, region_attention
from megaregion.evaluation.clusters import Confusion, confuse
from megaregion.evaluation.encoding import open_image
from megaregion.evaluation.frames import Frame, Painted, fitting_size, paint, read_frames
from megaregion.evaluation.network import NetworkEncoder
from megaregion.evaluation.scenes import Scene
from megaregion.evaluation.study import Study

FRAMES = 6
"""Held-out scenes that are painted where no frames are named."""
WATCHED = 4
"""Held-out scenes whose regions' attention is shown."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Watched:
    """A scene and where its regions look."""

    scene: Scene
    image: Image.Image
    looks: Looks
    """Of the scene's objects, then its words."""


@dataclass(frozen=True)
class Pictures:
    """All pictures of one run."""

    frames: Sequence[Frame]
    painted: Sequence[Painted]
    """By the trained network, then by the untrained one."""
    side: int
    """Longest side at which the frames were read, in pixels."""
    watched: Sequence[Watched]
    confusion: Confusion | None
    shards: ShardedDataset


def look(
    study: Study,
    frames: Path | None = None,
    side: int = 0,
    progress: Progress = lambda split, done, images: None,
) -> Pictures:
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

    painted = [paint(encoder, chosen, side, count) for encoder in (trained, untrained)]
    watched = [_watch(trained, scene, side) for scene in [s for s in scenes if s.objects][:WATCHED]]
    shards = ShardedDataset(config.dataset)
    centers = run.object_centers()
    confusion = None
    if centers is not None:
        confusion = confuse(shards, trained, centers, config.seed, config.batch, progress)
    return Pictures(chosen, painted, side, watched, confusion, shards)


def save_pictures(pictures: Pictures, folder: Path) -> None:
    """Write the frames and the trained network's maps as files, replacing older ones.

    Args:
        pictures: What was made.
        folder: The run's folder of pictures.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for frame, own in zip(pictures.frames, pictures.painted[0].maps, strict=True):
        small = frame.image.copy()
        small.thumbnail(own.size, Image.Resampling.LANCZOS)
        small.save(partial / f"{frame.name}.frame.jpg", quality=88)
        own.save(partial / f"{frame.name}.map.jpg", quality=90)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _watch(encoder: NetworkEncoder, scene: Scene, side: int) -> Watched:
    image = open_image(scene)
    size = fitting_size(image.size, side, encoder.model.vit.config.patch_size)
    pixels, visible = encoder.prepare(image, scene.boxes.tolist(), size)
    return Watched(scene, image, region_attention(encoder.model, pixels, visible))


def _draw(scenes: int, seed: int) -> list[int]:
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(scenes)
    return [int(place) for place in order[: max(FRAMES, 2 * WATCHED)]]
