"""The loss of a row: the margin on its positives, and how positives and negatives become loss and gradient.

Both losses see the negatives only through Z = sum_n exp(s_n), so the derivative by a negative's score is
exp(s_n) times one factor of the row. That is why one streaming kernel serves both, and why nothing but
an exponential stands between its matrix products.

The margin makes the positive harder than it is. CosFace subtracts m from the cosine, ArcFace adds m to the
angle. Its exact derivative goes into the gradient: PartialFC computes the margin without gradient, which
silently replaces ArcFace's slope by 1.

Shapes: R rows, T positives of a row (padded).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megaregion.config import LossName, MarginName


class RowTerms(NamedTuple):
    """Losses of rows and their derivatives."""

    loss: Tensor
    """Loss of each row, [R]."""
    grad_negative: Tensor
    """d loss / d s_n divided by exp(s_n - shift): one factor for all negatives of a row, [R]."""
    grad_positive: Tensor
    """d loss / d s_p for each positive, 0 where there is none, [R, T]."""


def row_terms(loss: LossName, scores: Tensor, valid: Tensor, sum_exp: Tensor, shift: Tensor) -> RowTerms:
    """Losses and derivatives of rows.

    separated (RICE): ``log(1 + sum_p exp(-s_p)) + log(1 + sum_n exp(s_n))``.

    softmax (UNICOM, PartialFC): the mean over positives p of ``-s_p + log(exp(s_p) + sum_n exp(s_n))``.
    Each positive faces the negatives alone. The other form for several positives,
    ``-log(sum_p exp(s_p) / (sum_p exp(s_p) + sum_n exp(s_n)))``, is content when one token of a word is
    found and then leaves the others without gradient. With one positive the two are the same.

    Args:
        loss: separated or softmax.
        scores: Scaled positives' scores s_p with margin, [R, T].
        valid: Which of them are there, bool [R, T].
        sum_exp: sum_n exp(s_n - shift) over negatives, [R].
        shift: What was subtracted from the negatives' scores, [R] or 0-d.

    Returns:
        Losses and derivatives, in the type of ``sum_exp``.
    """
    log_sum_exp = sum_exp.log() + shift
    if loss == "separated":
        return _separated(scores, valid, sum_exp, log_sum_exp, shift)
    return _softmax(scores, valid, sum_exp, log_sum_exp, shift)


def _separated(
    scores: Tensor, valid: Tensor, sum_exp: Tensor, log_sum_exp: Tensor, shift: Tensor
) -> RowTerms:
    opposed = torch.where(valid, -scores, float("-inf"))
    zero = torch.zeros_like(sum_exp)
    positive = torch.logaddexp(zero, torch.logsumexp(opposed, 1))
    negative = torch.logaddexp(zero, log_sum_exp)
    grad_positive = -torch.exp(opposed - positive[:, None])
    return RowTerms(positive + negative, 1 / (sum_exp + torch.exp(-shift)), grad_positive)


def _softmax(scores: Tensor, valid: Tensor, sum_exp: Tensor, log_sum_exp: Tensor, shift: Tensor) -> RowTerms:
    share = valid.to(sum_exp.dtype) / valid.sum(1, keepdim=True).clamp_min(1)
    excess = log_sum_exp[:, None] - scores
    # excess = -inf (a row without negatives) costs nothing; softplus and sigmoid are 0 there.
    losses = torch.logaddexp(torch.zeros_like(excess), excess)
    grad_negative = share / (sum_exp[:, None] + torch.exp(scores - shift.expand_as(sum_exp)[:, None]))
    # Without negatives there is nothing to multiply; 1 / exp(s_p) alone could overflow.
    grad_negative = grad_negative.masked_fill(sum_exp[:, None] == 0, 0.0)
    return RowTerms((share * losses).sum(1), grad_negative.sum(1), -share * torch.sigmoid(excess))


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
