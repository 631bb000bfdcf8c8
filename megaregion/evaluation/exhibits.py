"""The pictures of a run as parts of its page."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.evaluation.clusters import Confusion, sample_image
from megaregion.evaluation.encoders import crop
from megaregion.evaluation.pictures import CROP_SIDE, data_uri
from megaregion.evaluation.visualise import Pictures, Watched

FRAME_SIDE = 384
"""Longest side of a frame in the page, in pixels."""
REGIONS = 3
"""Regions of a scene whose attention is shown."""
WARM = np.array([[255, 214, 102], [255, 122, 54], [214, 32, 84]], np.float32)
"""Colours of attention from little to much."""


def map_section(pictures: Pictures) -> str:
    """Every frame beside its maps by the trained and by the untrained network."""
    trained = pictures.painted[0]
    rows, columns = trained.cells
    told = "".join(
        f'<span class="{each.encoder}">{each.encoder}: three components hold '
        f"{each.basis.explained:.0%} of the variance</span>"
        for each in pictures.painted
    )
    cards = []
    for place, frame in enumerate(pictures.frames):
        shown = [("as it is", frame.image), *((each.encoder, each.maps[place]) for each in pictures.painted)]
        images = "".join(
            f'<div><img src="{data_uri(image, FRAME_SIDE)}" alt="{escape(frame.name)}, {name}">'
            f"<figcaption>{name}</figcaption></div>"
            for name, image in shown
        )
        cards.append(f'<figure class="trio">{images}</figure>')
    return (
        f'<div class="legend">{told}<span class="plain">{rows} x {columns} patches a picture, read at '
        f'{pictures.side} px</span></div><div class="maps">{"".join(cards)}</div>'
    )


def attention_section(pictures: Pictures) -> str:
    """Scenes with a few of their regions: what the region token reads, and what it would read outside."""
    return f'<div class="maps">{"".join(_watched_card(watched) for watched in pictures.watched)}</div>'


def _watched_card(watched: Watched) -> str:
    names = [item.name for item in watched.scene.objects] + [item.text for item in watched.scene.words]
    shown = []
    for region in range(min(REGIONS, len(names))):
        box = watched.scene.boxes[region]
        for kind, weights in (
            ("reads", watched.attention.inside),
            ("would read", watched.attention.anywhere),
        ):
            image = overlay(watched.image, weights[region], box)
            shown.append(
                f'<div><img src="{data_uri(image, FRAME_SIDE)}" alt="attention of {escape(names[region])}">'
                f"<figcaption><b>{escape(names[region])}</b> {kind}</figcaption></div>"
            )
    return f'<figure class="pairs">{"".join(shown)}</figure>'


def overlay(image: Image.Image, weights: NDArray[np.float32], box: NDArray[np.float32]) -> Image.Image:
    """Lay attention [h, w] over a greyed picture, and draw the region's box [4]."""
    side = FRAME_SIDE / max(image.size)
    size = (round(image.width * side), round(image.height * side))
    grey = np.asarray(image.resize(size, Image.Resampling.BICUBIC).convert("L"), np.float32)[..., None]
    top = np.float32(max(float(np.quantile(weights, 0.995)), 1e-9))
    small = Image.fromarray(np.clip(weights / top, 0, 1).astype(np.float32), mode="F")
    heat = np.clip(np.asarray(small.resize(size, Image.Resampling.BILINEAR)), 0, 1)
    place = heat * (len(WARM) - 1)
    low = np.minimum(place.astype(np.int64), len(WARM) - 2)
    colour = WARM[low] + (WARM[low + 1] - WARM[low]) * (place - low)[..., None]
    alpha = np.sqrt(heat)[..., None] * np.float32(0.85)
    mixed = (0.25 * 255 + 0.6 * grey) * (1 - alpha) + colour * alpha
    pixels = np.clip(mixed, 0, 255).astype(np.uint8)
    x0, y0, x1, y1 = (round(float(edge) * side) for edge in box)
    x1, y1 = min(x1, size[0] - 1), min(y1, size[1] - 1)
    for rows, columns in (
        (slice(y0, y0 + 2), slice(x0, x1)), (slice(y1 - 1, y1 + 1), slice(x0, x1)),
        (slice(y0, y1), slice(x0, x0 + 2)), (slice(y0, y1), slice(x1 - 1, x1 + 1)),
    ):  # fmt: skip
        pixels[rows, columns] = (255, 255, 255)
    return Image.fromarray(pixels)


def cluster_section(pictures: Pictures) -> str:
    """The matrix of clusters and the pairs that are most often confused."""
    confusion = pictures.confusion
    if confusion is None or confusion.top1 is None or confusion.top5 is None:
        return '<div class="card missing">This run has no object head, or no object was drawn.</div>'
    told = (
        f"{len(confusion.regions):,} regions of training images: their own cluster is named first for "
        f"<b>{confusion.top1.mean:.1%}</b> ({confusion.top1.low:.1%} to {confusion.top1.high:.1%}), and "
        "among the "
        f"first five for <b>{confusion.top5.mean:.1%}</b>. Rows: the {len(confusion.shown)} largest "
        "clusters in an "
        "order of likeness; columns: what the head names."
    )
    pairs = "".join(_pair(pictures, confusion, pair) for pair in confusion.pairs)
    return (
        f'<div class="card"><p class="note">{told}</p><div class="confusion">'
        f'<img class="matrix" src="{_matrix(confusion.matrix)}" alt="confusion of clusters">'
        f'<div class="pairs-list">{pairs}</div></div></div>'
    )


def _matrix(matrix: NDArray[np.float64]) -> str:
    """The matrix as a picture that suits light and dark pages: its ink is alpha."""
    alpha = (255 * np.sqrt(np.clip(matrix, 0, 1))).round().astype(np.uint8)
    blue, red = (31, 95, 214), (214, 62, 62)
    right = np.eye(len(matrix), dtype=bool)[..., None]
    ink = np.where(right, np.array(blue, np.uint8), np.array(red, np.uint8))
    faint = np.maximum(alpha, np.uint8(14))
    pixels = np.dstack([ink.astype(np.uint8), faint])
    scale = max(1, 640 // len(matrix))
    large = np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)
    if scale > 4:
        large[::scale, :, 3] = 0
        large[:, ::scale, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(large, mode="RGBA").save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pair(pictures: Pictures, confusion: Confusion, pair: tuple[int, int, int]) -> str:
    true, named, count = pair
    crops = []
    for cluster in (true, named):
        region = confusion.example(cluster)
        if region is not None:
            image = crop(sample_image(pictures.shards, region.sample), region.box)
            crops.append(f'<img src="{data_uri(image, CROP_SIDE)}" alt="a region of cluster {cluster}">')
    return (
        f'<div class="confused">{crops[0]}<span>{true} named {named}<br><small>{count} regions</small></span>'
        f"{''.join(crops[1:])}</div>"
    )
