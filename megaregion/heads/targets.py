"""Targets of one micro-step: which rows a head scores, their positives, and the classes of each draw.

Everything here follows from labels and numbers alone, not from features, and it is the only place where sizes
that depend on data must be known to the host. So it is made on the host while a GPU runs the encoder.

Shapes: r rows on this rank, R rows of the head over all data ranks, T labels of a row (padded with -1),
C classes of a draw on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaregion.errors import UserError
from megaregion.heads.sampling import draw_key, drawn_classes


@dataclass(frozen=True)
class DrawRule:
    """What decides a head's draws besides step and rows."""

    name: str
    """Name of the head."""
    classes: int
    """Number of classes over all ranks."""
    local: range
    """This rank's classes."""
    ranks: int
    """Ranks that share the classes."""
    seed: int
    """Seed of the run."""
    rate: float
    """Share of classes drawn."""
    min_negatives: int
    """Random negatives that are always drawn."""


@dataclass(frozen=True)
class Draw:
    """One group of rows and the classes on this rank that it is scored against."""

    rows: slice
    """The group's rows among the head's rows."""
    index: Tensor
    """The group's rows in the micro-step's global order, int64 [rows]."""
    valid: Tensor
    """Which positives the rows have, on any rank, bool [rows, T]."""
    classes: Tensor | None
    """Rising class numbers within this rank's range, int64 [C]; None for the whole range."""
    columns: Tensor
    """Where each positive stands among those classes, -1 if not on this rank, int64 [rows, T]."""
    size: int
    """C."""
    typical_size: int
    """About C, and the same number on every rank."""
    positives: Tensor
    """Distinct positives of the rows on this rank, counted from its first class, int64."""

    def to(self, device: torch.device) -> Draw:
        """The draw on a device, without waiting for it."""
        return replace(
            self,
            index=send(self.index, device),
            valid=send(self.valid, device),
            classes=None if self.classes is None else send(self.classes, device),
            columns=send(self.columns, device),
            positives=send(self.positives, device),
        )


@dataclass(frozen=True)
class Targets:
    """What a head scores in one micro-step."""

    index: Tensor
    """The head's rows in the micro-step's global order, int64 [R]."""
    labels: Tensor
    """Distinct positives of these rows, -1 padded, int64 [R, T]."""
    draws: tuple[Draw, ...]
    """Groups of rows with their classes; together they are all rows."""
    step: int
    """Optimizer step."""

    def to(self, device: torch.device) -> Targets:
        """The targets on a device, without waiting for it."""
        draws = tuple(draw.to(device) for draw in self.draws)
        return replace(self, index=send(self.index, device), labels=send(self.labels, device), draws=draws)


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
    check_labels(chosen, index, rule.name, rule.classes)
    chosen = distinct(chosen)
    group_of_row = (index + first_row) // (draw_rows or max(1, len(rows)))
    groups, counts = group_of_row.unique_consecutive(return_counts=True)
    draws, start = [], 0
    for group, count in zip(groups.tolist(), counts.tolist(), strict=True):
        part = slice(start, start + count)
        draws.append(_draw(part, index[part], chosen[part], rule, step, group))
        start += count
    return Targets(index, chosen, tuple(draws), step)


def check_labels(labels: Tensor, index: Tensor, name: str, classes: int) -> None:
    """Refuse labels that cannot be positives.

    Args:
        labels: Labels of the head's rows, [R, T].
        index: The rows' numbers, for the message, [R].
        name: Name of the head.
        classes: Number of classes.

    Raises:
        UserError: A label is below -1 or not below ``classes``, or a row has no label.
    """
    outside = ((labels < -1) | (labels >= classes)).any(1)
    empty = (labels < 0).all(1)
    if not bool((outside | empty).any()):
        return
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        found = labels[row][(labels[row] < -1) | (labels[row] >= classes)]
        raise UserError(
            f"label {int(found[0])} of row {int(index[row])} lies outside the {classes} classes of head "
            f"{name}; the dataset's label space and the head's must be the same"
        )
    row = int(empty.nonzero()[0])
    raise UserError(f"row {int(index[row])} belongs to head {name} but has no label; drop it or label it")


def distinct(labels: Tensor) -> Tensor:
    """Replace repeated labels of a row by -1, since positives are a set, [R, T]; the order may change."""
    if labels.shape[1] < 2:
        return labels
    ordered = labels.sort(dim=1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    ordered[:, 1:].masked_fill_(repeated, -1)
    return ordered


def _draw(rows: slice, index: Tensor, labels: Tensor, rule: DrawRule, step: int, group: int) -> Draw:
    key, local = draw_key(rule.seed, rule.name, step, group), rule.local
    found = drawn_classes(key, rule.classes, local, labels, rule.rate, rule.min_negatives)
    here = (labels >= local.start) & (labels < local.stop)
    columns = labels - local.start
    share = -(-rule.classes // rule.ranks)
    if found is not None:
        place = torch.empty(len(local), dtype=torch.int64, device=labels.device)
        place[found] = torch.arange(len(found), device=labels.device)
        columns = place[columns.masked_fill(~here, 0)] if len(local) else columns
        share = min(share, int(share * rule.rate) + labels.numel() // rule.ranks)
    columns = columns.masked_fill(~here, -1)
    return Draw(
        rows=rows,
        index=index,
        valid=labels >= 0,
        classes=found,
        columns=columns,
        size=len(local) if found is None else len(found),
        typical_size=share,
        positives=(labels[here] - local.start).unique(),
    )
