"""The training run: one loop that reads top to bottom.

    positions -> batches -> encoder -> heads -> gradients -> one clip -> update -> log -> maybe save

Everything random is a function of (seed, position), so a run continued from a checkpoint goes on as if it
had never stopped, and on another number of ranks it sees the same samples and the same negatives.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaregion.batching import Batching, batching, check_batching
from megaregion.checkpoint.fence import claim_together
from megaregion.checkpoint.format import DONE
from megaregion.config import RunConfig, StageConfig
from megaregion.data.batch import Batch
from megaregion.data.loader import RegionLoader
from megaregion.data.order import SampleOrder, step_positions
from megaregion.data.shards import ShardedDataset
from megaregion.data.transforms import Transform
from megaregion.errors import REQUEUE_EXIT, UserError
from megaregion.heap import keep_freed_memory
from megaregion.models.initialisation import initialise
from megaregion.models.linear import use_float8
from megaregion.models.plan import partial_gradients, tensor_parallel_plan
from megaregion.models.recompute import recompute_levels
from megaregion.models.vit import RegionEncoder, VisionTransformer, decays
from megaregion.parallel.tensor_parallel import parallelize
from megaregion.parallel.topology import Topology, all_gather_strings
from megaregion.parallel.zero import ZeroEngine
from megaregion.schemas.events import Events, process_start
from megaregion.training.faults import Faults
from megaregion.training.goodput import Meter
from megaregion.training.guard import Agreement, LossGuard, agree, write_refusal
from megaregion.training.heads import Heads
from megaregion.training.metrics import LOG, Metrics
from megaregion.training.profiling import StepProfiler
from megaregion.training.progress import Progress
from megaregion.training.schedule import learning_rate
from megaregion.training.signals import StopRequest
from megaregion.training.state import TrainingState
from megaregion.training.step_sums import StepSums
from megaregion.training.telemetry import Telemetry


class Trainer:
    """One rank of a training run."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        stop: StopRequest,
        progress: Progress | None = None,
        profile: tuple[int, int] | None = None,
        after_save: Callable[[int], None] = lambda step: None,
        begin: Callable[[VisionTransformer], None] | None = None,
    ) -> None:
        """Build data, body, heads and engine; nothing is read from a checkpoint yet.

        Args:
            config: The run.
            topology: This rank's place.
            stop: Whether somebody asked the run to stop.
            progress: Where the rank notes what it does, for a watchdog.
            profile: First and last step to profile.
            after_save: Called with the step once its save has begun; must return at once.
            begin: Puts weights into the whole transformer before it is cut over the ranks; None leaves
                those that the seed gives.

        Raises:
            UserError: The dataset cannot be used, or the batch sizes do not fit the ranks.
        """
        self.config = config
        self.topology = topology
        self.run_folder = Path(config.output) / config.name
        self._stop = stop
        self._progress = progress or Progress()
        self._after_save = after_save
        self._faults = Faults.of_rank(topology.rank)
        check_batching(config, topology.data_size)
        self.dataset = ShardedDataset(config.data.path, topology.rank == 0, config.data)
        order = SampleOrder(self.dataset.info.shard_sizes, config.seed, config.data.window_shards)
        transform = Transform(config.data, config.model, config.seed, config.stages)
        self._loader = RegionLoader(
            self.dataset, order, transform, config.data, skips_lost=topology.tensor_size == 1
        )
        self.heads = Heads(config, self.dataset, topology)
        classes = {kind: head.classes for kind, head in self.heads.by_kind.items()}
        self._times = Telemetry(config, topology, classes)
        self.engine = self._build_engine(begin)
        self._guard = LossGuard(config.guard)
        self._agreement = Agreement(stopping=False, finite=True, loss=0.0)
        self._refusal: str | None = None
        self.events = Events(self.run_folder, topology.rank == 0)
        # Last, so that a start that fails over a mistake takes no run away from its owner.
        fence = claim_together(self.run_folder / "checkpoints", topology)
        self.events.write(
            "start",
            at=process_start(),
            incarnation=fence.number,
            token=fence.token,
            ranks=topology.world_size,
            hosts=sorted(set(self._times.hosts)),
        )
        self.state = TrainingState(
            config, topology, self.engine, self.heads, self.dataset.info, fence, self.events, self._guard
        )
        self._profiler = StepProfiler(profile, self.run_folder, topology.rank, topology.device)

    def _build_engine(self, begin: Callable[[VisionTransformer], None] | None) -> ZeroEngine:
        model = RegionEncoder(self.config.model, self.config.head.embedding_dim)
        initialise(model, self.config.seed)
        if begin is not None:
            begin(model.vit)
        self._vit = model.vit
        if self.config.train.fp8:
            count = use_float8(model.vit.blocks, self.topology.device)
            LOG.info("%d linears multiply in 8-bit floats", count)
        if self.config.train.compile:
            for block in model.vit.blocks:
                block.compile()
        tokens_cut = self.config.parallel.tokens_cut
        placements = parallelize(
            model,
            tensor_parallel_plan(model),
            partial_gradients(model, tokens_cut),
            self.topology,
            tokens_cut,
        )
        return ZeroEngine(
            model.to(self.topology.device),
            placements,
            self.config,
            self.topology,
            decays,
            lambda: self._times.phase("communication"),
        )

    def run(self, stop_at: int | None = None) -> int:
        """Train to the last step, or until a stop is asked for.

        Args:
            stop_at: Save and leave after this step; the schedules still reach to train.steps.

        Returns:
            0 at the end of training, which DONE in the run's folder marks, or of ``stop_at``; 85 if the run
            saved on a signal and wants to be started again.

        Raises:
            Fenced: A newer start of the same run has taken it over.
        """
        if self.topology.device.type == "cpu":
            keep_freed_memory()
        metrics = Metrics(self.run_folder, self.topology.rank == 0, self.config.train.steps)
        batches = self._loader.batches(self._positions())
        try:
            end = min(stop_at or self.config.train.steps, self.config.train.steps)
            self.events.write("ready", step=self.state.step)
            self._stop.begin()
            goodput = Meter(self.run_folder) if self.topology.rank == 0 else None
            while self.state.step < end:
                self._profiler.before(self.state.step + 1)
                values = self.train_step(batches)
                self._profiler.after(self.state.step)
                slow = self._times.compare(values) if "loss" in values else {}
                if self.state.fenced():
                    self._stop.received = "a newer start of this run"
                elif "loss" in values:
                    metrics.write(self.state.step, values, slow)
                    self.state.note_loss(values["loss"])
                stopping, took = self._agreement.stopping, self._guard.consecutive == 0
                last = self.state.step == end
                if stopping or (took and (last or self.state.step % self.config.checkpoint.every == 0)):
                    self._save()
                    if goodput is not None:
                        goodput.blocked(self.state.blocked)
                        metrics.shares(self.state.step, goodput.shares())
                if stopping and not last:
                    self._finish_saving()
                    reason = self._stop.received or "another rank"
                    LOG.info("stopped by %s after step %d", reason, self.state.step)
                    self.events.write("stop", step=self.state.step, reason=reason)
                    return REQUEUE_EXIT
                if self._guard.wants_rollback:
                    self._go_back()
            self._finish_saving()
            self.events.write("end", step=self.state.step)
            if self.topology.rank == 0 and self.state.step == self.config.train.steps:
                (self.run_folder / DONE).touch()
            if (table := self._times.table()) is not None:
                LOG.info("time since the log line before the last:\n%s", table)
            return 0
        finally:
            self.state.settle()
            self._profiler.close()
            self._loader.close()
            metrics.close()

    def _finish_saving(self) -> None:
        """Wait for the last save; one that failed gets a second chance, for no later one will come."""
        if not self.state.wait():
            self.state.save(self.run_folder / "checkpoints")
            self.state.wait()

    def _save(self) -> None:
        self._progress.note("save", self.state.step)
        self._faults.save(self.state.step)
        with self._times.phase("save"):
            self.state.save(self.run_folder / "checkpoints")
        self._after_save(self.state.step)

    def train_step(self, batches: Iterator[Batch]) -> dict[str, float | int | None]:
        """Take one optimizer step; returns what is worth logging, nothing if the guard refused the step."""
        self._times.begin_step()
        stage = self.config.stage(self.state.position)
        cut = self._enter(stage)
        step, lr = self.state.step + 1, learning_rate(self.config, self.state.step) * stage.lr_scale
        sums = StepSums(self.config)
        for micro_step in range(cut.micro_steps):
            self._progress.note("data", step)
            with self._times.timed("data"):
                batch = next(batches)
                self._name_bad(batch)
                sums.see(batch)
                self._times.see(batch)
                labels = self.heads.send_labels(batch)
                batch = batch.to(self.topology.device)
            self._progress.note("forward", step)
            with self._times.forward():
                self._faults.forward(step)
                embeddings = self.engine(self._inputs(batch.images), batch.visible, batch.grids)
            if micro_step == 0 and (spoilt := self._faults.factor("nan", step)) is not None:
                embeddings = embeddings * spoilt
            self._progress.note("head", step)
            with self._times.timed("head"):
                loss = self.heads.loss(
                    embeddings,
                    labels,
                    batch.keys,
                    self.state.step,
                    micro_step,
                    cut,
                    refuse=not self._guard.enabled,
                )
            sums.add(loss)
            gradient = loss.gradient.float()
            if micro_step == 0 and (spoilt := self._faults.factor("nan-gradient", step)) is not None:
                gradient = gradient * spoilt
            self._progress.note("backward", step)
            with self._times.phase("backward"):
                last = micro_step == cut.micro_steps - 1
                self.engine.backward((embeddings.float() * gradient).sum(), last)
        self._progress.note("update", step)
        with self._times.phase("optimizer"):
            norm = self.engine.norm(self.heads.norm_squared())
            took = self._accepts(sums, norm)
            if took:
                self.engine.update(lr)
            else:
                self.engine.drop()
        self._finish(took, lr, norm, sums)
        spent = self._times.end_step(sums.bad)
        if not took:
            return {}
        values = self._record(sums, norm, lr, spent)
        every = self.config.head.census_every
        if every and self.state.step % every == 0:
            values.update(self.heads.census(self.state.step))
        return values

    def _accepts(self, sums: StepSums, norm: Tensor) -> bool:
        """Let all ranks agree on whether the step is taken, and on whether it is the last for now."""
        self._progress.note("agree", self.state.step + 1)
        with self._times.phase("communication"):
            self._agreement = agree(
                self._stop.received is not None, sums.loss(), norm, self.topology.world_group
            )
        self._refusal = self._guard.judge(self._agreement)
        if self._refusal is None and not self._agreement.finite:
            raise UserError(
                f"the gradient of step {self.state.step + 1} is not finite; the step was not taken; set "
                "guard.enabled true to skip such steps"
            )
        return self._refusal is None

    def _finish(self, took: bool, lr: float, norm: Tensor, sums: StepSums) -> None:
        """Move the heads with the body; or, if the step was refused, drop their gradients too."""
        if took:
            with self._times.timed("head"):
                self.heads.step(lr, self.engine.clip_coefficient(norm))
            self.state.advance()
            return
        self._log_refusal(sums, norm)
        self.heads.skip()
        self.state.skip()

    def _log_refusal(self, sums: StepSums, norm: Tensor) -> None:
        """Name the samples of a refused step; a collective, off the usual path."""
        own = {
            "positions": torch.cat(sums.positions).tolist(),
            "keys": [key for keys in sums.keys for key in keys],
            "not_finite": self.heads.spoilt(sums.keys),
        }
        # Ranks that share a model read the same samples.
        told = all_gather_strings(json.dumps(own) if self.topology.tensor_rank == 0 else "{}", self.topology)
        parts = [json.loads(text) for text in told]
        joined = {name: [item for part in parts for item in part.get(name, [])] for name in own}
        refusal = {
            "step": self.state.step + 1, "reason": self._refusal, "loss": str(sums.loss().item()),
            "grad_norm": str(norm.item()), "time": time.time(), **joined,
        }  # fmt: skip
        if self.topology.rank == 0:
            write_refusal(self.run_folder / "guard.jsonl", refusal)
        LOG.warning(
            "step %d was skipped (%d in a row): %s; positions %d to %d, samples %s",
            self.state.step + 1, self._guard.consecutive, self._refusal, min(joined["positions"]),
            max(joined["positions"]), _shortened(joined["not_finite"] or joined["keys"]),
        )  # fmt: skip

    def _go_back(self) -> None:
        """Return to the last checkpoint and go on with the data behind the refused steps; a collective."""
        self._guard.check_rollback()
        self._progress.note("load", self.state.step)
        skipped, rollbacks = self._guard.skipped, self._guard.rollbacks
        step, position = self.state.step, self.state.position
        if not self.state.resume(self.run_folder / "checkpoints"):
            raise UserError(
                f"the loss guard refused {self._guard.consecutive} steps in a row after step {step} and "
                f"there is no checkpoint to go back to; see {self.run_folder}/guard.jsonl for their samples"
            )
        self.state.position = position
        self._guard.went_back(skipped, rollbacks)
        LOG.warning(
            "went back from step %d to step %d and on from position %d (return %d)",
            step, self.state.step, position, rollbacks + 1,
        )  # fmt: skip

    def _positions(self) -> Iterator[list[int]]:
        """Sample positions of this rank's micro-steps from the present state on, without end.

        A refused step uses up its samples and is no step, so nobody knows beforehand how many are needed.
        """
        batch, place = self.config.train.global_batch, self.topology
        for first in itertools.count(self.state.position, batch):
            micro_steps = self._cut(self.config.stage(first)).micro_steps
            for micro_step in range(micro_steps):
                within = step_positions(0, batch, micro_step, micro_steps, place.data_rank, place.data_size)
                yield [first + p for p in within]

    def _cut(self, stage: StageConfig) -> Batching:
        return batching(self.config, self.topology.data_size, stage)

    def _enter(self, stage: StageConfig) -> Batching:
        """Be ready for steps of a resolution; what is recomputed changes no bit."""
        cut = self._cut(stage)
        self._vit.levels = recompute_levels(self.config, cut.micro_batch, stage.image_size)
        return cut

    def _inputs(self, images: Tensor) -> Tensor:
        return images.bfloat16() if self.config.train.precision == "bf16" else images

    def _name_bad(self, batch: Batch) -> None:
        for key, reason in zip(batch.bad_keys, batch.bad_reasons, strict=True):
            LOG.warning("sample %s was replaced: %s", key, reason)

    def _record(
        self, taken: StepSums, norm: Tensor, lr: float, spent: dict[str, float]
    ) -> dict[str, float | int | None]:
        if self.state.step % self.config.train.log_every:
            return {}
        sums, counts = taken.sums, taken.counts
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
            "images_per_second": self.config.train.global_batch / spent["seconds"],
            "head_share": spent["head_share"],
            "data_share": spent["data_share"],
            "bad": 0,
            "skipped": self._guard.skipped,
            "rollbacks": self._guard.rollbacks,
            **{name: float(value) for name, value in taken.metrics.items()},
        }


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
