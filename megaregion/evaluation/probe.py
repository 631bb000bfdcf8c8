"""A linear probe: multinomial logistic regression on frozen features.

Features are standardised and, where they are wide, turned onto their first principal directions, both
fitted on the training rows. The weight decay is chosen on training rows that are held out by group
(cut-outs, images), never on the test. The problem is convex, so a seed changes the rows, not the optimum.

Shapes: R training rows, Q queries, C feature width, D width after the turn, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

DECAYS = (1.0, 0.1, 0.01, 0.001)
"""Weight decays tried, strongest first; times half the squared norm of the weights."""
WIDEST = 384
"""Most directions kept; wider features are turned onto as many, which keeps nearly all their variance."""
ITERATIONS = 60
"""Most steps of L-BFGS."""
HELD_OUT = 0.25
"""Share of the groups of each class on which the weight decay is chosen."""


@dataclass(frozen=True)
class Probe:
    """A fitted probe."""

    classes: tuple[str, ...]
    mean: Tensor
    """[C]."""
    turn: Tensor
    """Standardises and turns, [C, D]."""
    weight: Tensor
    """[D + 1, K]; the last row is the bias."""

    def scores(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Class scores, [Q, C] to [Q, K]."""
        with torch.inference_mode():
            inputs = (torch.from_numpy(features) - self.mean) @ self.turn
            scores: NDArray[np.float32] = (inputs @ self.weight[:-1] + self.weight[-1]).numpy()
        return scores

    def predict(self, features: NDArray[np.float32]) -> list[str]:
        """Most likely class of each of Q features."""
        return [self.classes[place] for place in self.scores(features).argmax(axis=1).tolist()]


def fit(features: NDArray[np.float32], names: Sequence[str], decay: float) -> Probe:
    """Fit a probe.

    Args:
        features: Training rows, [R, C].
        names: Class of each row, R of them.
        decay: Weight decay.
    """
    return _fit_each(features, names, (decay,))[0]


def choose_decay(
    features: NDArray[np.float32], names: Sequence[str], groups: Sequence[str], seed: int
) -> float:
    """Choose the weight decay on training rows of groups that the fit does not see.

    Args:
        features: Training rows, [R, C].
        names: Class of each row.
        groups: Group of each row; a group lies on one side.
        seed: Draws the groups that are held out.

    Returns:
        One of DECAYS; the strongest of equally good ones.
    """
    held = hold_out(names, groups, seed)
    if not held.any() or held.all():
        return DECAYS[1]
    known = [name for name, out in zip(names, held, strict=True) if not out]
    asked = np.asarray([name for name, out in zip(names, held, strict=True) if out])
    probes = _fit_each(features[~held], known, DECAYS)
    right = [float(np.mean(np.asarray(each.predict(features[held])) == asked)) for each in probes]
    return DECAYS[int(np.argmax(right))]


def hold_out(names: Sequence[str], groups: Sequence[str], seed: int) -> NDArray[np.bool_]:
    """Draw a quarter of the groups of each class, at least one; a class of a single group gives none.

    Returns:
        Which rows are held out, [R].
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn: set[tuple[str, str]] = set()
    for name in sorted(set(names)):
        own = sorted({group for group, each in zip(groups, names, strict=True) if each == name})
        if len(own) > 1:
            count = max(1, int(HELD_OUT * len(own)))
            drawn.update((name, own[place]) for place in rng.permutation(len(own))[:count])
    return np.asarray([pair in drawn for pair in zip(names, groups, strict=True)], np.bool_)


def _fit_each(features: NDArray[np.float32], names: Sequence[str], decays: Sequence[float]) -> list[Probe]:
    """A probe for each weight decay; the turn, which costs the most of wide features, is found once."""
    classes, label = np.unique(np.asarray(names, dtype=np.str_), return_inverse=True)
    mean, turn = _whiten(torch.from_numpy(features))
    inputs, labels = (torch.from_numpy(features) - mean) @ turn, torch.from_numpy(label)
    return [
        Probe(tuple(classes.tolist()), mean, turn, _descend(inputs, labels, len(classes), decay))
        for decay in decays
    ]


def _whiten(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C], and the map [C, D] that scales to unit deviation and turns onto the principal directions."""
    mean = features.mean(0)
    scale = 1 / features.std(0, correction=0).clamp(min=1e-6)
    width = features.shape[1]
    if width <= WIDEST:
        return mean, torch.diag(scale)
    standard = (features - mean) * scale
    # Of wide features the smaller Gram matrix gives the directions.
    if len(features) < width:
        values, vectors = torch.linalg.eigh(standard @ standard.T)
        directions = standard.T @ vectors / values.clamp(min=1e-6).sqrt()
    else:
        values, directions = torch.linalg.eigh(standard.T @ standard)
    kept = min(WIDEST, int((values > 1e-4 * values[-1]).sum()))
    return mean, scale[:, None] * directions[:, -kept:]


def _descend(inputs: Tensor, label: Tensor, classes: int, decay: float) -> Tensor:
    weight = torch.zeros(inputs.shape[1] + 1, classes, requires_grad=True)
    # Wide features have as many units of variance as directions: their length must not set the scale.
    inputs = inputs / inputs.shape[1] ** 0.5
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = inputs @ weight[:-1] + weight[-1]
        value = F.cross_entropy(scores, label) + decay / len(inputs) * weight[:-1].square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    fitted = weight.detach().clone()
    fitted[:-1] /= inputs.shape[1] ** 0.5
    return fitted
