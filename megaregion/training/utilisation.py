"""Model FLOPs utilisation: counted operations of the steps against what bare matrix products reach here.

Only what the method needs counts: forward and backward of the encoder and the scores of the heads once
each way; what recomputing adds is no work done. See models/flops.py for the count.
"""

from __future__ import annotations

import time

import torch

from megaregion.config import RunConfig
from megaregion.data.batch import Batch
from megaregion.models.flops import encoder_flops, head_flops
from megaregion.parallel.topology import Topology
from megaregion.products import product


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product on this rank, the fastest of three.

    Args:
        device: Where it runs.
        dtype: Type of the matrices.
    """
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    product(a, b)
    seconds = []
    for _ in range(3):
        _wait(device)
        began = time.perf_counter()
        product(a, b)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Utilisation:
    """Counts the operations of this rank's batches, and of all ranks from them."""

    def __init__(self, config: RunConfig, classes: dict[str, int], topology: Topology) -> None:
        """Measure the matrix rate.

        Args:
            config: The run.
            classes: Classes of each head.
            topology: This rank's place.
        """
        self._config = config
        self._topology = topology
        precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.rate = matrix_rate(topology.device, precision)
        """Operations per second of this rank's matrix products."""
        self._operations = 0.0
        settings = {"object": config.head.object, "text": config.head.text}
        self._scored = sum(count * settings[kind].sample_rate for kind, count in classes.items())

    def see(self, batch: Batch) -> None:
        """Count a micro-batch."""
        model, regions = self._config.model, self._config.data.regions_per_image
        patch, dim = model.patch_size, self._config.head.embedding_dim
        if batch.grids is None:
            side = batch.pixels.shape[-2] // patch, batch.pixels.shape[-1] // patch
            grids = dict.fromkeys([side], len(batch.keys))
        else:
            grids = {grid: batch.grids.count(grid) for grid in set(batch.grids)}
        for grid, images in grids.items():
            self._operations += encoder_flops(model, regions, dim, grid).training * images
        self._operations += head_flops(len(batch.keys) * regions, self._scored, dim)

    def take(self, seconds: float) -> float:
        """Utilisation over some seconds of steps since the last call.

        Every data rank is taken to have done what this one did; ranks that share a model share the work.
        """
        share = self._operations / self._topology.tensor_size / seconds / self.rate
        self._operations = 0.0
        return share
