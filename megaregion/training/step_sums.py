"""What one optimizer step gathers over its micro-steps: losses, and the samples they came from."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from megaregion.config import RunConfig
from megaregion.data.batch import Batch
from megaregion.training.heads import HeadsLoss


class StepSums:
    """Sums over the micro-steps of one step on one rank."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        """Sum of the row losses by kind over all ranks, 0-d."""
        self.counts: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        """Rows by kind over all ranks, 0-d."""
        self.metrics: dict[str, Tensor] = {}
        """The heads' further numbers in the last micro-step."""
        self.positions: list[Tensor] = []
        """Positions of each micro-step's samples, on the processor."""
        self.keys: list[list[str]] = []
        """Names of each micro-step's samples."""
        self.bad = 0
        """Samples that were replaced."""

    def see(self, batch: Batch) -> None:
        """Note a micro-step's samples, before they go to the device."""
        self.positions.append(batch.positions)
        self.keys.append(batch.keys)
        self.bad += batch.bad

    def add(self, loss: HeadsLoss) -> None:
        """Add a micro-step's losses."""
        for kind in loss.sums:
            self.sums[kind] = self.sums[kind].to(loss.sums[kind].device) + loss.sums[kind]
            self.counts[kind] = self.counts[kind].to(loss.counts[kind].device) + loss.counts[kind]
        self.metrics = loss.metrics

    def weights(self) -> dict[str, float]:
        """Weight of each kind in the loss, per region of the global batch."""
        regions = self._config.train.global_batch * self._config.data.regions_per_image
        weights = {"object": self._config.head.object.weight, "text": self._config.head.text.weight}
        return {kind: weights[kind] / regions for kind in self.sums}

    def loss(self) -> Tensor:
        """The step's loss, 0-d; no wait for the device."""
        return torch.stack([self.sums[kind] * weight for kind, weight in self.weights().items()]).sum()
