"""What a head reports of one micro-step: its loss and the numbers worth logging."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.heads.scoring import RowSums
from megaregion.heads.targets import Targets

LOG = logging.getLogger(__name__)
LEAST_SAVING = 0.1
"""Share of classes, and so of head time, that sampling must save to be worth its noise."""


@dataclass(frozen=True)
class HeadLoss:
    """Loss of one head over all rows of a micro-step; the same on every rank."""

    sum: Tensor
    """Sum of the row losses, with gradient, 0-d."""
    count: Tensor
    """Rows of this head over all data ranks, 0-d int64."""
    metrics: dict[str, Tensor]
    """0-d: positive_cosine (mean), accuracy (share of rows in which a positive beats all drawn negatives),
    sample_rate (share of classes drawn, positives included), positive_share (share of drawn classes that
    are positives of some row)."""


def report_loss(sums: RowSums, targets: Targets, classes: int, group: dist.ProcessGroup) -> HeadLoss:
    """Put sums over rows and draws together.

    Args:
        sums: Sums over the head's rows, the same on every rank.
        targets: The rows and this rank's part of the draws.
        classes: Classes over all ranks.
        group: All ranks.
    """
    device = sums.loss.device
    sizes = [sum(draw.size for draw in targets.draws), sum(len(draw.positives) for draw in targets.draws)]
    drawn = torch.tensor(sizes, dtype=torch.float32, device=device)
    dist.all_reduce(drawn, group=group)
    count = torch.tensor(len(targets.index), device=device)
    metrics = {
        "positive_cosine": sums.cosine / sums.positives.clamp_min(1),
        "accuracy": sums.won / count.clamp_min(1),
        "sample_rate": drawn[0] / max(1, classes * len(targets.draws)),
        "positive_share": drawn[1] / drawn[0].clamp_min(1),
    }
    return HeadLoss(sums.loss, count, metrics)


class SamplingWatch:
    """Warns once when sampling does not pay."""

    def __init__(self, name: str, rate: float) -> None:
        self._name, self._rate = name, rate
        self._quiet = rate >= 1.0

    def look(self, targets: Targets, local_classes: int) -> None:
        """Compare the classes drawn with all that could be."""
        possible = local_classes * len(targets.draws)
        drawn = sum(draw.size for draw in targets.draws)
        if self._quiet or drawn <= (1 - LEAST_SAVING) * possible:
            return
        self._quiet = True
        LOG.warning(
            "head.%s.sample_rate %g saves less than %.0f%% of the head's time: positives and floor take "
            "%.0f%% of the classes; set it to 1.0, or let fewer images share a draw (head.draw_images)",
            self._name,
            self._rate,
            100 * LEAST_SAVING,
            100 * drawn / possible,
        )
