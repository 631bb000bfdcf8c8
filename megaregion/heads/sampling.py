"""What a head scores in a micro-step: its rows, their positives, and the drawn classes of each group of rows.

A *draw* is the set of classes that one group of rows is scored against: the positives of the group's rows,
always, and each other class if its hash lies under a threshold. The hash is a function of (seed, step, group,
head, class), never of ranks: a rank finds its part of the draw alone and any sharding finds the same.

The floor: at least ``min_negatives`` classes that are no row's positive are drawn (all of them, if there are
fewer). When the rate alone gives that many with probability 1 - 1e-15, nothing more is done; when it may not,
the threshold is raised to the hash of rank ``min_negatives`` among all K classes that are not positive, which
every rank computes for itself.

All of it follows from labels, not from features, and it is the only place where sizes that depend on data
must be known to the host. So it is made on the host while a GPU runs the encoder.

Shapes: K classes in all, C classes of a draw on this rank, r rows on this rank, R rows of the head over all
data ranks, T labels of a row (padded with -1).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megaregion.errors import UserError
from megaregion.parallel.topology import GatheringRows, Topology

LOG = logging.getLogger(__name__)
LEAST_SAVING = 0.1
"""Share of classes, and so of head time, that sampling must save to be worth its noise."""
HASH_SPAN = 2**32
"""Hashes are the integers [0, HASH_SPAN), held in int64."""


def draw_key(seed: int, name: str, step: int, group: int) -> int:
    """The 64-bit key of one draw: of a run's seed, a head's name, an optimizer step and a group within it."""
    text = f"{seed}/{name}/{step}/{group}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def class_hashes(key: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Hashes of the classes [start, stop) under a key, int64 in [0, HASH_SPAN), [stop - start].

    Two rounds of a 32-bit finaliser (Wellons' lowbias32), each keyed by one half of the key.
    """
    word = torch.arange(start, stop, dtype=torch.int64, device=device)
    for half in (key & 0xFFFFFFFF, key >> 32):
        word.bitwise_xor_(half)
        word.bitwise_xor_(word >> 16).mul_(0x7FEB352D).bitwise_and_(0xFFFFFFFF)
        word.bitwise_xor_(word >> 15).mul_(0x846CA68B).bitwise_and_(0xFFFFFFFF)
        word.bitwise_xor_(word >> 16)
    return word


def drawn_classes(
    key: int, classes: int, local: range, labels: Tensor, rate: float, min_negatives: int
) -> Tensor | None:
    """The part of a draw that lies in a rank's class range: rising class numbers, int64 [C], or None for all.

    Args:
        key: Key of the draw.
        classes: K.
        local: The rank's class range.
        labels: Positives of all rows of the group, -1 where there is none, int64 [R, T].
        rate: Share of the classes that is drawn.
        min_negatives: The floor.
    """
    if rate >= 1.0 or classes <= min_negatives:
        return None
    device = labels.device
    positives = labels[labels >= 0]
    threshold = math.ceil(rate * HASH_SPAN)
    # Counted, since most slots of a text row may be padding.
    if _rate_reaches_floor(classes - min(classes, len(positives)), rate, min_negatives):
        drawn = class_hashes(key, local.start, local.stop, device) < threshold
        is_positive = torch.zeros(len(local), dtype=torch.bool, device=device)
        inside = (positives >= local.start) & (positives < local.stop)
        is_positive[positives[inside] - local.start] = True
    else:
        hashes = class_hashes(key, 0, classes, device)
        everywhere = torch.zeros(classes, dtype=torch.bool, device=device)
        everywhere[positives] = True
        rivals = hashes.masked_fill(everywhere, HASH_SPAN)
        floor = rivals.kthvalue(min_negatives).values if min_negatives else rivals.new_tensor(-1)
        drawn = ((rivals <= floor) | (hashes < threshold))[local.start : local.stop]
        is_positive = everywhere[local.start : local.stop]
    return (drawn | is_positive).nonzero().squeeze(1)


def _rate_reaches_floor(rivals: int, rate: float, min_negatives: int) -> bool:
    """Whether a binomial draw from this many classes reaches the floor but for a chance of 1e-15."""
    mean = rivals * rate
    # Chernoff: P(X <= mean - t) <= exp(-t * t / (2 * mean)).
    return mean - math.sqrt(2 * mean * 35.0) >= min_negatives


