"""The run's losses: a head per label kind that the dataset has, their joint loss, and beside it a teacher's.

Shapes: B images of this rank's micro-step, N regions of an image, E embedding width, T label slots, P patches
of an image, C width of the teacher's features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaregion.checkpoint.format import Piece
from megaregion.checkpoint.reader import CheckpointReader
from megaregion.checks import Batching
from megaregion.config import RunConfig
from megaregion.data.batch import OBJECT, TEXT, Batch
from megaregion.data.shards import Datasets
from megaregion.errors import UserError
from megaregion.heads.sampling import GatheringLabels
from megaregion.heads.sharded import ClassShardedHead, GatheredFeatures, NonFiniteFeatures
from megaregion.models import foreign
from megaregion.models.foreign import Foreign
from megaregion.parallel.topology import GatheringRows, NodeGroups, Topology, all_gather_strings

LOG = logging.getLogger("megaregion")

TAUGHT = 32
"""Most images that a teacher sees at once: it may keep what enters each of its blocks."""
KINDS = {"object": OBJECT, "text": TEXT}
"""Label kinds by head name."""
DISTILL = "distill"
"""The teacher's name among them."""


@dataclass(frozen=True)
class HeadsLoss:
    """What the heads give back for one micro-step."""

    gradient: Tensor
    """Gradient of the embeddings, [B, N, E], scaled as the engine wants it."""
    sums: dict[str, Tensor]
    """Sum of the row losses by kind over all ranks, 0-d."""
    counts: dict[str, Tensor]
    """Rows by kind over all ranks, 0-d."""
    metrics: dict[str, Tensor]
    """Further numbers by name, 0-d."""


