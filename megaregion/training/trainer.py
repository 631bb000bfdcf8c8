"""The training run: one loop that reads top to bottom.

Everything random is a function of (seed, position), so a run continued from a checkpoint goes on as if it
had never stopped, and on another number of ranks it sees the same samples and the same negatives.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaregion.checkpoint.fence import claim_together
from megaregion.checkpoint.format import step_folder, step_folders
from megaregion.checks import Batching, batching, check_batching
from megaregion.config import DataConfig, RunConfig, StageConfig
from megaregion.data.batch import Batch
from megaregion.data.loader import RegionLoader
from megaregion.data.order import MixedOrder, kept_branches, step_positions
from megaregion.data.shards import Mixture, order_of
from megaregion.data.transforms import Transform
from megaregion.errors import REQUEUE_EXIT, StopRequest, UserError
from megaregion.heads.sampling import GatheringLabels
from megaregion.models.costs import recompute_of_run
from megaregion.models.initialisation import initialise
from megaregion.models.layers import compile_blocks, use_float8, use_narrow
from megaregion.models.vit import (
    RegionEncoder,
    VisionTransformer,
    decays,
    learning_rate_factor,
    matrices,
    partial_gradients,
    tensor_parallel_plan,
)
from megaregion.parallel.tensor_parallel import parallelize
from megaregion.parallel.topology import Topology, all_gather_strings, host_name
from megaregion.parallel.zero import ZeroEngine
from megaregion.processor import is_narrow, keep_freed_memory
from megaregion.schemas.run import DONE, GUARD, Events, Meter, process_start
from megaregion.training.clock import Clock, StepProfiler, StepTimes, Times, Utilisation, gather_times
from megaregion.training.faults import Agreement, agree, write_refusal
from megaregion.training.losses import Heads, StepSums, Teacher
from megaregion.training.metrics import LOG, Metrics, Shown, Trackers
from megaregion.training.preflight import open_dataset
from megaregion.training.state import CAPTURES, TrainingState, check_local, check_newest

Values = dict[str, float | int | None]
"""Numbers of a log line by name; None where a step has no such value."""


class Trainer:
    """One rank of a training run."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        stop: StopRequest,
        clock: Clock | None = None,
        profile: tuple[int, int] | None = None,
        after_save: Callable[[int], None] = lambda step: None,
        begin: Callable[[VisionTransformer], None] | None = None,
    ) -> None:
        """Build data, body, heads and engine; nothing is read from a checkpoint yet.

        The steps to ``profile`` are the first and the last. ``after_save`` is called with the step once its
        save has begun, and must return at once. ``begin`` puts other weights than the seed's into the whole
        transformer.

        Raises:
            UserError: The dataset cannot be used, or the batch sizes do not fit the ranks.
        """
        self.config, self.topology, self._stop, self._after_save = config, topology, stop, after_save
        self.clock = clock or Clock.of_run(config, topology)
        self.run_folder = Path(config.output) / config.name
        check_batching(config, topology.data_size)
        self.hosts = all_gather_strings(host_name(), topology)
        """Host of every rank."""
        self.dataset = open_dataset(config.data, topology, self.hosts)
        self._order = order_of(self.dataset, config.data, config.seed)
        self.loader = self._loader(config.data)
        self.heads = Heads(config, self.dataset, topology)
        classes = {kind: head.classes for kind, head in self.heads.by_kind.items()}
        self.teacher = Teacher(config, topology) if config.distill.teacher else None
        width = self.teacher.width if self.teacher else 0
        self._utilisation = Utilisation(config, classes, topology, width)
        self.engine = self._build_engine(begin, width)
        self.events = Events(self.run_folder, topology.rank == 0)
        self.state = self._claim_state()
        self._agreement = Agreement(stopping=False, finite=True, loss=0.0)
        self._refusal: str | None = None
        self._times: Times | None = None
        self._profiler = StepProfiler(profile, self.run_folder, topology.rank, topology.device)

    def _loader(self, data: DataConfig) -> RegionLoader:
        transform = Transform(data, self.config.model, self.config.seed, self.config.stages)
        return RegionLoader(
            self.dataset, self._order, transform, data, skips_lost=self.topology.tensor_size == 1
        )

    def _build_engine(
        self, begin: Callable[[VisionTransformer], None] | None, teacher_width: int
    ) -> ZeroEngine:
        config, tokens_cut = self.config, self.config.parallel.tokens_cut
        model = RegionEncoder(config.model, config.head.embedding_dim, teacher_width)
        initialise(model, config.seed)
        if begin is not None:
            begin(model.vit)
        self._vit = model.vit
        if config.train.fp8:
            count = use_float8(model.vit.blocks, self.topology.device)
            LOG.info("%d linears multiply in 8-bit floats", count)
        if is_narrow(config.train.precision, self.topology.device):
            use_narrow(model.vit.blocks)
        if config.train.compile:
            compile_blocks(model.vit.blocks)
        plan, partial = tensor_parallel_plan(model), partial_gradients(model, tokens_cut)
        placements = parallelize(model, plan, partial, self.topology, tokens_cut)
        self.clock.faults.spoil(model)
        model.to(self.topology.device)
        return ZeroEngine(
            model, placements, config, self.topology, decays, lambda: self.clock.span("communication"),
            lambda name: learning_rate_factor(name, config.model, config.optimizer.layer_decay),
            lambda name: matrices(name, config.model),
        )  # fmt: skip

    def _claim_state(self) -> TrainingState:
        """Claim the run; last, so that a start that is refused takes no run away from its owner."""
        check_local(self.config, self.topology)
        check_newest(self.config, self.dataset.info, self.engine.placements, self.topology)
        fence = claim_together(self.run_folder / "checkpoints", self.topology)
        self.events.write(
            "start", at=process_start(), incarnation=fence.number, token=fence.token,
            ranks=self.topology.world_size, hosts=sorted(set(self.hosts)),
        )  # fmt: skip
        info = self.dataset.info
        return TrainingState(self.config, self.topology, self.engine, self.heads, info, fence, self.events)

    def start(self, resume: bool) -> None:
        """Say what runs here, and go on from the run's newest whole checkpoint if it is wanted; a collective.

        Raises:
            UserError: The run's checkpoints do not fit, or none of them is whole.
        """
        place, info = self.topology, self.dataset.info
        if place.rank == 0:
            LOG.info(
                "%d ranks: tensor %d x data %d, ZeRO %d, %s, %d samples, %d object and %d text classes",
                place.world_size, place.tensor_size, place.data_size, self.engine.stage,
                self.config.train.precision, info.samples, info.object_classes, info.text_classes,
            )  # fmt: skip
            if isinstance(self.dataset, Mixture):
                LOG.info("%s", self.dataset)
            for notice in info.notices():
                LOG.warning("%s", notice)
        with self.clock.span("load"):
            if resume and not self.state.resume() and place.rank == 0:
                LOG.info("no checkpoint in %s yet: starting", self.state.checkpoints)

    def run(self, stop_at: int | None = None, trackers: Trackers | None = None) -> int:
        """Train to the last step, to ``stop_at`` (schedules stay as they are), or until a stop is asked for.

        Rank 0 shows its metrics in the ``trackers``, and leaves them open.

        Returns:
            0 at the end of training, which DONE in the run's folder marks, or of ``stop_at``; 85 if the run
            saved on a signal and wants to be started again.

        Raises:
            Fenced: A newer start of the same run has taken it over.
            UserError: The last checkpoint could not be saved; the text names a copy if one was made.
        """
        if self.topology.device.type == "cpu":
            keep_freed_memory()
        end = min(stop_at or self.config.train.steps, self.config.train.steps)
        metrics = Metrics(self.run_folder, self.topology.rank == 0, self.config.train.steps, trackers)
        batches = self.batches()
        try:
            self.events.write("ready", step=self.state.step)
            self._stop.begin()
            goodput = Meter(self.run_folder) if self.topology.rank == 0 else None
            while self.state.step < end:
                self._profiler.before(self.state.step + 1)
                values = self.train_step(batches)
                self._profiler.after(self.state.step)
                self._log(values, metrics)
                stopping = self._agreement.stopping
                if stopping or self._save_is_due(end):
                    LOG.debug("saving")
                    with self.clock.span("save"):
                        self.state.save()
                    self._after_save(self.state.step)
                    if goodput is not None and trackers is not None:
                        goodput.blocked(self.state.blocked)
                        spent = {f"time/{name}": share for name, share in goodput.shares().items()}
                        trackers.show(Shown(self.state.step, spent))
                if stopping and self.state.step < end:
                    return self._leave()
                if self.state.guard.wants_rollback:
                    LOG.debug("loading")
                    with self.clock.span("load"):
                        self.state.go_back()
            self._end()
            return 0
        finally:
            self.state.settle()
            self._profiler.close()
            self.loader.close()
            metrics.close()

    def train_step(self, batches: Iterator[Batch]) -> Values:
        """Take one optimizer step; returns what is worth logging, nothing if the guard refused the step."""
        stage = self.config.stage(self.state.position)
        sizes = self._enter(stage)
        lr = learning_rate(self.config, self.state.step) * stage.lr_scale
        sums, span = StepSums(self.config), self.clock.span
        self.clock.begin_step(self.state.step + 1)
        for micro_step in range(sizes.micro_steps):
            with span("data"):
                batch, kept, labels = self._next(batches, sums)
            with span("forward"):
                embeddings, distance = self.encode(batch, kept)
            with span("head"):
                loss = self.heads.loss(
                    embeddings, labels, batch.keys, self.state.step, micro_step, sizes,
                    refuse=not self.state.guard.enabled,
                )  # fmt: skip
                sums.add(loss)
            with span("backward"):
                total = (embeddings.float() * loss.gradient.float()).sum()
                if self.teacher is not None and distance is not None:
                    total = total + self.teacher.loss(distance, len(batch.keys), sums)
                self.engine.backward(total, last=micro_step == sizes.micro_steps - 1)
        with span("optimizer"):
            norm = self.engine.norm(self.heads.norm_squared())
            if accepted := self._accepts(sums, norm):
                self.engine.update(lr)
        if not accepted:
            return self._skip(sums, norm)
        with span("head"):
            self.heads.step(lr, self.engine.clip_coefficient(norm))
        self.state.advance()
        return self._record(sums, norm, lr, self.clock.end_step(sums.bad))

    def encode(self, batch: Batch, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Region embeddings of a micro-batch, [B, N, E], and its distance from the teacher, None without one.

        ``kept`` and both results are as of :class:`RegionEncoder`.
        """
        images = batch.images.bfloat16() if self.config.train.bf16 else batch.images
        inputs = (images, batch.visible, batch.grids, kept)
        if self.teacher is None:
            return self.engine(*inputs), None
        embeddings, distance = self.engine(*inputs, self.teacher.features(batch.images))
        return embeddings, distance

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the present state on, without end.

        A refused step uses up its samples and is no step, so nobody knows beforehand how many are needed.
        """
        batch, first = self.config.train.global_batch, self.state.position
        return self.loader.batches(chain.from_iterable(map(self._positions, itertools.count(first, batch))))

    def _positions(self, first: int) -> list[list[int]]:
        """Positions of this rank's micro-batches in the step that begins with a position."""
        batch, place = self.config.train.global_batch, self.topology
        steps = batching(self.config, place.data_size, self.config.stage(first)).micro_steps
        within = (step_positions(0, batch, m, steps, place.data_rank, place.data_size) for m in range(steps))
        return [[first + position for position in own] for own in within]

    def _enter(self, stage: StageConfig) -> Batching:
        """Be ready for steps of a resolution; what is recomputed changes no bit."""
        sizes = batching(self.config, self.topology.data_size, stage)
        self._vit.recompute = recompute_of_run(self.config, sizes.micro_batch, stage.image_size)
        return sizes

    def _next(self, batches: Iterator[Batch], sums: StepSums) -> tuple[Batch, Tensor | None, GatheringLabels]:
        """The next micro-batch on the device, what of each block it keeps, and its labels on their way."""
        batch = next(batches)
        for key, reason in zip(batch.found.bad_keys, batch.found.bad_reasons, strict=True):
            LOG.warning("sample %s was replaced: %s", key, reason)
        sums.see(batch)
        self._utilisation.see(batch)
        labels, device = self.heads.send_labels(batch), self.topology.device
        return batch.to(device), draw_kept(self.config, batch.positions, device), labels

    def _accepts(self, sums: StepSums, norm: Tensor) -> bool:
        """Let all ranks agree on whether the step is taken, and on whether it is the last for now."""
        with self.clock.span("communication"):
            asked = self._stop.received is not None
            self._agreement = agree(asked, sums.loss(), norm, self.topology.world_group)
        self._refusal = self.state.guard.judge(self._agreement)
        if self._refusal is None and not self._agreement.finite:
            raise UserError(
                f"the gradient of step {self.state.step + 1} is not finite; the step was not taken; set "
                "guard.enabled true to skip such steps"
            )
        return self._refusal is None

    def _skip(self, sums: StepSums, norm: Tensor) -> Values:
        """Forget a refused step and name its samples; a collective, off the usual path."""
        own = {
            "positions": torch.cat(sums.positions).tolist(),
            "keys": [key for keys in sums.keys for key in keys],
            "not_finite": self.heads.spoilt(sums.keys),
        }
        kept = [folder.name for folder in step_folders(self.run_folder / CAPTURES)]
        texts = all_gather_strings(json.dumps({**own, "kept": kept}), self.topology)
        # Ranks that share a model read the same samples.
        parts = [json.loads(text) for text in texts[:: self.topology.tensor_size]]
        joined = {name: [item for part in parts for item in part[name]] for name in own}
        kept = parts[0]["kept"]  # As rank 0 sees the disk.
        names = list(dict.fromkeys(joined["not_finite"])) or joined["keys"]
        told = f"samples {', '.join(names[:8])}" + f" and {len(names) - 8} more" * (len(names) > 8)
        if joined["not_finite"] and len(names) == len(joined["keys"]):
            told = (
                "all samples alike, so weights or settings (data.std, model.norm_eps) are to blame, not they"
            )
        refusal = {
            "step": self.state.step + 1, "reason": self._refusal, "loss": str(sums.loss().item()),
            "grad_norm": str(norm.item()), "time": time.time(), **joined,
        }  # fmt: skip
        if self.topology.rank == 0:
            write_refusal(self.run_folder / GUARD, refusal)
        LOG.warning(
            "step %d was skipped (%d in a row): %s; positions %d to %d, %s",
            self.state.step + 1, self.state.guard.consecutive, self._refusal, min(joined["positions"]),
            max(joined["positions"]), told,
        )  # fmt: skip
        self.engine.drop()
        self.heads.skip()
        new = step_folder(Path(), self.state.step).name not in kept
        if not self._agreement.finite and new and len(kept) < self.config.guard.captures:
            with self.clock.span("save"):
                self._capture(refusal)
        self.state.skip()
        self.clock.end_step(sums.bad)
        return {}

    def _capture(self, refusal: dict[str, Any]) -> None:
        """Keep the refused step for a replay, with its batch, which follows from its positions once more."""
        again = self._loader(replace(self.config.data, workers=0))
        own = self._positions(self.state.position) if self.topology.tensor_rank == 0 else []
        self.state.capture(again.batches(own), refusal)

    def _record(self, sums: StepSums, norm: Tensor, lr: float, took: StepTimes) -> Values:
        """What is worth logging of a step that was taken: nothing between log lines."""
        values: Values = {}
        if self.state.step % self.config.train.log_every == 0:
            guard = self.state.guard
            values = {
                **sums.means(), "lr": lr, "grad_norm": norm.item(),
                "images_per_second": self.config.train.global_batch / took.seconds,
                "head_share": took.head_share, "data_share": took.data_share, "bad": 0,
                "skipped": guard.skipped, "rollbacks": guard.rollbacks, **self._samples_of_datasets(),
                **{name: float(value) for name, value in sums.metrics.items()},
            }  # fmt: skip
        every = self.config.head.census_every
        if every and self.state.step % every == 0:
            values.update(self.heads.find_dead_classes(self.state.step))
        return values

    def _samples_of_datasets(self) -> dict[str, int]:
        """How many of the step's samples came from each of several datasets."""
        if not (isinstance(self._order, MixedOrder) and isinstance(self.dataset, Mixture)):
            return {}
        end = self.state.position
        ends = zip(*map(self._order.reached, (end - self.config.train.global_batch, end)), strict=True)
        counts = [after - before for before, after in ends]
        return {f"samples/{name}": count for name, count in zip(self.dataset.names, counts, strict=True)}

    def _log(self, values: Values, metrics: Metrics) -> None:
        """Complete a log step's values by the times of all ranks and write them; a collective then."""
        notes = self._compare(values) if "loss" in values else {}
        if self.state.fenced():
            self._stop.received = "a newer start of this run"
        elif "loss" in values:
            metrics.write(self.state.step, values, notes)
            self.state.note_loss(values["loss"])

    def _compare(self, values: Values) -> dict[str, object]:
        """Add the times of all ranks to a log step's values, and name the slow ranks."""
        times = self._times = gather_times(self.clock.take(), self.topology)
        own = times.by_rank[self.topology.rank]
        values["mfu"] = self._utilisation.take(own.steps)
        values.update({f"time/{name}": seconds for name, seconds in times.mean().items()})
        values["memory"] = max(rank.memory for rank in times.by_rank) / 1e9
        values["bad"] = sum(rank.bad for rank in times.by_rank[:: self.topology.tensor_size])
        slow = times.slow_ranks(self.config.train.slow_factor)
        for rank, ratio in slow.items():
            LOG.warning(
                "rank %d on %s is slow: its own time is %.1f times the median (%.0f%% of it for data)",
                rank, self.hosts[rank], ratio, 100 * times.by_rank[rank].data / times.by_rank[rank].own,
            )  # fmt: skip
        return {
            "time_by_rank": times.rounded(),
            "slowest": times.slowest(),
            "slow": [{"rank": r, "host": self.hosts[r], "ratio": round(x, 2)} for r, x in slow.items()],
        }

    def _save_is_due(self, end: int) -> bool:
        step, taken = self.state.step, self.state.guard.consecutive == 0
        return taken and (step == end or step % self.config.checkpoint.every == 0)

    def _leave(self) -> int:
        """End before the last step, as was asked; returns the exit code."""
        if not self.state.finish():
            raise self.state.rescue()
        reason = self._stop.received or "another rank"
        LOG.info("stopped by %s after step %d", reason, self.state.step)
        self.events.write("stop", step=self.state.step, reason=reason)
        return REQUEUE_EXIT

    def _end(self) -> None:
        if not self.state.finish():
            raise self.state.rescue()
        self.events.write("end", step=self.state.step)
        if self.topology.rank == 0 and self.state.step == self.config.train.steps:
            (self.run_folder / DONE).touch()
        if self._times is not None:
            LOG.info("time since the log line before the last:\n%s", self._times.table(self.hosts))


def draw_kept(config: RunConfig, positions: Tensor, device: torch.device) -> Tensor | None:
    """What stochastic depth keeps of the images at positions, [B, 2 L]; None where it is off."""
    if not any(rates := config.model.drop_rates):
        return None
    kept = torch.from_numpy(kept_branches(config.seed, positions.tolist(), rates))
    return kept.to(device, non_blocking=True)


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of a step, from 0: linear warm-up, then cosine decay to min_lr_ratio of the peak."""
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    span = max(1, config.train.steps - optimizer.warmup_steps)
    progress = min(1.0, (step - optimizer.warmup_steps) / span)
    ratio = optimizer.min_lr_ratio
    return optimizer.lr * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