@dataclass(frozen=True)
class NearClasses:
    """Of every class those on this rank that are much like it, and so no negatives of its regions."""

    starts: Tensor
    """Where each class's list begins, int64 [K + 1]."""
    classes: Tensor
    """The lists, one after the other, int64."""

    def of_rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Classes near any label of rows [r, T] (-1: none), row by row: whose each is, and which, [n]."""
        known = labels.clamp_min(0).flatten()
        begins, absent = self.starts[known], (labels < 0).flatten()
        counts = (self.starts[known + 1] - begins).masked_fill(absent, 0)
        lists = torch.arange(len(counts)).repeat_interleave(counts)
        shift = begins - counts.cumsum(0) + counts
        return lists // max(1, labels.shape[1]), self.classes[shift[lists] + torch.arange(len(lists))]


@dataclass(frozen=True)
class DrawRule:
    """What decides a head's draws besides step and rows."""

    name: str
    classes: int
    """K."""
    local: range
    """This rank's classes."""
    ranks: int
    """Ranks that share the classes."""
    seed: int
    rate: float
    """Share of classes drawn."""
    min_negatives: int
    """Random negatives that are always drawn."""
    near: NearClasses | None = None
    """Classes that are no negatives of a row though they are no positives of it either."""

    @property
    def draws_all(self) -> bool:
        """Whether every draw has all classes."""
        return self.rate >= 1.0 or self.classes <= self.min_negatives


@dataclass(frozen=True)
class Draw:
    """One group of rows and the classes on this rank that it is scored against."""

    rows: slice
    """The group's rows among the head's rows."""
    slots: slice
    """Its classes among those of all draws."""
    typical_size: int
    """About C, and the same number on every rank."""

    @property
    def size(self) -> int:
        """C."""
        return int(self.slots.stop - self.slots.start)


@dataclass(frozen=True)
class Targets:
    """What a head scores in one micro-step."""

    index: Tensor
    """The head's rows in the micro-step's global order, int64 [R]."""
    labels: Tensor
    """Distinct positives of these rows, -1 padded, int64 [R, T]."""
    columns: Tensor
    """Where each positive stands among its draw's classes, -1 if not on this rank, int64 [R, T]."""
    spared: Tensor
    """Where what is drawn of the classes near a row's positives stands, -1 padded, int64 [R, S]."""
    classes: Tensor | None
    """The draws' classes one after the other, each draw's rising numbers within this rank's range, int64;
    None if every draw, and so the only one, has the whole range."""
    positives: Tensor
    """Classes that are a positive of a draw, counted from this rank's first class, int64."""
    count: Tensor
    """R, 0-d int64."""
    shares: Tensor
    """Drawn classes, and those of them that are positives, on this rank as shares of all classes of all
    draws; one over the number of positives, and one over R; float64 [4]."""
    draws: tuple[Draw, ...]
    """Groups of rows with their classes; together they are all rows."""
    step: int
    """Optimizer step."""

    def classes_of(self, draw: Draw) -> Tensor | None:
        """A draw's classes, [C]; None for the whole range."""
        return None if self.classes is None else self.classes[draw.slots]

    def to(self, device: torch.device) -> Targets:
        """The targets on a device, in one copy and without waiting for it."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if device == self.index.device:
            return self
        sent = send(torch.cat([tensor.reshape(-1).view(torch.int64) for tensor in tensors.values()]), device)
        parts = sent.split([tensor.numel() for tensor in tensors.values()])
        moved: dict[str, Any] = {
            name: part.view(tensor.dtype).view(tensor.shape)
            for (name, tensor), part in zip(tensors.items(), parts, strict=True)
        }
        return replace(self, **moved)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; a GPU that is busy is not waited for."""
    if tensor.device == device or device.type == "cpu":
        return tensor.to(device)
    # From memory that is not page-locked the copy would wait for all that is queued.
    return tensor.pin_memory().to(device, non_blocking=True)


