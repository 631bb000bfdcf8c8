"""The head's Triton kernels: one launch for all draws of a micro-step; ``grouped.py`` says how they follow.

A program takes ROWS rows of one draw (or CLASSES of its classes); a line of a table says which.
What several programs add up lies apart and is summed in a fixed order afterwards: no atomics.

Shapes: M rows of the micro-step, R rows of a wave, S drawn classes of all draws one after the other, K local
classes, E width, T positives of a row. Exponentials p lie row by row, draw behind draw.
"""

# ruff: noqa: N803

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from megaregion.heads.tiles import BLOCK_ROWS

ROWS, CLASSES, WIDTH, DEPTH = BLOCK_ROWS, 128, 128, 64
"""Rows, classes or columns of a gradient of a program, and depth of a product."""
LINES, PORTION = 16, 128
"""Rows or classes of a program without products, and columns that it holds at a time."""
WARPS, STAGES = 8, 3


class Tiling(NamedTuple):
    """What a program holds at a time."""

    scored: int
    """Classes, a multiple of ``grouped.ALIGNED``: every element up to a row's end is written."""
    depth: int
    """Of a product."""
    portion: int
    """Columns of weighed rows."""
    precision: str
    """Of a product."""


def tiling(narrow: bool) -> Tiling:
    """For narrow or wide operands: these go in full precision, and fewer fit a program's registers."""
    if narrow:
        return Tiling(CLASSES, DEPTH, PORTION, "tf32")
    return Tiling(CLASSES // 2, DEPTH // 4, PORTION // 2, "ieee")


@triton.jit  # type: ignore[untyped-decorator]
def unit_centers(  # type: ignore[no-untyped-def]
    made, weight, classes, slots,
    HAS_CLASSES: tl.constexpr, DIM: tl.constexpr, LINES: tl.constexpr, PORTION: tl.constexpr,
):  # fmt: skip
    """Centers of the drawn classes, [S, E], made unit ones; shorter than 1e-8 they stay as they are."""
    slot = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    there = slot < slots
    place = tl.load(classes + slot, mask=there, other=0) if HAS_CLASSES else slot
    squares = tl.zeros([LINES, PORTION], tl.float32)
    for start in range(0, DIM, PORTION):
        depth = start + tl.arange(0, PORTION)
        mask = there[:, None] & (depth < DIM)[None, :]
        value = tl.load(weight + place[:, None] * DIM + depth[None, :], mask=mask, other=0.0)
        squares += value * value
    length = tl.sqrt(tl.sum(squares, 1))
    inverse = tl.where(length > 1e-8, 1.0 / length, 1.0)
    for start in range(0, DIM, PORTION):
        depth = start + tl.arange(0, PORTION)
        mask = there[:, None] & (depth < DIM)[None, :]
        value = tl.load(weight + place[:, None] * DIM + depth[None, :], mask=mask, other=0.0)
        value = (value * inverse[:, None]).to(made.dtype.element_ty)
        tl.store(made + slot[:, None] * DIM + depth[None, :], value, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _line(table, number):  # type: ignore[no-untyped-def]
    """Rows (or classes) of a block: the first, how many; classes (or rows) of its draw: the first, how many.

    Then where the block's exponentials begin, and the stride from row to row.
    """
    entry = table + number * 6
    first, count = tl.load(entry), tl.load(entry + 1).to(tl.int32)
    other, others = tl.load(entry + 2), tl.load(entry + 3).to(tl.int32)
    base = tl.multiple_of(tl.load(entry + 4), 16)
    stride = tl.multiple_of(tl.load(entry + 5).to(tl.int32), 16)
    return first, count, other, others, base, stride


@triton.jit  # type: ignore[untyped-decorator]
def _products(  # type: ignore[no-untyped-def]
    features, there, centers, known,
    DIM: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    product = tl.zeros([ROWS, CLASSES], tl.float32)
    for start in range(0, DIM, DEPTH):
        depth = (start + tl.arange(0, DEPTH))[None, :]
        left = tl.load(features[:, None] + depth, mask=there[:, None] & (depth < DIM), other=0.0)
        right = tl.load(centers[:, None] + depth, mask=known[:, None] & (depth < DIM), other=0.0)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    return product


@triton.jit  # type: ignore[untyped-decorator]
def score(  # type: ignore[no-untyped-def]
    p, scores, sums, best, features, centers, index, columns, spared, shift, table, rows, near, unit,
    KEEP: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_NEAR: tl.constexpr, LABELS: tl.constexpr,
    DIM: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Exponentials of all negatives' scores, row sums and maxima of each span, and positives' scores."""
    first, count, slot, classes, base, stride = _line(table, tl.program_id(0))
    line = tl.arange(0, ROWS)
    row, there = first + line, line < count
    place = tl.load(index + row, mask=there, other=0)
    offset = tl.zeros([ROWS], tl.float32)
    if HAS_SHIFT:
        offset = tl.load(shift + row, mask=there, other=0.0)
    total, top = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    if KEEP and tl.program_id(1) == 0:
        for label in range(LABELS):
            own = tl.load(columns + row * LABELS + label, mask=there, other=-1)
            found = tl.zeros([ROWS], tl.float32)
            for start in range(0, DIM, DEPTH):
                depth = (start + tl.arange(0, DEPTH))[None, :]
                # Not there: another rank's, or nobody's.
                mask = (own >= 0)[:, None] & (depth < DIM)
                left = tl.load((features + place * DIM)[:, None] + depth, mask=mask, other=0.0).to(tl.float32)
                right = tl.load((centers + (slot + own) * DIM)[:, None] + depth, mask=mask, other=0.0)
                found += tl.sum(left * right.to(tl.float32), 1)
            tl.store(scores + row * LABELS + label, found * unit, mask=there)
    for tile in range(tl.program_id(1), tl.cdiv(classes, CLASSES), tl.num_programs(1)):
        column = tile * CLASSES + tl.arange(0, CLASSES)
        known = column < classes
        product = _products(
            features + place * DIM, there, centers + (slot + column) * DIM, known,
            DIM, ROWS, CLASSES, DEPTH, PRECISION,
        )  # fmt: skip
        score = tl.where(known[None, :], product * unit, float("-inf"))
        for label in range(LABELS):
            own = tl.load(columns + row * LABELS + label, mask=there, other=-1).to(tl.int32)
            score = tl.where(own[:, None] == column[None, :], float("-inf"), score)
        if HAS_NEAR:
            for number in range(near):
                own = tl.load(spared + row * near + number, mask=there, other=-1).to(tl.int32)
                score = tl.where(own[:, None] == column[None, :], float("-inf"), score)
        top = tl.maximum(top, tl.max(score, 1))
        if KEEP:
            power = tl.exp2(score - offset[:, None])
            total += tl.sum(power, 1)
            spot = p + base + line[:, None] * stride + column[None, :]
            # Zeros up to the stride, so that whole vectors are written and read.
            tl.store(spot, power.to(p.dtype.element_ty), mask=there[:, None] & (column < stride)[None, :])
    if KEEP:
        tl.store(sums + tl.program_id(1) * rows + row, total, mask=there)
    tl.store(best + tl.program_id(1) * rows + row, top, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _with_margin(cosine, margin, cos_m, sin_m, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    value, slope = cosine, cosine * 0.0 + 1.0
    if KIND == "cosface":
        value = cosine - margin
    if KIND == "arcface":
        cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
        sine = tl.sqrt(tl.maximum(1.0 - cosine * cosine, 4.76837158203125e-07))
        falling = cosine > -cos_m
        value = tl.where(falling, cosine * cos_m - sine * sin_m, cosine - margin * sin_m)
        slope = tl.where(falling, cos_m + sin_m * cosine / sine, 1.0)
    return value, slope


@triton.jit  # type: ignore[untyped-decorator]
def _row_terms(score, valid, total, offset, LOSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """As ``streaming.row_terms``; scores [rows, T], the others [rows]."""
    mass = tl.log(total) + offset
    if LOSS == "separated":
        opposed = tl.where(valid, -score, float("-inf"))
        top = tl.maximum(tl.max(opposed, 1), 0.0)
        positive = top + tl.log(tl.exp(-top) + tl.sum(tl.exp(opposed - top[:, None]), 1))
        loss = positive + tl.maximum(mass, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(mass)))
        negative = 1.0 / (total + tl.exp(-offset))
        pull = -tl.exp(opposed - positive[:, None])
    else:
        share = tl.where(valid, 1.0, 0.0)
        share = share / tl.maximum(tl.sum(share, 1), 1.0)[:, None]
        excess = mass[:, None] - score
        loss = tl.sum(share * (tl.maximum(excess, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(excess)))), 1)
        negative = tl.sum(share / (total[:, None] + tl.exp(score - offset[:, None])), 1)
        pull = -share / (1.0 + tl.exp(-excess))
    return loss, negative, pull


@triton.jit  # type: ignore[untyped-decorator]
def weigh(  # type: ignore[no-untyped-def]
    p, weighed, factor, seen, scores, sums, best, features, index, labels, columns, shift, table, rows,
    unit, scale, margin, cos_m, sin_m,
    LOSS: tl.constexpr, MARGIN: tl.constexpr, HAS_SHIFT: tl.constexpr, LEARNS: tl.constexpr,
    DIM: tl.constexpr, LABELS: tl.constexpr, SLOTS: tl.constexpr, LINES: tl.constexpr, PORTION: tl.constexpr,
):  # fmt: skip
    """Losses, cosines and wins of rows; their factor, and what their positives weigh beside exponentials."""
    first, count, _, _, base, stride = _line(table, tl.program_id(0))
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    row, there, label = first + line, line < count, tl.arange(0, SLOTS)
    spot = row[:, None] * LABELS + label[None, :]
    mask = there[:, None] & (label < LABELS)[None, :]
    valid = tl.load(labels + spot, mask=mask, other=-1) >= 0
    cosine = tl.load(scores + spot, mask=mask, other=0.0) / unit
    total = tl.load(sums + row, mask=there, other=1.0)
    offset = tl.zeros([LINES], tl.float32)
    if HAS_SHIFT:
        offset = tl.load(shift + row, mask=there, other=0.0) * 0.6931471805599453
    value, slope = _with_margin(cosine, margin, cos_m, sin_m, MARGIN)
    loss, negative, pull = _row_terms(value * scale, valid, total, offset, LOSS)
    rival = tl.load(best + row, mask=there, other=0.0) / unit
    won = tl.max(tl.where(valid, cosine, -2.0), 1) > rival
    tl.store(seen + row, loss, mask=there)
    tl.store(seen + rows + row, tl.sum(tl.where(valid, cosine, 0.0), 1), mask=there)
    tl.store(seen + 2 * rows + row, tl.where(won, 1.0, 0.0), mask=there)
    if LEARNS:
        # A row without negatives weighs only positives; where the factor vanishes no positive pulls.
        negative = tl.where(total == 0.0, 1.0, tl.maximum(negative, 1e-37))
        tl.store(factor + row, negative, mask=there)
        own = tl.load(columns + spot, mask=mask, other=-1)
        drawn = tl.where(valid, pull * slope / negative[:, None], 0.0).to(p.dtype.element_ty)
        tl.store(p + base + line[:, None] * stride + own, drawn, mask=mask & (own >= 0))
        place = tl.load(index + row, mask=there, other=0)
        for start in range(0, DIM, PORTION):
            depth = start + tl.arange(0, PORTION)
            inside = there[:, None] & (depth < DIM)[None, :]
            feature = tl.load(features + place[:, None] * DIM + depth[None, :], mask=inside, other=0.0)
            feature = (feature.to(tl.float32) * negative[:, None]).to(weighed.dtype.element_ty)
            tl.store(weighed + row[:, None] * DIM + depth[None, :], feature, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def pull_rows(  # type: ignore[no-untyped-def]
    p, gradient, centers, factor, index, table, all_rows, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows: exponentials times centers, a part of the classes for each second program id."""
    across = tl.cdiv(DIM, WIDTH)
    # Neighbours read the same exponentials.
    first, count, slot, classes, base, stride = _line(table, tl.program_id(0) // across)
    width = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    line = tl.arange(0, ROWS)
    there, wide = line < count, (width < DIM)[None, :]
    part = tl.cdiv(tl.cdiv(classes, DEPTH), tl.num_programs(1)) * DEPTH
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    begin = tl.program_id(1) * part
    for start in range(begin, tl.minimum(begin + part, classes), DEPTH):
        column = start + tl.arange(0, DEPTH)
        known = column < classes
        left = tl.load(
            p + base + line[:, None] * stride + column[None, :],
            mask=there[:, None] & (column < stride)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            centers + (slot + column)[:, None] * DIM + width[None, :], mask=known[:, None] & wide, other=0.0
        )
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    row = first + line
    place = tl.load(index + row, mask=there, other=0)
    sums *= (tl.load(factor + row, mask=there, other=0.0) * scale)[:, None]
    spot = (gradient + (tl.program_id(1) * all_rows + place) * DIM)[:, None] + width[None, :]
    tl.store(spot, sums, mask=there[:, None] & wide)


@triton.jit  # type: ignore[untyped-decorator]
def pull_centers(  # type: ignore[no-untyped-def]
    p, values, weighed, table, scale,
    ADD: tl.constexpr, DIM: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the unit centers: transposed exponentials times weighed rows."""
    across = tl.cdiv(DIM, WIDTH)
    slot, count, first, rows, base, stride = _line(table, tl.program_id(0) // across)
    width = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    line = tl.arange(0, CLASSES)
    there, wide = line < count, (width < DIM)[None, :]
    padded = tl.multiple_of((count + 15) // 16 * 16, 16)
    sums = tl.zeros([CLASSES, WIDTH], tl.float32)
    for start in range(0, rows, DEPTH):
        row = start + tl.arange(0, DEPTH)
        known = row < rows
        left = tl.load(
            p + (base + start * stride.to(tl.int64)) + tl.arange(0, DEPTH)[:, None] * stride + line[None, :],
            mask=known[:, None] & (line < padded)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            weighed + (first + row)[:, None] * DIM + width[None, :], mask=known[:, None] & wide, other=0.0
        )
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    spot, mask = values + slot * DIM + line[:, None] * DIM + width[None, :], there[:, None] & wide
    sums *= scale
    if ADD:
        sums += tl.load(spot, mask=mask, other=0.0)
    tl.store(spot, sums, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def collect(  # type: ignore[no-untyped-def]
    whole, marks, values, classes, begins, draws, local,
    FRESH: tl.constexpr, DIM: tl.constexpr, LINES: tl.constexpr, PORTION: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Add up a class's gradients of several draws, in their order; mark the classes that took part."""
    number = tl.program_id(0) * LINES + tl.arange(0, LINES)
    depth = tl.program_id(1) * PORTION + tl.arange(0, PORTION)
    there, inside = number < local, (depth < DIM)[None, :]
    spot = whole + number.to(tl.int64)[:, None] * DIM + depth[None, :]
    mark = tl.zeros([LINES], tl.int1)
    sums = tl.zeros([LINES, PORTION], tl.float32)
    if not FRESH:
        sums = tl.load(spot, mask=there[:, None] & inside, other=0.0)
        mark = tl.load(marks + number, mask=there, other=0) != 0
    for draw in range(draws):
        low = tl.load(begins + draw) + tl.zeros([LINES], tl.int64)
        end = tl.load(begins + draw + 1)
        high = end + tl.zeros([LINES], tl.int64)
        # The first of the draw's rising classes that is not below the own one.
        for _ in range(STEPS):
            middle = (low + high) // 2
            below = tl.load(classes + middle, mask=low < high, other=0) < number
            rises = below & (low < high)
            high = tl.where((low < high) & ~below, middle, high)
            low = tl.where(rises, middle + 1, low)
        found = there & (low < end)
        found = found & (tl.load(classes + low, mask=found, other=-1) == number)
        sums += tl.load(values + low[:, None] * DIM + depth[None, :], mask=found[:, None] & inside, other=0.0)
        mark = mark | found
    tl.store(spot, sums, mask=there[:, None] & inside)
    if tl.program_id(1) == 0:
        tl.store(marks + number, mark, mask=there)
