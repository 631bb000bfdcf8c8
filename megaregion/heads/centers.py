"""Centers of classes: first values, norms, gradients, their AdamW, and those that do no work any more.

First values are random or made from k-means centers, the same for any sharding.

The streaming loss adds up the gradient of the *unit* centers, before the factor that the rest of the graph
puts on the loss; a draw of all classes, which reads the centers where they lie, has divided by their lengths
already. All corrections are linear and the centers stand still during a step, so they are made once, when the
step ends: the part along the center goes, length and factor come. One draw's gradients are kept as they are,
by class. When a second draw comes, both go into a matrix of all local classes with a mark for each that took
part: sizes stay unknown to the host until the step ends.

A dense AdamW would move every center in every step, on the moments of steps long past. Here a row that was
not drawn keeps weight and moments bit for bit, and the bias correction counts the steps that the row itself
has seen. When every row takes part each time this is torch.optim.AdamW.

Two kinds of classes waste capacity: one that no region shows any more, and two whose centers have become
alike and push each other apart.

Shapes: K local classes (of all ranks where they are given), E embedding width, C classes of a draw (width of
given centers), n classes that took part so far, or probed centers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import OptimizerConfig
from megaregion.heads.sampling import NearClasses, class_hashes, draw_key
from megaregion.heads.tiles import Scratch, lines_at_a_time

BLOCK = 1024
"""Classes that share one random generator."""
MOST_NEAR = 1024
"""Classes that may be near one."""
NEAR_SCORES, NEAR_PAIRS = 1 << 24, 1 << 14
"""Cosines, and pairs in double precision, that the search for near classes holds at a time."""


def random_centers(seed: int, name: str, local: range, dim: int) -> Tensor:
    """Gaussian centers of length about 1 for the classes ``local`` of head ``name``, float32 [len(local), E].

    Each block of classes has a generator of its own, so a class's center does not depend on the range.
    """
    centers = torch.empty((len(local), dim))
    for block in range(local.start // BLOCK, -(-local.stop // BLOCK) if len(local) else 0):
        drawn = torch.randn((BLOCK, dim), generator=_generator(seed, f"{name}/{block}"))
        first = block * BLOCK
        start, stop = max(local.start, first), min(local.stop, first + BLOCK)
        centers[start - local.start : stop - local.start] = drawn[start - first : stop - first]
    return centers.mul_(dim**-0.5)


def given_centers(centers: np.ndarray | Tensor, seed: int, name: str, local: range, dim: int) -> Tensor:
    """Unit centers of the classes ``local`` from given ones [K, C], float32 [len(local), E].

    Of a memory map only the range is read. Where the widths differ the centers are mapped by one fixed random
    matrix with orthonormal columns or rows (the Q of a Gaussian matrix under ``seed``): wider keeps all
    angles, narrower keeps them on average.
    """
    part = torch.from_numpy(np.array(centers[local.start : local.stop], dtype=np.float32))
    width = part.shape[1]
    if width != dim:
        gaussian = torch.randn(
            (max(width, dim), min(width, dim)), generator=_generator(seed, f"{name}/map"), dtype=torch.float64
        )
        ortho = torch.linalg.qr(gaussian).Q.float()
        part = part @ (ortho if width > dim else ortho.T)
    return torch.nn.functional.normalize(part, dim=1)


def _generator(seed: int, place: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/centers/{place}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def inverse_norms(centers: Tensor) -> Tensor:
    """1 / length of centers [C, E], [C]; 1 for one shorter than 1e-8, which thus scores 0 and can grow."""
    lengths = torch.linalg.vector_norm(centers, dim=1)
    return torch.where(lengths > 1e-8, lengths.reciprocal(), 1.0)


def normalise(centers: Tensor) -> Tensor:
    """Divide centers [C, E] by their lengths in place, as ``inverse_norms`` has them; return them."""
    for part in centers.split(lines_at_a_time(centers)) if len(centers) else ():
        part.mul_(inverse_norms(part)[:, None])
    return centers


class ClassGradient:
    """A row-sparse matrix [K, E] that grows with the classes that take part."""

    def __init__(self, weight: Tensor) -> None:
        """Start without any class of ``weight`` [K, E]."""
        self._weight = weight
        self._scratch = Scratch(weight)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.rows: Tensor | None = torch.empty(0, dtype=torch.int64, device=self._weight.device)
        """Classes that took part, in the order of ``values``; None for all of them (or not yet known)."""
        self.values = self._weight.new_empty((0, self._weight.shape[1]))
        """Their gradients, [n, E]; final after ``finish``."""
        self._marks: Tensor | None = None
        self._over_norms = False
        self._factors: list[Tensor] = []
        self._awaited = 0
        self._squares: Tensor | None = None

    def buffer(self, classes: Tensor | None) -> Tensor:
        """Room for a draw's gradients, [C, E], to be added to and then given to ``accumulate``."""
        self._refuse_if_finished()
        if classes is None:
            # A head draws all classes in every draw or in none, so one mark does for the sum.
            self._over_norms = True
            self._widen().fill_(True)
            return self.values
        name = "values" if self.is_empty else "room"
        return self._scratch.take(name, (len(classes), self._weight.shape[1])).zero_()

    def accumulate(self, classes: Tensor | None, room: Tensor) -> None:
        """Take over the gradients of a draw."""
        if classes is None:
            return
        if self.is_empty:
            self.rows, self.values = classes, room
            return
        self._widen().index_fill_(0, classes, True)
        self.values.index_add_(0, classes, room)

    def whole(self) -> tuple[Tensor, Tensor, bool]:
        """Gradients of all classes [K, E], and marks of those that took part [K].

        Third, whether nothing is there yet: both are then to be written, else added to.
        """
        self._refuse_if_finished()
        fresh = self.is_empty
        marks = self._widen(clear=False)
        return self.values, marks, fresh

    def expect_factor(self) -> None:
        """Count a loss whose backward is still to come."""
        self._awaited += 1

    def take_factor(self, factor: Tensor) -> None:
        """Take the derivative of the total by one micro-step's loss, 0-d; it must be the same for all."""
        self._awaited -= 1
        self._factors.append(factor)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Make the gradients those of the centers as they are; return their squared norm, 0-d float64.

        Raises:
            RuntimeError: The step's losses were weighted differently, or one was not sent backward.
        """
        if self._squares is not None:
            return self._squares
        if self._awaited:
            raise RuntimeError(
                f"backward was missed (or repeated) for {abs(self._awaited)} losses of this step; zero_grad()"
            )
        uneven, marked = self._ask()
        if uneven:
            raise RuntimeError("the losses of one step must enter the total with the same weight")
        self._squares = torch.zeros((), dtype=torch.float64, device=self._weight.device)
        factor = self._factors[0].to(self._weight.dtype) if self._factors else self._weight.new_ones(())
        self._narrow(marked)
        block = lines_at_a_time(self._weight)
        for start in range(0, len(self.values), block):
            part = slice(start, min(start + block, len(self.values)))
            centers = (
                self._weight[part] if self.rows is None else self._weight.index_select(0, self.rows[part])
            )
            values = self.values[part]
            inverse = inverse_norms(centers)
            along = (values * centers).sum(1) * inverse.square()
            scale = factor if self._over_norms else factor * inverse[:, None]
            values.addcmul_(centers, along[:, None], value=-1).mul_(scale)
            # By rows, each in its own type: a wide norm of the block would first copy it.
            self._squares += torch.linalg.vector_norm(values, dim=1).double().square().sum()
        return self._squares

    def _refuse_if_finished(self) -> None:
        if self._squares is not None:
            raise RuntimeError("the step's gradients are finished; call zero_grad() before the next loss")

    @property
    def is_empty(self) -> bool:
        """Whether no class took part yet."""
        return self._marks is None and self.rows is not None and len(self.rows) == 0

    def _widen(self, clear: bool = True) -> Tensor:
        """Turn ``values`` into a matrix of all classes, [K, E]; return the marks of those that took part.

        Without ``clear`` an empty one is left uninitialised.
        """
        if self._marks is None:
            empty = self.is_empty
            dense = self._scratch.take("dense", tuple(self._weight.shape))
            self._marks = torch.empty(len(dense), dtype=torch.bool, device=dense.device)
            if clear or not empty:
                dense.zero_()
                self._marks.zero_()
            if self.rows is not None and not empty:
                dense.index_copy_(0, self.rows, self.values)
                self._marks.index_fill_(0, self.rows, True)
            self.rows, self.values = None, dense
        return self._marks

    def _ask(self) -> tuple[bool, int]:
        """Whether the losses' factors differ, and how many classes are marked; waits for the device once."""
        if self._marks is None and len(self._factors) < 2:
            return False, 0
        factors = torch.stack(self._factors) if self._factors else self._weight.new_ones(1)
        uneven = (factors != factors[0]).any().long()
        marked = torch.zeros_like(uneven) if self._marks is None else self._marks.sum()
        differ, count = torch.stack([uneven, marked]).tolist()
        return differ > 0, count

    def _narrow(self, marked: int) -> None:
        """Keep of a matrix of all classes only those that took part."""
        if self._marks is None or marked == len(self._marks):
            return
        self.rows = torch.nonzero_static(self._marks, size=marked).squeeze(1)
        self.values = self.values.index_select(0, self.rows)


