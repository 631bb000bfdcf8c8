"""Weights of an untrained encoder, each a function of the seed and of its own name.

No weight depends on the order in which modules are built, nor on ranks: whoever holds a part of a
tensor can make the whole one and keep its part.

Shapes: D width, L depth, d head width, p pixels along a patch.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from megaregion.config import ModelConfig
from megaregion.models.vit import RegionEncoder

LIKENESS_GAIN = 0.6
"""Gain of queries and keys under structured weights: a token's score with itself is about 2.5, not 7."""

OPPONENTS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
"""Brightness, red against blue, green against both: nearly uncorrelated in natural images."""
CHROMA = 3.0
"""Brightness varies about this many times as much as the colour axes do."""


@torch.no_grad()
def initialise(model: RegionEncoder, seed: int) -> None:
    """Set every parameter of an encoder whose linears are whole, on any device, in any type."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.vit.config, seed))


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The first value of the parameter ``name`` of RegionEncoder, whole, float32 on the CPU."""
    kind = name.rsplit(".", 2)[-2:]
    if kind[-1] == "bias":
        return torch.zeros(shape)
    if kind[0].endswith(("norm", "norm1", "norm2")):
        return torch.ones(shape)
    value = torch.empty(shape)
    std = _std(kind, shape, config)
    # Region tokens' own weights start as a copy of the block's: the same name, so the same numbers.
    generator = torch.Generator().manual_seed(_stable_seed(seed, name.replace(".region.", ".")))
    if kind[-1] == "class_pos_emb":
        return value.normal_(std=std, generator=generator)
    nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
    if config.first_weights == "structured":
        if kind[0] == "patch_embedding":
            return cosine_filters(shape[0], config.patch_size)
        if kind[0] == "qkv":
            return _see_like_tokens(value, config)
    return value


def _see_like_tokens(rows: Tensor, config: ModelConfig) -> Tensor:
    """Give keys the queries' rows, so that a token first attends to tokens like itself.

    Rotary angles shrink such a score with distance, so attention also starts near. After "Mimetic
    Initialization of Self-Attention Layers" (Trockman and Kolter, 2023), who fit it to trained ViTs.
    """
    heads = rows.view(config.heads, 3, config.head_dim, -1)
    heads[:, 1] = heads[:, 0]
    heads[:, :2] *= LIKENESS_GAIN
    return rows


def _std(kind: list[str], shape: torch.Size, config: ModelConfig) -> float:
    """Standard deviation that keeps activations at unit scale, and 2L residual sums too."""
    if kind[-1] == "region_query":
        # No norm comes before its first sum. At the scale of the tokens there a run begins with the gradients
        # of copies of the class token; at that of the others they are two to three times as large.
        return 1.0
    if kind[-1] in ("class_pos_emb", "class_embedding", "register_tokens"):
        return float(shape[-1]) ** -0.5
    fan_in = float(shape[1:].numel())
    if kind[0] in ("out", "fc2"):
        return float((config.width * 2 * config.depth) ** -0.5)
    return float((2 * fan_in) ** -0.5 if kind[0] == "fc1" else fan_in**-0.5)


def _stable_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def cosine_filters(count: int, patch: int) -> Tensor:
    """The filters with the most power in natural images, whitened, float32 [D = count, 3, p, p].

    A trained patch embedding looks like smooth colour blobs and gratings, the principal components of natural
    patches, and those are close to a cosine basis. A long run finds them by itself; a run of minutes should
    not have to. Power falls with the square of the frequency, so each filter is multiplied by its frequency.
    Beyond the 3 p^2 filters there are, the list starts again.
    """
    basis = _cosines(patch)
    axes = [(u, v, c) for u in range(patch) for v in range(patch) for c in range(3)]
    axes.sort(key=lambda axis: (_gain(*axis), axis))
    filters = torch.empty(count, 3, patch, patch)
    for index in range(count):
        u, v, c = axes[index % len(axes)]
        colour = torch.tensor(OPPONENTS[c])
        plane = torch.outer(basis[u], basis[v])
        filters[index] = (colour / colour.norm())[:, None, None] * plane * _gain(u, v, c) / patch
    return filters


def _gain(u: int, v: int, c: int) -> float:
    return (1.0 + math.hypot(u, v)) * (CHROMA if c else 1.0)


def _cosines(patch: int) -> Tensor:
    """Orthonormal cosines, [p frequencies, p pixels]."""
    position = (torch.arange(patch) + 0.5) * math.pi / patch
    basis = torch.cos(torch.arange(patch)[:, None] * position[None, :])
    basis *= math.sqrt(2 / patch)
    basis[0] *= math.sqrt(0.5)
    return basis
