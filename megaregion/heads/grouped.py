"""All draws of a micro-step in one launch per product, on GPUs; and the choice of that or draw after draw.

A *wave* is as many rows as memory for their exponentials allows: pieces of draws, mostly all draws of the
micro-step. Products, exponentials, sums and maxima of rows come from one kernel, which writes exponentials in
the operands' type: 2 bytes a score for a bf16 body. With the sums of all ranks, a kernel makes losses,
puts what the rows' own positives weigh among the exponentials, and writes the rows times their factor; two
products on the exponentials are then the gradients. Centers of all draws are fetched as unit ones before.

Shapes: R rows of a wave, S drawn classes of all draws, E width, T positives of a row.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.heads.centers import ClassGradient
from megaregion.heads.sampling import Draw, DrawRule, NearClasses, build_targets, send
from megaregion.heads.streaming import BOUNDED_SCALE, LOG2E, HeadWork, RowSums, StreamedDraws
from megaregion.heads.tiles import BLOCK_ROWS, Scratch
from megaregion.parallel.topology import Topology

LOG = logging.getLogger(__name__)
PROGRAMS = 264
"""Programs that keep a GPU busy: two for each processor of an H100."""
ALIGNED = 16
"""Elements that a row of exponentials begins at multiples of."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel's programs, if there are any."""
    if all(grid):
        kernel[grid](*arguments, **constants)