class RowAdamW:
    """AdamW over the rows of one matrix."""

    def __init__(self, weight: Tensor, config: OptimizerConfig) -> None:
        """Start with moments of zero for ``weight`` [K, E]."""
        self.weight = weight
        self.config = config
        moments = torch.bfloat16 if config.head_moments == "bf16" else weight.dtype
        self.exp_avg = torch.zeros_like(weight, dtype=moments)
        self.exp_avg_sq = torch.zeros_like(weight, dtype=moments)
        self.count = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)

    def to(self, weight: Tensor) -> None:
        """Follow the matrix to where it was moved."""
        self.weight = weight
        for name in ("exp_avg", "exp_avg_sq", "count"):
            setattr(self, name, getattr(self, name).to(weight.device))

    @torch.no_grad()
    def step(self, rows: Tensor | None, gradient: Tensor, lr: float, scale: Tensor | float = 1.0) -> None:
        """Move rising ``rows`` [n] (None: all) by ``scale`` (which clips) times their gradient [n, E]."""
        block = lines_at_a_time(self.weight)
        for start in range(0, len(gradient), block):
            part = slice(start, min(start + block, len(gradient)))
            scaled = gradient[part] if isinstance(scale, float) and scale == 1.0 else gradient[part] * scale
            self._step_block(part if rows is None else rows[part], scaled, lr)

    def _step_block(self, rows: slice | Tensor, gradient: Tensor, lr: float) -> None:
        config = self.config
        states = self.weight, self.exp_avg, self.exp_avg_sq, self.count
        # A slice gives views that are updated in place; chosen or narrow rows are copied out and back.
        taken = [state.index_select(0, rows) if isinstance(rows, Tensor) else state[rows] for state in states]
        wide = [state.to(self.weight.dtype) for state in taken[:3]]
        weight, exp_avg, exp_avg_sq, count = *wide, taken[3]
        count += 1
        exp_avg.lerp_(gradient, 1 - config.beta1)
        exp_avg_sq.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        if config.head_weight_decay:
            weight.mul_(1 - lr * config.head_weight_decay)
        # m / c1 / (sqrt(v / c2) + eps) with both corrections of a row brought into the denominator.
        seen = count.to(torch.float64)
        stretch = 1 - config.beta1**seen
        slope = (stretch * (1 - config.beta2**seen).rsqrt()).to(gradient.dtype)
        floor = (stretch * config.eps).to(gradient.dtype)
        root = torch.addcmul(floor[:, None], exp_avg_sq.sqrt(), slope[:, None])
        weight.addcdiv_(exp_avg, root, value=-lr)
        for state, own, updated in zip(states, taken, (weight, exp_avg, exp_avg_sq, count), strict=True):
            if isinstance(rows, Tensor):
                state.index_copy_(0, rows, updated.to(state.dtype))
            elif updated is not own:
                own.copy_(updated)