def build_targets(
    labels: Tensor, rows: Tensor, rule: DrawRule, step: int, first_row: int, draw_rows: int
) -> Targets:
    """Choose the head's rows, check their labels and draw their classes.

    Args:
        labels: Labels of the micro-step's rows over all data ranks, -1 padded, int64 [all rows, T].
        rows: Which of them belong to this head, bool [all rows].
        rule: What decides the head's draws.
        step: Optimizer step.
        first_row: Place of the micro-step's first row within the step.
        draw_rows: Rows of the global order that share one draw; 0 for all of the micro-step.

    Raises:
        UserError: A label lies outside the label space, or a row of this head has none.
    """
    index = rows.nonzero().squeeze(1)
    chosen = labels[index]
    _check_labels(chosen, index, rule.name, rule.classes)
    chosen = _distinct(chosen)
    whose, near = (index[:0], index[:0]) if rule.near is None else rule.near.of_rows(chosen)
    draws, slots, found = [], 0, []
    for group, part in _groups(index + first_row, rule, draw_rows or max(1, len(rows))):
        some = slice(*torch.searchsorted(whose, torch.tensor([part.start, part.stop])).tolist())
        classes, columns, spared, positives = _draw(chosen[part], near[some], rule, step, group)
        size = len(rule.local) if classes is None else len(classes)
        share = -(-rule.classes // rule.ranks)
        if classes is not None:
            missed = math.exp(-int((chosen[part] >= 0).sum()) / rule.classes)
            share = math.ceil(share * (1 - (1 - rule.rate) * missed))
        draws.append(Draw(part, slice(slots, slots + size), share))
        slots += size
        found.append((classes, columns, spared, positives))
    none = index[:0]
    columns = torch.cat([chosen[:0], *(columns for _, columns, _, _ in found)])
    spared = torch.cat([none, *(columns for _, _, columns, _ in found)])
    positives = torch.cat([none, *(each for *_, each in found)])
    whole = max(1, rule.classes * len(draws))
    shares = (
        max(slots / whole, 1e-30),  # a divisor
        len(positives) / whole,
        1 / max(1, int((chosen >= 0).sum())),
        1 / max(1, len(index)),
    )
    return Targets(
        index=index,
        labels=chosen,
        columns=columns,
        spared=_padded(whose[spared >= 0], spared[spared >= 0], len(chosen)),
        classes=None
        if rule.draws_all
        else torch.cat([none, *(each for each, *_ in found if each is not None)]),
        positives=positives,
        count=torch.tensor(len(index), device=labels.device),
        shares=torch.tensor(shares, dtype=torch.float64, device=labels.device),
        draws=tuple(draws),
        step=step,
    )


def _groups(places: Tensor, rule: DrawRule, draw_rows: int) -> Iterator[tuple[int, slice]]:
    """Number and rows of each draw, for rows at these places in the step; one where all classes are drawn."""
    groups = torch.zeros_like(places) if rule.draws_all else places // draw_rows
    numbers, counts = groups.unique_consecutive(return_counts=True)
    start = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        yield number, slice(start, start + count)
        start += count


def _check_labels(labels: Tensor, index: Tensor, name: str, classes: int) -> None:
    """Refuse labels [R, T] of the rows ``index`` [R] that cannot be positives."""
    outside, empty = (labels < -1) | (labels >= classes), (labels < 0).all(1)
    if bool(outside.any()):
        row, slot = outside.nonzero()[0].tolist()
        raise UserError(
            f"label {int(labels[row, slot])} of row {int(index[row])} lies outside the {classes} classes of "
            f"head {name}; the dataset's label space and the head's must be the same"
        )
    if bool(empty.any()):
        row = int(index[empty][0])
        raise UserError(f"row {row} belongs to head {name} but has no label; drop it or label it")


def _distinct(labels: Tensor) -> Tensor:
    """Replace repeated labels of a row by -1, since positives are a set, [R, T]; the order may change."""
    if labels.shape[1] < 2:
        return labels
    ordered = labels.sort(dim=1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    ordered[:, 1:].masked_fill_(repeated, -1)
    return ordered


def _draw(
    labels: Tensor, near: Tensor, rule: DrawRule, step: int, group: int
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Classes of a draw, columns of labels and of near classes, and positives: as :class:`Targets`."""
    key, local = draw_key(rule.seed, rule.name, step, group), rule.local
    found = drawn_classes(key, rule.classes, local, labels, rule.rate, rule.min_negatives)
    here = (labels >= local.start) & (labels < local.stop)
    columns, spared = (labels - local.start).masked_fill(~here, 0), near - local.start
    if found is not None and len(local):
        place = torch.full((len(local),), -1, dtype=torch.int64, device=labels.device)
        place[found] = torch.arange(len(found), device=labels.device)
        columns, spared = place[columns], place[spared]
    return found, columns.masked_fill(~here, -1), spared, (labels[here] - local.start).unique()


def _padded(whose: Tensor, values: Tensor, rows: int) -> Tensor:
    """Values [n] as a line for each row, by whose they are, which rises; -1 padded, [rows, most]."""
    counts = whose.bincount(minlength=rows)
    table = values.new_full((rows, int(counts.max()) if rows else 0), -1)
    table[whose, torch.arange(len(whose)) - (counts.cumsum(0) - counts)[whose]] = values
    return table


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


class GatheringLabels:
    """Labels of a micro-step's rows on their way from all data ranks to this host, which draws from them.

    What a GPU does for them is queued when they are sent, ahead of the encoder's pass: the host then waits
    while the GPU is busy with the pass. They come back by a stream of their own, since the pass need not
    wait for the other ranks.
    """

    def __init__(self, labels: Tensor, topology: Topology, stream: torch.cuda.Stream | None) -> None:
        """Send this rank's labels [r, T], on the host; ``stream`` brings them back, None on a processor."""
        own = send(labels, topology.device)
        self._rows = GatheringRows(own, topology.data_group, topology.node_groups)
        self._stream = stream
        if stream is not None:
            with torch.cuda.stream(stream):
                # Held here, since the copy reads it later.
                self._arrived = self._rows.arrive()
                self._host = labels.new_empty(self._arrived.shape, pin_memory=True)
                self._host.copy_(self._arrived, non_blocking=True)

    def arrive(self) -> Tensor:
        """Wait for the labels of all data ranks, [R, T], on the host. Call it once."""
        if self._stream is None:
            return self._rows.arrive()
        self._stream.synchronize()
        return self._host