class Piece(NamedTuple):
    """Rows of one draw in a wave."""

    rows: slice
    """Among the head's rows."""
    slots: slice
    """The draw's classes among those of all draws."""

    @property
    def stride(self) -> int:
        """Elements from a row's exponentials to the next row's."""
        return -(-(self.slots.stop - self.slots.start) // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class Wave:
    """Rows whose exponentials are in memory together."""

    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> slice:
        """Among the head's rows."""
        return slice(self.pieces[0].rows.start, self.pieces[-1].rows.stop)

    @property
    def elements(self) -> int:
        """Of the exponentials."""
        return sum((piece.rows.stop - piece.rows.start) * piece.stride for piece in self.pieces)

    def tables(self, row_block: int, class_block: int) -> tuple[np.ndarray, np.ndarray]:
        """What each program has to do, [programs, 6]: for blocks of rows, and for blocks of classes.

        Lines are as ``kernels._line`` reads them; rows are counted within the wave, classes by slots.
        """
        by_row, by_class, offset = [], [], 0
        for piece in self.pieces:
            first, count = piece.rows.start - self.rows.start, piece.rows.stop - piece.rows.start
            slot, classes = piece.slots.start, piece.slots.stop - piece.slots.start
            by_row += [
                (
                    first + begin,
                    min(row_block, count - begin),
                    slot,
                    classes,
                    offset + begin * piece.stride,
                    piece.stride,
                )
                for begin in range(0, count, row_block)
            ]
            by_class += [
                (slot + begin, min(class_block, classes - begin), first, count, offset + begin, piece.stride)
                for begin in range(0, classes, class_block)
            ]
            offset += count * piece.stride
        return tuple(np.array(lines, np.int64).reshape(-1, 6) for lines in (by_row, by_class))  # type: ignore[return-value]


def cut_waves(draws: tuple[Draw, ...], budget: int, block: int) -> list[Wave]:
    """Cut a micro-step's rows, the same way on every rank, so that a wave has about ``budget`` scores.

    A wave has at least ``block`` rows of a draw, or the rest of it.
    """
    waves: list[list[Piece]] = [[]]
    room = budget
    for draw in draws:
        each, start = max(1, draw.typical_size), draw.rows.start
        while start < draw.rows.stop:
            left = draw.rows.stop - start
            fitting = left if left * each <= room else max(0, room) // each // block * block
            if not fitting and waves[-1]:
                waves.append([])
                room = budget
                continue
            count = min(left, max(block, fitting))
            waves[-1].append(Piece(slice(start, start + count), draw.slots))
            start += count
            room -= count * each
    return [Wave(tuple(pieces)) for pieces in waves if pieces]


def lay_waves(draws: tuple[Draw, ...], budget: int, in_flight: int, block: int = BLOCK_ROWS) -> list[Wave]:
    """Waves of a micro-step's rows; where there are several, as many as are in flight share the budget."""
    waves = cut_waves(draws, budget, block)
    return waves if len(waves) < 2 else cut_waves(draws, budget // in_flight, block)


class _Tables(NamedTuple):
    rows: Tensor
    classes: Tensor


@dataclass(frozen=True)
class _Swept:
    """A wave whose row sums are on their way over the ranks."""

    rows: slice
    """Among the head's rows."""
    tables: _Tables
    exponentials: Tensor
    scores: Tensor
    """Positives' scores, [R, T]."""
    sums: Tensor
    best: Tensor
    shift: Tensor | None
    works: tuple[dist.Work | None, ...]


@dataclass(frozen=True)
class _Pulled:
    """Where gradients go."""

    rows: Tensor
    """Of all rows of the micro-step, in parts to be added up, [parts, all rows, E]."""
    centers: Tensor
    """Of the unit centers: of all draws' one after the other, [S, E], or of all of this rank's, [K, E]."""
    add: bool
    """Whether the centers' are added to what is there."""


class GroupedDraws:
    """A head's draws, all together."""

    def __init__(self, work: HeadWork) -> None:
        """Fetch the centers of all draws and tell the device what its programs have to do."""
        from megaregion.heads import kernels

        self._kernels, self._work, self._config = kernels, work, work.config
        self._device, self._dim = work.weight.device, work.weight.shape[1]
        self._unit = work.config.scale * LOG2E
        draws, classes = work.targets.draws, work.targets.classes
        self._tile = kernels.tiling(work.operand.itemsize == 2)
        self._tiling: dict[str, Any] = {
            "DIM": self._dim, "DEPTH": self._tile.depth, "PRECISION": self._tile.precision,
            "num_warps": kernels.WARPS, "num_stages": kernels.STAGES,
        }  # fmt: skip
        budget = work.chunk_bytes // work.operand.itemsize
        self._waves = lay_waves(draws, budget, work.in_flight, kernels.ROWS)
        self._tables, self._begins = self._send_tables()
        self._slots = draws[-1].slots.stop if draws else 0
        self._centers = torch.empty((self._slots, self._dim), dtype=work.operand, device=self._device)
        launch(
            kernels.unit_centers, (-(-self._slots // kernels.LINES),),
            self._centers, work.weight, work.weight if classes is None else classes, self._slots,
            HAS_CLASSES=classes is not None, DIM=self._dim, LINES=kernels.LINES, PORTION=kernels.PORTION,
        )  # fmt: skip

    def _send_tables(self) -> tuple[list[_Tables], Tensor]:
        """Each wave's tables, and where the draws' slots begin, in one copy."""
        begins = np.array([0, *(draw.slots.stop for draw in self._work.targets.draws)], np.int64)
        cut = [wave.tables(self._kernels.ROWS, self._kernels.CLASSES) for wave in self._waves]
        parts = [begins, *(table for pair in cut for table in pair)]
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
        sent = send(flat, self._device).split([part.size for part in parts])
        tables = [part.view(-1, 6) for part in sent[1:]]
        return [_Tables(*pair) for pair in zip(tables[::2], tables[1::2], strict=True)], sent[0]

    def score(self, features: Tensor, gradient: ClassGradient | None) -> RowSums:
        """Score unit rows of the micro-step, [all rows, E]; gradients are made where one is given."""
        work = self._work
        rows = features.to(work.operand)
        pulled = None if gradient is None else self._room(len(rows), gradient)
        seen = torch.empty((3, len(work.targets.index)), device=self._device)
        waiting: list[_Swept] = []
        for wave, tables in zip(self._waves, self._tables, strict=True):
            waiting.append(self._sweep(wave, tables, rows))
            if len(waiting) == work.in_flight:
                self._finish(waiting.pop(0), rows, seen, pulled)
        for swept in waiting:
            self._finish(swept, rows, seen, pulled)
        sums = seen.sum(1)
        if gradient is None or pulled is None:
            return RowSums(sums[0], sums[1:], None)
        self._give(gradient, pulled)
        parts = pulled.rows
        return RowSums(sums[0], sums[1:], parts[0] if len(parts) == 1 else parts.sum(0))

    def _room(self, rows: int, gradient: ClassGradient) -> _Pulled:
        programs = sum(len(table.rows) for table in self._tables[:1]) * -(-self._dim // self._kernels.WIDTH)
        deep = -(-max((draw.size for draw in self._work.targets.draws), default=1) // self._kernels.ROWS)
        parts = max(1, min(PROGRAMS // max(1, programs), deep))
        pulled = torch.zeros((parts, rows, self._dim), device=self._device)
        several = len(self._waves) > 1
        if self._work.targets.classes is not None or not self._waves:
            make = torch.zeros if several else torch.empty
            return _Pulled(pulled, make((self._slots, self._dim), device=self._device), add=several)
        whole, marks, fresh = gradient.whole()
        if fresh:
            marks.fill_(True)
            if several:
                whole.zero_()
        return _Pulled(pulled, whole, add=several or not fresh)

    def _give(self, gradient: ClassGradient, pulled: _Pulled) -> None:
        """Hand over the gradients of drawn classes, a class's of several draws added up."""
        classes, kernels = self._work.targets.classes, self._kernels
        if classes is None or not self._waves:
            return
        if gradient.is_empty and len(self._begins) == 2:
            gradient.accumulate(classes, pulled.centers)
            return
        whole, marks, fresh = gradient.whole()
        longest = max(draw.size for draw in self._work.targets.draws)
        launch(
            kernels.collect, (-(-len(whole) // kernels.LINES), -(-self._dim // kernels.PORTION)),
            whole, marks, pulled.centers, classes, self._begins, len(self._begins) - 1, len(whole),
            FRESH=fresh, DIM=self._dim, LINES=kernels.LINES, PORTION=kernels.PORTION,
            STEPS=longest.bit_length(),
        )  # fmt: skip

    def _sweep(self, wave: Wave, tables: _Tables, features: Tensor) -> _Swept:
        """Exponentials of a wave, and its rows' sums over this rank's classes; those of all are under way."""
        work, count = self._work, wave.rows.stop - wave.rows.start
        labels = work.targets.labels.shape[1]
        exponentials = torch.empty(wave.elements, dtype=work.operand, device=self._device)
        travelling = torch.empty(count * (labels + 1), device=self._device)
        scores, sums = travelling[: count * labels].view(count, labels), travelling[count * labels :]
        shift = None
        swept = _Swept(wave.rows, tables, exponentials, scores, sums, torch.empty_like(sums), None, ())
        if self._config.scale > BOUNDED_SCALE:
            self._score(swept, features, keep=False)
            shift = swept.best.clone()
            work.reduce(shift, dist.ReduceOp.MAX)
            # As streaming's _row_maxima, in units of log 2.
            shift.clamp_min_(0.0 if self._config.loss == "separated" else -self._unit)
            swept = replace(swept, shift=shift)
        self._score(swept, features, keep=True)
        works = work.reduce(travelling, wait=False), work.reduce(swept.best, dist.ReduceOp.MAX, wait=False)
        return replace(swept, works=works)

    def _score(self, swept: _Swept, features: Tensor, keep: bool) -> None:
        """Fill a wave's scores, sums, maxima and exponentials; or, without ``keep``, its maxima alone."""
        kernels, targets = self._kernels, self._work.targets
        blocks, count = len(swept.tables.rows), len(swept.sums)
        widest = max(draw.size for draw in targets.draws)
        spans = max(1, min(PROGRAMS // blocks, -(-widest // self._tile.scored)))
        sums, best = swept.sums, swept.best
        if spans > 1:
            sums, best = torch.empty((2, spans, count), device=self._device)
        launch(
            kernels.score, (blocks, spans),
            swept.exponentials, swept.scores, sums, best, features, self._centers, targets.index[swept.rows],
            targets.columns[swept.rows], targets.spared[swept.rows],
            swept.sums if swept.shift is None else swept.shift,
            swept.tables.rows, count, targets.spared.shape[1], self._unit,
            KEEP=keep, HAS_SHIFT=swept.shift is not None, HAS_NEAR=targets.spared.shape[1] > 0,
            LABELS=targets.labels.shape[1],
            ROWS=kernels.ROWS, CLASSES=self._tile.scored, **self._tiling,
        )  # fmt: skip
        if spans > 1:
            torch.amax(best, 0, out=swept.best)
            if keep:
                torch.sum(sums, 0, out=swept.sums)

    def _finish(self, swept: _Swept, features: Tensor, seen: Tensor, pulled: _Pulled | None) -> None:
        """Losses of a swept wave, and the gradients from its exponentials."""
        for travelling in swept.works:
            if travelling is not None:
                travelling.wait()
        kernels, table, scale = self._kernels, swept.tables, self._config.scale
        factor = torch.empty_like(swept.sums)
        weighed = torch.empty(
            (len(factor) if pulled is not None else 0, self._dim), dtype=features.dtype, device=self._device
        )
        self._weigh(swept, features, seen[:, swept.rows], weighed, factor, learns=pulled is not None)
        if pulled is None:
            return
        across, parts = -(-self._dim // kernels.WIDTH), pulled.rows
        launch(
            kernels.pull_rows, (len(table.rows) * across, len(parts)),
            swept.exponentials, parts, self._centers, factor, self._work.targets.index[swept.rows],
            table.rows, parts.shape[1], scale, ROWS=kernels.ROWS, WIDTH=kernels.WIDTH, **self._tiling,
        )  # fmt: skip
        launch(
            kernels.pull_centers, (len(table.classes) * across,),
            swept.exponentials, pulled.centers, weighed, table.classes, scale,
            ADD=pulled.add, CLASSES=kernels.CLASSES, WIDTH=kernels.WIDTH, **self._tiling,
        )  # fmt: skip

    def _weigh(
        self, swept: _Swept, features: Tensor, seen: Tensor, weighed: Tensor, factor: Tensor, learns: bool
    ) -> None:
        """Losses, cosines and wins of a wave's rows; for gradients their factors and what positives weigh."""
        kernels, config, targets = self._kernels, self._config, self._work.targets
        labels = targets.labels.shape[1]
        lines = kernels.LINES
        launch(
            kernels.weigh, (len(swept.tables.rows), -(-kernels.ROWS // lines)),
            swept.exponentials, weighed, factor, seen, swept.scores, swept.sums, swept.best, features,
            targets.index[swept.rows], targets.labels[swept.rows], targets.columns[swept.rows],
            swept.sums if swept.shift is None else swept.shift, swept.tables.rows,
            seen.stride(0), self._unit, config.scale,
            config.margin, math.cos(config.margin), math.sin(config.margin),
            LOSS=config.loss, MARGIN=config.margin_kind, HAS_SHIFT=swept.shift is not None, LEARNS=learns,
            DIM=self._dim, LABELS=labels, SLOTS=1 << (labels - 1).bit_length(),
            LINES=lines, PORTION=self._tile.portion,
        )  # fmt: skip


Draws = Callable[[HeadWork], StreamedDraws | GroupedDraws]


def choose_draws(kind: str, config: RunConfig, topology: Topology) -> Draws:
    """How a head's draws are scored; auto tries both ways on this device and takes the faster right one.

    A collective on GPUs, since all ranks must take the same.

    Raises:
        UserError: Triton was asked for and is not installed, or the device is no GPU.
    """
    backend, device = config.head.backend, topology.device
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return StreamedDraws
    if device.type != "cuda":
        raise UserError(
            f"head.backend triton needs a GPU, and this rank computes on a {device.type}; use torch"
        )
    if find_spec("triton") is None:
        if backend == "auto":
            return StreamedDraws
        raise UserError("head.backend triton needs the triton package, which is not installed; use torch")
    return GroupedDraws if backend == "triton" else try_draws(kind, config, topology)


TRIED = 4096, 2048, 4
"""Rows, classes and positives of a text of the trial."""
PARITY = 0.02
"""Share of its greatest element by which a gradient may differ from torch's in the same operands."""
REPEATS = 5


def try_draws(kind: str, config: RunConfig, topology: Topology) -> Draws:
    """Score random rows in both ways and compare losses, gradients and times on all ranks; log the choice."""
    reference = _trial(kind, config, topology.device, StreamedDraws)
    torch_seconds = reference.pop()
    problem, seconds = "", math.inf
    try:
        found = _trial(kind, config, topology.device, GroupedDraws)
        seconds = float(found.pop())
        names = "loss", "gradient of the rows", "gradient of the centers"
        for name, one, other in zip(names, found, reference, strict=True):
            off = float((one - other).abs().max() / other.abs().max())
            if not off <= PARITY:
                problem = f"its {name} is off by {off:.2g}"
    except Exception as error:  # Whatever a compiler or a driver makes of it: there is another way.
        problem = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )
    if problem:
        LOG.warning("head %s: the triton kernels are left aside on this device: %s", kind, problem)
    slowest = torch.tensor([math.inf if problem else seconds, float(torch_seconds)], device=topology.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=topology.world_group)
    grouped, streamed = slowest.tolist()
    chosen: Draws = GroupedDraws if grouped < streamed else StreamedDraws
    if topology.rank == 0:
        LOG.info(
            "head %s: %d rows by %d classes take %s ms with triton, %.2f ms with torch; takes %s",
            kind, *TRIED[:2],
            f"{1e3 * grouped:.2f}" if math.isfinite(grouped) else "no", 1e3 * streamed,
            "triton" if chosen is GroupedDraws else "torch",
        )  # fmt: skip
    return chosen


def _trial(kind: str, config: RunConfig, device: torch.device, draws: Draws) -> list[Tensor]:
    """Loss, gradients of rows and of centers, and seconds, the least of some."""
    rows, classes, slots = TRIED
    rng = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn((rows, config.head.embedding_dim), generator=rng))
    operand = torch.bfloat16 if config.train.bf16 and device.type == "cuda" else torch.float32
    features = features.to(device, operand)
    weight = torch.randn((classes, config.head.embedding_dim), generator=rng).to(device)
    labels = torch.randint(classes, (rows, slots if kind == "text" else 1), generator=rng)
    neighbours = NearClasses(torch.arange(classes + 1), torch.arange(classes).roll(1))
    near = neighbours if config.head.by_kind[kind].near_classes else None
    rule = DrawRule(kind, classes, range(classes), 1, 0, 0.5, 0, near)
    everyone = torch.ones(rows, dtype=torch.bool)
    targets = build_targets(labels, everyone, rule, 0, 0, rows // 2).to(device)
    gradient, seconds = ClassGradient(weight), []
    for _ in range(1 + REPEATS):
        gradient.clear()
        settings, room = config.head.by_kind[kind], config.head.chunk_bytes
        work = HeadWork(settings, None, room, operand, Scratch(weight), targets, weight)
        begin = _now(device)
        found = draws(work).score(features, gradient)
        seconds.append(_now(device) - begin)
    gradient.finish()
    centers = torch.zeros_like(weight)
    centers[slice(None) if gradient.rows is None else gradient.rows] = gradient.values
    assert found.grad_features is not None
    numbers = found.loss, found.grad_features, centers, torch.tensor(min(seconds[1:]))
    return [number.double() for number in numbers]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