CHUNK = 8192
"""Centers compared with the probed ones at a time."""
SHOWN = 5
"""Pairs of doubles that a report names."""


@dataclass(frozen=True)
class DeadClasses:
    """What was found; the same on every rank."""

    idle: int
    """Classes that were nobody's positive for the given number of steps."""
    probed: int
    """Centers whose doubles were looked for."""
    doubles: tuple[tuple[int, int, float], ...]
    """Probed class, the other center most like it, and their cosine, where it is above the threshold."""

    def report(self, head: str, classes: int, idle_steps: int) -> str:
        """One line for the log of a head of so many classes."""
        pairs = ", ".join(f"{one} ~ {other} ({cosine:.2f})" for one, other, cosine in self.doubles[:SHOWN])
        more = ", ..." if len(self.doubles) > SHOWN else ""
        return (
            f"head {head}: {self.idle} of {classes} classes had no region in the last {idle_steps} steps; "
            f"{len(self.doubles)} of {self.probed} probed centers have a double"
            f"{f' ({pairs}{more})' if pairs else ''}"
        )


@torch.no_grad()
def find_doubles(
    weight: Tensor,
    local: range,
    classes: int,
    group: dist.ProcessGroup,
    step: int,
    probes: int,
    threshold: float,
) -> tuple[int, tuple[tuple[int, int, float], ...]]:
    """Look for centers of a cosine above ``threshold``; a collective.

    All pairs of a million centers are too many: a random sample of ``probes``, another one in each step,
    reaches other centers each time.

    Returns:
        Number of probed centers, and the doubles as in :class:`DeadClasses`.
    """
    hashes = class_hashes(draw_key(0, "census", step, 0), 0, classes, weight.device)
    chosen = hashes.topk(min(probes, classes), largest=False).indices.sort().values
    unit = weight * inverse_norms(weight)[:, None] if len(weight) else weight
    here = (chosen >= local.start) & (chosen < local.stop)
    probed = weight.new_zeros((len(chosen), weight.shape[1]))
    probed[here] = unit[chosen[here] - local.start]
    dist.all_reduce(probed, group=group)
    cosine, other = _nearest(probed, chosen, unit, local)
    top = cosine.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    other = torch.where(cosine == top, other, -1)
    dist.all_reduce(other, op=dist.ReduceOp.MAX, group=group)
    found = zip(chosen.tolist(), other.tolist(), top.tolist(), strict=True)
    return len(chosen), tuple(line for line in found if line[2] > threshold)


