"""Row losses: from a row's positive scores and its sum over negatives to its loss and derivatives.

Both losses see the negatives only through Z = sum_n exp(s_n), so the derivative by a negative's score is
exp(s_n) times one factor of the row. That is why one streaming kernel serves both, and why nothing but
an exponential stands between its matrix products.

Shapes: R rows, T positives of a row (padded).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megaregion.config import LossName


class RowTerms(NamedTuple):
    """Losses of rows and their derivatives."""

    loss: Tensor
    """Loss of each row, [R]."""
    by_negative: Tensor
    """d loss / d s_n divided by exp(s_n - shift): one factor for all negatives of a row, [R]."""
    by_positive: Tensor
    """d loss / d s_p for each positive, 0 where there is none, [R, T]."""


def row_terms(loss: LossName, scores: Tensor, valid: Tensor, mass: Tensor, shift: Tensor) -> RowTerms:
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
        mass: sum_n exp(s_n - shift) over negatives, [R].
        shift: What was subtracted from the negatives' scores, [R] or 0-d.

    Returns:
        Losses and derivatives, in the type of ``mass``.
    """
    log_mass = mass.log() + shift
    if loss == "separated":
        return _separated(scores, valid, mass, log_mass, shift)
    return _softmax(scores, valid, mass, log_mass, shift)


def _separated(scores: Tensor, valid: Tensor, mass: Tensor, log_mass: Tensor, shift: Tensor) -> RowTerms:
    opposed = torch.where(valid, -scores, float("-inf"))
    zero = torch.zeros_like(mass)
    positive = torch.logaddexp(zero, torch.logsumexp(opposed, 1))
    negative = torch.logaddexp(zero, log_mass)
    by_positive = -torch.exp(opposed - positive[:, None])
    return RowTerms(positive + negative, 1 / (mass + torch.exp(-shift)), by_positive)


def _softmax(scores: Tensor, valid: Tensor, mass: Tensor, log_mass: Tensor, shift: Tensor) -> RowTerms:
    share = valid.to(mass.dtype) / valid.sum(1, keepdim=True).clamp_min(1)
    excess = log_mass[:, None] - scores
    # excess = -inf (a row without negatives) costs nothing; softplus and sigmoid are 0 there.
    losses = torch.logaddexp(torch.zeros_like(excess), excess)
    by_negative = share / (mass[:, None] + torch.exp(scores - shift.expand_as(mass)[:, None]))
    # Without negatives there is nothing to multiply; 1 / exp(s_p) alone could overflow.
    by_negative = by_negative.masked_fill(mass[:, None] == 0, 0.0)
    return RowTerms((share * losses).sum(1), by_negative.sum(1), -share * torch.sigmoid(excess))
