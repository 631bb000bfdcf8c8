"""From raw proposals to ranked candidates, and from candidates to the regions that are kept.

Every proposal that goes is counted under its reason. Two steps, because the second one needs the words:
:func:`rank` filters by shape, drops near-equal boxes and orders the rest; :func:`choose` drops text and
background and keeps the best few.

Shapes: R proposals of one image, W words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megaregion.curation.boxes import Box, Boxes, area, as_array, intersection, iou, nms
from megaregion.curation.engines.objectness import Objectness
from megaregion.curation.settings import EmbedSettings, ProposeSettings
from megaregion.curation.types import Pixels, Proposal

MAX_CANDIDATES = 500
"""Best proposals that are compared with each other; the cost grows with their square."""

CROWDING = 1.0
"""Penalty, in log-odds, of a proposal that lies inside a better one: raises the recall of 12 boxes by two
points. More of it trades boxes that fit for boxes elsewhere."""

INSIDE_WORD = 0.7
"""A proposal with at least this share of its area inside a word is a piece of text."""


@dataclass(frozen=True)
class Candidates:
    """What is left of an image's proposals, and why the others went."""

    proposals: list[Proposal]
    """The score is the objectness, 0..1."""
    dropped: Counter[str]
    """Number of proposals by reason."""


def rank(
    proposals: Sequence[Proposal], pixels: Pixels, objectness: Objectness | None, settings: ProposeSettings
) -> Candidates:
    """Drop proposals of the wrong shape and near-equal ones; order the rest, the most object-like first.

    The proposer's own score only breaks ties, for selective search has none; without an objectness it judges.
    """
    boxes = as_array([proposal.box for proposal in proposals])
    reasons = _misshapen(boxes, pixels.shape[0], pixels.shape[1], settings)
    dropped = Counter(reason for reason in reasons if reason)
    kept = [proposal for proposal, reason in zip(proposals, reasons, strict=True) if not reason]
    if objectness is not None:
        scores = objectness.score(pixels, as_array([proposal.box for proposal in kept]))
        kept = [replace(proposal, score=float(score)) for proposal, score in zip(kept, scores, strict=True)]
    best = sorted(kept, key=lambda proposal: -proposal.score)[:MAX_CANDIDATES]
    odds = np.array([_odds(proposal.score) for proposal in best])
    order = nms(as_array([proposal.box for proposal in best]), odds, settings.nms_iou, CROWDING)
    dropped["duplicate"] += len(best) - len(order)
    dropped["beyond the limit"] += len(kept) - len(best)
    return Candidates([best[row] for row in order], +dropped)


def choose(candidates: Sequence[Proposal], words: Sequence[Box], settings: EmbedSettings) -> Candidates:
    """Keep the regions of one image that are worth a label, from candidates in the order of :func:`rank`."""
    texts = _text(as_array([c.box for c in candidates]), as_array(words), settings.text_overlap)
    kept: list[Proposal] = []
    dropped: Counter[str] = Counter()
    for candidate, text in zip(candidates, texts, strict=True):
        if text:
            dropped["text"] += 1
        elif candidate.score < settings.min_objectness:
            dropped["background"] += 1
        elif len(kept) >= settings.max_regions:
            dropped["beyond the limit"] += 1
        else:
            kept.append(candidate)
    return Candidates(kept, dropped)


def _misshapen(boxes: Boxes, height: int, width: int, settings: ProposeSettings) -> list[str]:
    """Why each box cannot be an object by its shape alone; empty where it can."""
    least = settings.min_edge * min(height, width) if settings.min_edge < 1 else settings.min_edge
    edges = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    short, long = edges.min(axis=1), edges.max(axis=1)
    reasons = np.full(len(boxes), "", dtype=object)
    # The last reason that fits is named: too small before elongated, since a sliver is both.
    reasons[long > settings.max_aspect * short] = "too elongated"
    reasons[area(boxes) > settings.max_area * height * width] = "too large"
    reasons[short < max(least, 1)] = "too small"
    return list(reasons)


def _text(boxes: Boxes, words: Boxes, limit: float) -> list[bool]:
    if not len(words):
        return [False] * len(boxes)
    same = iou(boxes, words).max(axis=1) > limit
    inside = intersection(boxes, words).max(axis=1) >= INSIDE_WORD * area(boxes)
    return list(same | inside)


def _odds(probability: float) -> float:
    bounded = min(max(probability, 1e-6), 1 - 1e-6)
    return float(np.log(bounded / (1 - bounded)))