class Heads:
    """All heads of a run, trained beside the engine."""

    def __init__(self, config: RunConfig, dataset: Datasets, topology: Topology) -> None:
        """Build a head for each label kind with classes and weight; classes spread over all ranks."""
        self._config = config
        self._topology = topology = replace(topology, node_groups=_node_groups(config, topology))
        self._stream = torch.cuda.Stream(topology.device) if topology.device.type == "cuda" else None
        classes = {"object": dataset.info.object_classes, "text": dataset.info.text_classes}
        settings = config.head.by_kind
        self.by_kind = {
            kind: ClassShardedHead(kind, config, classes[kind], topology).to(topology.device)
            for kind in KINDS
            if classes[kind] and settings[kind].weight
        }
        regions = config.train.global_batch * config.data.regions_per_image
        self._factors = {
            kind: torch.tensor(settings[kind].weight / regions, device=topology.device)
            for kind in self.by_kind
        }
        near, starts = config.head.object.near_classes, config.head.init == "centers"
        if "object" in self.by_kind and (near or starts):
            centers = [_centers(path, "head.object.near_classes" if near else "head.init centers")
                       for _, path in dataset.centers]  # fmt: skip
            if starts:
                self.by_kind["object"].start_from(*centers)
            if near:
                self.by_kind["object"].spare_near(*centers)

    def send_labels(self, batch: Batch) -> GatheringLabels:
        """Send a micro-step's labels to all data ranks; best before the encoder's pass is queued."""
        marked = torch.cat([batch.labels, batch.kinds[..., None].to(batch.labels)], 2).flatten(0, 1)
        return GatheringLabels(marked, self._topology, self._stream)

    def loss(
        self,
        embeddings: Tensor,
        labels: GatheringLabels,
        keys: Sequence[str],
        step: int,
        micro_step: int,
        sizes: Batching,
        refuse: bool = True,
    ) -> HeadsLoss:
        """Losses of one micro-step and the gradient they send into the body.

        The sum over all regions of the global batch is divided by their number, a constant, so the
        result does not depend on ranks, accumulation or the mix of kinds on a rank.

        Args:
            embeddings: Region embeddings of this rank, [B, N, E].
            labels: What the samples they came from are labelled with.
            keys: Keys of these samples.
            step: Steps already taken.
            micro_step: Index of the micro-step within the step.
            sizes: The step's micro-batches and draws.
            refuse: Raise NonFiniteFeatures; else the loss is not finite then and the caller judges.
        """
        leaf = embeddings.detach().requires_grad_()
        # While the rows travel, the classes are drawn and the centers fetched.
        wide = torch.float32 if self._config.train.sum_precision == "fp32" else None
        rows = GatheredFeatures(leaf.flatten(0, 1), self._topology, wide)
        each = self._config.data.regions_per_image
        first = micro_step * sizes.micro_batch * self._topology.data_size * each
        marked, draw_rows = labels.arrive(), sizes.draw_images * each
        targets = {
            kind: head.draw(marked[:, :-1], marked[:, -1] == KINDS[kind], step, first, draw_rows)
            for kind, head in self.by_kind.items()
        }
        losses, sums, counts, metrics = [], {}, {}, {}
        for kind, head in self.by_kind.items():
            head.guard.waits = not refuse
            try:
                result = head.score(rows, targets[kind])
            except NonFiniteFeatures as error:
                for key in self._samples_of(error.rows, keys):
                    LOG.error("features of sample %s are not finite", key)
                raise
            losses.append(result.sum)
            sums[kind], counts[kind] = result.sum.detach(), result.count
            metrics.update({f"{kind}/{name}": value for name, value in result.metrics.items()})
        # Not by way of their weighted sum, which nobody looks at and whose parts are kernels each.
        torch.autograd.backward(losses, [self._factors[kind] for kind in targets])
        assert leaf.grad is not None
        return HeadsLoss(leaf.grad, sums, counts, metrics)

    def _samples_of(self, rows: Sequence[int], keys: Sequence[str]) -> list[str]:
        """This rank's samples among rows of the micro-step's global order."""
        regions = self._config.data.regions_per_image
        first = self._topology.data_rank * len(keys) * regions
        samples = sorted({(row - first) // regions for row in rows if first <= row})
        return [keys[sample] for sample in samples if sample < len(keys)]

    def spoilt(self, keys: Sequence[Sequence[str]]) -> list[str]:
        """This rank's samples whose features were not finite, where :meth:`loss` did not refuse them.

        The keys are those of each micro-step since the last :meth:`step` or :meth:`skip`.
        """
        return [
            key
            for head in self.by_kind.values()
            for rows, micro_step in zip(head.guard.spoilt(), keys, strict=True)
            for key in self._samples_of(rows, micro_step)
        ]

    def skip(self) -> None:
        """Forget the gradients without a step."""
        for head in self.by_kind.values():
            head.zero_grad()

    def norm_squared(self) -> Tensor:
        """Squared gradient norm over all heads and ranks, 0-d."""
        zero = torch.zeros((), device=self._topology.device)
        return sum((head.grad_norm_squared() for head in self.by_kind.values()), zero)

    def step(self, lr: float, scale: Tensor) -> None:
        """Update the centers with clipped gradients, then forget the gradients."""
        for head in self.by_kind.values():
            head.step(lr, scale)
            head.zero_grad()

    def find_dead_classes(self, step: int) -> dict[str, float]:
        """Report idle classes and probed centers with a double; gives their shares by kind; a collective."""
        shares = {}
        for kind, head in self.by_kind.items():
            found = head.find_dead_classes(step, self._config.head.idle_steps)
            shares[f"{kind}/idle_share"] = found.idle / head.classes
            shares[f"{kind}/alike_share"] = len(found.doubles) / found.probed
            if self._topology.rank == 0 and (found.idle or found.doubles):
                LOG.warning("%s", found.report(kind, head.classes, self._config.head.idle_steps))
        return shares

    def state(self) -> Iterator[Piece]:
        """This rank's part of every head tensor."""
        for kind, head in self.by_kind.items():
            for name, (full_shape, offset, tensor) in head.state().items():
                yield Piece(f"head.{kind}.{name}", tuple(full_shape), tuple(offset), tensor)

    def load(self, reader: CheckpointReader) -> None:
        """Read this rank's part from a checkpoint of any number of ranks."""

        def read(kind: str, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
            return reader.read(f"head.{kind}.{name}", offset, shape)

        for kind, head in self.by_kind.items():
            head.load(partial(read, kind))


class Teacher:
    """A frozen encoder, from whose features of patches the run's are to differ little (config.distill).

    It sees the same crops, in its own normalisation, at a size of which it makes as many patches.
    """

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        """Load it on every rank; a collective.

        Raises:
            UserError: It cannot be loaded, or gives no features of patches.
        """
        self._config, self._topology = config, topology
        self._teacher = _in_turn(config.distill.teacher, topology)
        self._model = self._teacher.model.to(topology.device).requires_grad_(False)
        student, own = (
            torch.tensor([by.mean, by.std], device=topology.device).view(2, 3, 1, 1)
            for by in (config.data, self._teacher)
        )
        self._scale, self._shift = student[1] / own[1], (student[0] - own[0]) / own[1]
        sizes = [config.model.image_size, *(stage.image_size for stage in config.stages)]
        probed = {size // config.model.patch_size: self._probe(size) for size in sizes}
        self._sides = {grid: side for grid, (side, _) in probed.items()}
        """Side in pixels of what it sees, by the side of the student's grid."""
        self.width = next(iter(probed.values()))[1]
        """C."""
        if topology.rank == 0:
            sides = ", ".join(map(str, self._sides.values()))
            LOG.info("patches learn from %s: %d wide, at %s px", config.distill.teacher, self.width, sides)

    @torch.no_grad()
    def _probe(self, size: int) -> tuple[int, int]:
        """Side in pixels at which it is to see crops of a size, and its width.

        That is the side of as many patches, or its own where it takes no other.
        """
        wanted = size // self._config.model.patch_size * self._teacher.patch
        for side in (wanted, self._teacher.side):
            blank = torch.zeros(1, 3, side, side, dtype=self._model.dtype, device=self._topology.device)
            with suppress(RuntimeError, ValueError, TypeError):
                return side, foreign.see(self._model, blank)[1].shape[-1]
        raise UserError(
            f"distill.teacher {self._config.distill.teacher} gives no features of each patch of an image of "
            f"{wanted} or {self._teacher.side} px; name a vision transformer"
        )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Its features of the patches of normalised crops, [B, 3, H, W], as [B, P, C]; a collective.

        Ranks that share a model have the same images: each asks about its share of them.
        """
        place, grid = self._topology, images.shape[-1] // self._config.model.patch_size
        each = -(-len(images) // place.tensor_size)
        first = place.tensor_rank * each
        places = torch.arange(first, first + each, device=images.device).clamp(max=len(images) - 1)
        seen = torch.cat([self._see(images[part], grid) for part in places.split(TAUGHT)])
        if place.tensor_size == 1:
            return seen
        return GatheringRows(seen, place.tensor_group).arrive()[: len(images)]

    def _see(self, images: Tensor, grid: int) -> Tensor:
        side = self._sides[grid]
        pixels = _resized(images * self._scale + self._shift, side)
        _, cells = foreign.see(self._model, pixels.to(self._model.dtype))
        return _resized(cells.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)

    def loss(self, distance: Tensor, images: int, sums: StepSums) -> Tensor:
        """The part of a sum of distances over this rank's images in what the engine differentiates, 0-d.

        The sum over the global batch is divided by its images, a constant, as the heads' is by its regions.
        """
        place = self._topology
        total = distance.detach().clone()
        dist.all_reduce(total, group=place.data_group)
        sums.add_distance(total, images * place.data_size)
        # The engine averages over the data ranks.
        return distance * (sums.factors[DISTILL] * place.data_size)


def _in_turn(path: str, topology: Topology) -> Foreign:
    """A teacher, which rank 0 loads before the others, so that it comes from the hub once; a collective."""
    dtype = torch.bfloat16 if topology.device.type == "cuda" else torch.float32
    for first in (True, False):
        reason = ""
        if (topology.rank == 0) == first:
            try:
                loaded = foreign.load(path, dtype=dtype)
            except UserError as error:
                reason = f"distill.teacher: {error}"
        if told := [text for text in all_gather_strings(reason, topology) if text]:
            raise UserError(told[0])
    return loaded


def _resized(images: Tensor, side: int) -> Tensor:
    """Images or maps [B, ..., h, w] at another size, [B, ..., side, side]."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)


class StepSums:
    """What one optimizer step gathers over its micro-steps: losses, and the samples they came from."""

    def __init__(self, config: RunConfig) -> None:
        batch, kinds = config.train.global_batch, config.head.by_kind.items()
        regions = batch * config.data.regions_per_image
        self.factors = {kind: head.weight / regions for kind, head in kinds}
        """What a sum of each kind is multiplied by in the step's loss."""
        self.factors[DISTILL] = config.distill.weight / batch
        self.sums: dict[str, Tensor] = {}
        """Sum of the row losses by kind over all ranks, and of the distances from a teacher, 0-d."""
        self.counts: dict[str, Tensor] = {}
        """Rows by kind over all ranks, and images, 0-d."""
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
        self.bad += batch.found.bad

    def add(self, loss: HeadsLoss) -> None:
        """Add a micro-step's losses."""
        for kind, part in loss.sums.items():
            self.sums[kind] = self.sums.get(kind, 0.0) + part
            self.counts[kind] = self.counts.get(kind, 0.0) + loss.counts[kind]
        self.metrics = loss.metrics

    def add_distance(self, total: Tensor, images: int) -> None:
        """Add a micro-step's distances from the teacher, over so many images of all ranks."""
        self.sums[DISTILL] = self.sums.get(DISTILL, 0.0) + total
        self.counts[DISTILL] = self.counts.get(DISTILL, 0.0) + total.new_full((), images)

    def loss(self) -> Tensor:
        """The step's loss, per region and, of the teacher's, per image, 0-d; no wait for the device."""
        return torch.stack([total * self.factors[kind] for kind, total in self.sums.items()]).sum()

    def means(self) -> dict[str, float | None]:
        """The loss, and its mean over each kind's rows, None without rows; waits for the device."""
        sums = {kind: total.item() for kind, total in self.sums.items()}
        counts = {kind: count.item() for kind, count in self.counts.items()}
        return {
            "loss": sum(self.factors[kind] * sums[kind] for kind in sums),
            **{f"loss_{kind}": sums[kind] / counts[kind] if counts[kind] else None for kind in sums},
        }


def _centers(path: Path, key: str) -> np.ndarray:
    """A dataset's centers, mapped: a rank reads those that it needs.

    Raises:
        UserError: They are not there, or no matrix.
    """
    try:
        centers: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        why = "it does not exist" if isinstance(error, FileNotFoundError) else error
        raise UserError(
            f"{key} needs {path}, which cannot be read ({why}); curate or pack the dataset again, or leave "
            f"{key.split()[0]} at its default"
        ) from None
    return centers


def _node_groups(config: RunConfig, topology: Topology) -> NodeGroups | None:
    """The groups of the hierarchical gather, if it is wanted.

    Raises:
        UserError: It is demanded where there are no several nodes of several equal copies of the model.
    """
    if config.head.hierarchical == "on" and topology.node_groups is None:
        raise UserError(
            "head.hierarchical on needs several nodes with the same number of ranks, at least 2 x "
            f"parallel.tensor {topology.tensor_size} on each, as the launcher tells by LOCAL_WORLD_SIZE or "
            "SLURM_STEP_TASKS_PER_NODE; use auto"
        )
    return None if config.head.hierarchical == "off" else topology.node_groups
