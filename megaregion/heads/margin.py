"""Margins: what a positive's cosine becomes before it is scaled, with the exact derivative.

The margin makes the positive harder than it is. CosFace subtracts m from the cosine, ArcFace adds m
to the angle. The derivative goes into the gradient as it is: PartialFC computes the margin without
gradient, which silently replaces ArcFace's slope by 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megaregion.config import MarginName


def apply_margin(cosine: Tensor, kind: MarginName, margin: float) -> tuple[Tensor, Tensor]:
    """Put the margin on positives' cosines.

    ArcFace (Deng et al. 2019) is cos(theta + m). Past theta = pi - m that would rise again, so there,
    as in the reference code, it is cos(theta) - m * sin(m): still falling with theta, one small jump.

    Args:
        cosine: Cosines between features and their positive centers, any shape.
        kind: cosface, arcface or none.
        margin: m; a cosine for cosface, radians for arcface.

    Returns:
        The cosines with margin, and their derivatives by the cosine; both of the input's shape.
    """
    if kind == "none":
        return cosine, torch.ones_like(cosine)
    if kind == "cosface":
        return cosine - margin, torch.ones_like(cosine)
    cos_m, sin_m = math.cos(margin), math.sin(margin)
    cosine = cosine.clamp(-1.0, 1.0)
    # At theta = 0 the slope of cos(theta + m) by cos(theta) is infinite: hold sin(theta) above rounding.
    sine = (1.0 - cosine * cosine).clamp_min(4 * torch.finfo(cosine.dtype).eps).sqrt()
    falling = cosine > -cos_m
    value = torch.where(falling, cosine * cos_m - sine * sin_m, cosine - margin * sin_m)
    slope = torch.where(falling, cos_m + sin_m * cosine / sine, torch.ones_like(cosine))
    return value, slope
