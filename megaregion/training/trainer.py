"""The training run: one loop that reads top to bottom.

    positions -> batches -> encoder -> heads -> gradients -> one clip -> update -> log -> maybe save

Everything random is a function of (seed, position), so a run continued from a checkpoint goes on as if it
had never stopped, and on another number of ranks it sees the same samples and the same negatives.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaregion.config import RunConfig, accumulation
from megaregion.data.batch import Batch
from megaregion.data.loader import RegionLoader
from megaregion.data.order import SampleOrder, step_positions
from megaregion.data.shards import ShardedDataset
from megaregion.data.transforms import Transform
from megaregion.errors import REQUEUE_EXIT
from megaregion.models.encoder import RegionEncoder, decays
from megaregion.models.initialisation import initialise
from megaregion.models.plan import partial_gradients, tensor_parallel_plan
from megaregion.parallel.tensor_parallel import parallelize
from megaregion.parallel.topology import Topology
from megaregion.parallel.zero import ZeroEngine
from megaregion.training.heads import Heads
from megaregion.training.metrics import LOG, Metrics
from megaregion.training.schedule import learning_rate
from megaregion.training.signals import StopRequest
from megaregion.training.state import TrainingState


class Trainer:
    """One rank of a training run."""

    def __init__(self, config: RunConfig, topology: Topology, stop: StopRequest) -> None:
        """Build data, body, heads and engine; nothing is read from a checkpoint yet.

        Raises:
            UserError: The dataset cannot be used, or the batch sizes do not fit the ranks.
        """
        self.config = config
        self.topology = topology
        self.run_folder = Path(config.output) / config.name
        self._stop = stop
        self._micro_steps = accumulation(config, topology.data_size)
        self.dataset = ShardedDataset(config.data.path, check_labels=topology.rank == 0)
        order = SampleOrder(self.dataset.info.shard_sizes, config.seed, config.data.window_shards)
        transform = Transform(config.data, config.model, config.seed)
        self._loader = RegionLoader(self.dataset, order, transform, config.data)
        self.heads = Heads(config, self.dataset, topology)
        self.engine = self._build_engine()
        self.state = TrainingState(config, topology, self.engine, self.heads, self.dataset.info)
        self._spent: dict[str, float] = defaultdict(float)

    def _build_engine(self) -> ZeroEngine:
        model = RegionEncoder(self.config.model, self.config.head.embedding_dim)
        initialise(model, self.config.seed)
        model.vit.recompute = self.config.train.recompute
        placements = parallelize(model, tensor_parallel_plan(model), partial_gradients(model), self.topology)
        return ZeroEngine(
            model.to(self.topology.device),
            placements,
            self.config,
            self.topology,
            decays,
            self.heads.norm_squared,
        )

    def run(self, stop_at: int | None = None) -> int:
        """Train to the last step, or until a stop is asked for.

        Args:
            stop_at: Save and leave after this step; the schedules still reach to train.steps.

        Returns:
            0 at the end of training, 85 if the run saved on a signal and wants to be started again.
        """
        metrics = Metrics(self.run_folder, self.topology.rank == 0, self.config.train.steps)
        batches = self._loader.batches(self._positions())
        try:
            end = min(stop_at or self.config.train.steps, self.config.train.steps)
            while self.state.step < end:
                values = self.train_step(batches)
                if self.state.step % self.config.train.log_every == 0:
                    metrics.write(self.state.step, values)
                stopping = self._stop.agreed(self.topology.world_group, self.topology.device)
                last = self.state.step == end
                if stopping or last or self.state.step % self.config.checkpoint.every == 0:
                    self.state.save(self.run_folder / "checkpoints")
                if stopping and not last:
                    LOG.info(
                        "stopped by %s after step %d", self._stop.received or "another rank", self.state.step
                    )
                    return REQUEUE_EXIT
            return 0
        finally:
            self._loader.close()
            metrics.close()

    def train_step(self, batches: Iterator[Batch]) -> dict[str, float | int | None]:
        """Take one optimizer step and return what is worth logging."""
        began = time.perf_counter()
        self._spent.clear()
        lr = learning_rate(self.config, self.state.step)
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        norm, bad, extra = None, 0, {}
        for micro_step in range(self._micro_steps):
            with self._timed("data"):
                batch = next(batches)
                bad += self._count_bad(batch)
                batch = batch.to(self.topology.device)
            embeddings = self.engine(self._inputs(batch.images), batch.visible)
            with self._timed("head"):
                loss = self.heads.loss(embeddings, batch, self.state.step, micro_step)
            for kind in loss.sums:
                sums[kind] = sums.get(kind, 0) + loss.sums[kind]
                counts[kind] = counts.get(kind, 0) + loss.counts[kind]
            extra = loss.metrics
            self.engine.backward((embeddings.float() * loss.gradient.float()).sum())
            norm = self.engine.step(lr)
        assert norm is not None
        with self._timed("head"):
            self.heads.step(lr, self.engine.clip_coefficient(norm))
        self.state.advance()
        seconds = time.perf_counter() - began
        return self._record(sums, counts, extra, norm, lr, seconds, bad)

    def _positions(self) -> Iterator[list[int]]:
        """Sample positions of this rank's micro-steps, from the present state to the end of the run."""
        batch, ranks = self.config.train.global_batch, self.topology.data_size
        first = self.state.position
        for step in range(self.config.train.steps - self.state.step):
            for micro_step in range(self._micro_steps):
                within = step_positions(
                    step, batch, micro_step, self._micro_steps, self.topology.data_rank, ranks
                )
                yield [first + p for p in within]

    def _inputs(self, images: Tensor) -> Tensor:
        return images.bfloat16() if self.config.train.precision == "bf16" else images

    def _count_bad(self, batch: Batch) -> int:
        for key, reason in zip(batch.bad_keys, batch.bad_reasons, strict=True):
            LOG.warning("sample %s was replaced: %s", key, reason)
        return batch.bad

    def _record(
        self,
        sums: dict[str, Tensor],
        counts: dict[str, Tensor],
        extra: dict[str, Tensor],
        norm: Tensor,
        lr: float,
        seconds: float,
        bad: int,
    ) -> dict[str, float | int | None]:
        if self.state.step % self.config.train.log_every:
            return {}
        losses = {
            f"loss_{kind}": sums[kind].item() / counts[kind].item() if counts[kind].item() else None
            for kind in sums
        }
        regions = self.config.train.global_batch * self.config.data.regions_per_image
        weights = {"object": self.config.head.object.weight, "text": self.config.head.text.weight}
        return {
            "loss": sum(weights[kind] * sums[kind].item() for kind in sums) / regions,
            **losses,
            "lr": lr,
            "grad_norm": norm.item(),
            "images_per_second": self.config.train.global_batch / seconds,
            "head_share": self._spent["head"] / seconds,
            "data_share": self._spent["data"] / seconds,
            "bad": bad,
            **{name: float(value) for name, value in extra.items()},
        }

    def _timed(self, name: str) -> _Timed:
        return _Timed(self._spent, name, self.topology.device)


class _Timed:
    """Adds the time of a block to a counter; on a GPU it counts only what the host waits for."""

    def __init__(self, spent: dict[str, float], name: str, device: torch.device) -> None:
        self._spent, self._name, self._device = spent, name, device

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._spent[self._name] += time.perf_counter() - self._began