def _nearest(probed: Tensor, chosen: Tensor, unit: Tensor, local: range) -> tuple[Tensor, Tensor]:
    """Best cosine of each probed center with another one of this rank, and which that is."""
    best = probed.new_full((len(probed),), -2.0)
    other = torch.full_like(chosen, -1)
    for start in range(0, len(unit), CHUNK):
        cosines = probed @ unit[start : start + CHUNK].T
        own = chosen - local.start - start
        inside = (own >= 0) & (own < cosines.shape[1])
        cosines[inside, own[inside]] = -2.0
        top, place = cosines.max(1)
        better = top > best
        best = torch.where(better, top, best)
        other = torch.where(better, place + local.start + start, other)
    return best, other


@torch.no_grad()
def find_near(
    centers: Sequence[np.ndarray | Tensor], local: range, cosine: float, device: torch.device
) -> NearClasses:
    """Of every class those on this rank whose given centers are nearer than a cosine to its own.

    It stops where a class has more than MOST_NEAR: nobody could use the lists.

    Args:
        centers: Those of all classes, [K, C], in one part or more; parts of one width are compared.
        local: This rank's classes.
        cosine: The bound.
        device: Where to multiply.
    """
    counts = torch.zeros(sum(map(len, centers)), dtype=torch.int64)
    found = [counts.new_empty((2, 0))]
    for pairs in _near_pairs(centers, local, cosine, device):
        found.append(pairs)
        counts += pairs[0].bincount(minlength=len(counts))
        if counts.max() > MOST_NEAR:
            break
    whose, near = torch.cat(found, 1)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return NearClasses(starts, near[whose.argsort(stable=True)])


def _near_pairs(
    centers: Sequence[np.ndarray | Tensor], local: range, cosine: float, device: torch.device
) -> Iterator[Tensor]:
    """Classes and those of this rank near them, [2, n]; products propose and double precision decides.

    So the pairs do not depend on how the classes are spread.
    """
    firsts = np.cumsum([0, *map(len, centers)]).tolist()
    for first, part in zip(firsts, centers, strict=False):
        own = range(max(local.start, first), min(local.stop, first + len(part)))
        mine = _unit_rows(part, own.start - first, len(own), device)
        block = max(1, NEAR_SCORES // max(1, len(own)))
        for other_first, other in zip(firsts, centers, strict=False):
            if not own or other.shape[1] != part.shape[1]:
                continue
            for begin in range(0, len(other), block):
                rows = _unit_rows(other, begin, block, device)
                close = (rows @ mine.T > cosine - 0.01).nonzero()
                for lines, columns in (some.T for some in close.split(NEAR_PAIRS)):
                    exact = (rows[lines].double() * mine[columns].double()).sum(1)
                    pairs = torch.stack([lines + other_first + begin, columns + own.start])
                    yield pairs[:, (exact > cosine) & (pairs[0] != pairs[1])].cpu()


def _unit_rows(centers: np.ndarray | Tensor, start: int, count: int, device: torch.device) -> Tensor:
    """Some given centers as unit ones; of a memory map only they are read."""
    part = torch.from_numpy(np.array(centers[start : start + max(0, count)], dtype=np.float32))
    return torch.nn.functional.normalize(part.to(device), dim=1)
