"""How a run lies on its ranks: parameters, micro-batches, rows and classes of one rank.

Shapes: D width, M MLP width, E embedding width, K classes of a head over all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from megaregion.checks import batching
from megaregion.config import ModelConfig, RunConfig
from megaregion.data.info import INFO_NAME, join, read_info
from megaregion.errors import UserError
from megaregion.heads.grouped import lay_waves
from megaregion.heads.sampling import Draw
from megaregion.heads.tiles import TilePlan, plan_tiles
from megaregion.models import foreign
from megaregion.models.costs import Recompute, recompute_of_run
from megaregion.parallel.zero import effective_stage

PAPER_TEXT_SHARE = 0.4 / 2.4
"""Text regions among all regions in the paper's data: 400M beside 2B of objects."""
TEXT_TOKENS = 5
"""Tokens of a text region, our guess."""


@dataclass(frozen=True)
class Labels:
    """The label spaces and how the regions divide over them."""

    object_classes: int = 1_000_000
    text_classes: int = 32_768
    text_share: float = PAPER_TEXT_SHARE
    """Share of regions that are text."""
    source: str = "the paper's centers, our guess of its vocabulary"

    @property
    def by_kind(self) -> dict[str, int]:
        """Classes of each kind."""
        return {"object": self.object_classes, "text": self.text_classes}

    @property
    def shares(self) -> dict[str, float]:
        """Share of the regions that each kind has."""
        text = 0.0 if not self.text_classes else self.text_share if self.object_classes else 1.0
        return {"object": 1 - text, "text": text}


def known_labels(config: RunConfig, classes: int | None, vocabulary: int | None) -> Labels:
    """The label spaces: given ones, else those of the run's dataset, else the paper's."""
    paths, labels = [path for path, _ in config.data.datasets], Labels()
    if all((Path(path) / INFO_NAME).is_file() for path in paths):
        try:
            info, _ = join([read_info(Path(path)) for path in paths], paths)
        except UserError as error:
            raise UserError(f"{error}; or give --classes and --vocabulary") from None
        source = ", ".join(str(Path(path) / INFO_NAME) for path in paths)
        labels = Labels(info.object_classes, info.text_classes, source=source)
    if classes is None and vocabulary is None:
        return labels
    return Labels(
        labels.object_classes if classes is None else classes,
        labels.text_classes if vocabulary is None else vocabulary,
        source="as given",
    )


@dataclass(frozen=True)
class TeacherCost:
    """What a teacher adds, of the settings in its folder."""

    width: int
    """C of its features; 0 where its settings cannot be read here."""
    parameters: int = 0
    flops: int = 0
    """Operations of its forward pass of one image."""


@lru_cache
def teacher_cost(path: str, grid: int) -> TeacherCost:
    """Build a teacher without weights, and count what it does where the student sees grid x grid patches."""
    try:
        model = foreign.skeleton(path)
        side = grid * model.config.patch_size
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            _, cells = foreign.see(model, torch.zeros(1, 3, side, side, device="meta"))
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError):
        return TeacherCost(0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TeacherCost(cells.shape[-1], parameters, counted.get_total_flops())


def body_parameters(
    model: ModelConfig, embedding_dim: int, tensor: int = 1, teacher_width: int = 0
) -> tuple[int, int]:
    """The encoder's parameters on one of so many tensor ranks, and those in tensors of at most 10,000.

    ZeRO 3 keeps these whole.
    """
    width, mlp, blocks = model.width, model.mlp_width, block_count(model)
    vectors = [*[width] * 6, 3 * width // tensor, mlp // tensor]
    matrices = block_matrices(model) // tensor
    alone = [width, model.head_dim // 2, *[width] * 4, model.registers * width]
    alone += [width] if model.region_start == "learned" else []
    taught = [width * teacher_width, teacher_width]
    outside = 3 * model.patch_size**2 * width + sum(alone) + width * embedding_dim + sum(taught)
    small = [size for size in alone + taught + blocks * vectors if size <= 10_000]
    return outside + blocks * (matrices + sum(vectors)), sum(small)


def block_count(model: ModelConfig) -> int:
    """Blocks, with those of region tokens' own."""
    return model.depth + (model.region_layers if model.region_weights == "separate" else 0)


def block_matrices(model: ModelConfig) -> int:
    """Numbers in the matrices of one block: queries, keys, values, output and the two of the MLP."""
    return 4 * model.width**2 + 2 * model.width * model.mlp_width


@dataclass(frozen=True)
class HeadLayout:
    """One head on one rank, in one draw and one micro-step."""

    local_classes: int
    """Classes that this rank holds."""
    draws: float
    """Draws of a micro-step."""
    draw_rows: float
    """Rows of a draw over all data ranks."""
    drawn: float
    """Classes of a draw on this rank, as expected."""
    cut: TilePlan
    """How a draw's scores are cut on the rank that drew the most classes, for which the others wait."""
    sampled: bool
    """Whether a draw has only some classes."""
    waves: int
    """Parts of the rows of all draws, where a GPU scores all together; 0 where one draw follows the other."""

    @property
    def rows(self) -> float:
        """Rows of a micro-step over all data ranks."""
        return self.draws * self.draw_rows

    @property
    def blocks(self) -> int:
        """Blocks of rows of a draw."""
        return len(list(self.cut.blocks()))

    @property
    def tiles(self) -> int:
        """Tiles of classes of a block."""
        return len(list(self.cut.tiles()))

    @property
    def again(self) -> int:
        """Tiles of a block that are computed again for the gradient."""
        return max(0, self.tiles - self.cut.kept)

    @property
    def touched(self) -> float:
        """Classes of this rank that take part in a step of many draws."""
        missed = (1 - self.drawn / max(1, self.local_classes)) ** self.draws
        return self.local_classes * (1 - missed)


@dataclass(frozen=True)
class Layout:
    """A run on its ranks."""

    config: RunConfig
    labels: Labels
    ranks: int
    data: int
    """Data-parallel ranks."""
    micro_batch: int
    """Images that a rank passes through the model at once."""
    micro_steps: int
    parameters: int
    """Body parameters of one tensor rank."""
    small: int
    """Of these, those that ZeRO 3 keeps whole."""
    heads: dict[str, HeadLayout]
    """By label kind; those with classes and weight."""
    teacher: TeacherCost = TeacherCost(0)

    @property
    def zero_stage(self) -> int:
        """The stage that runs."""
        return effective_stage(self.config, self.data)

    @property
    def tensor(self) -> int:
        """Ranks that share one copy of the model."""
        return self.config.parallel.tensor

    @property
    def spread(self) -> int:
        """Ranks that share the tokens between the linears."""
        return self.tensor if self.config.parallel.tokens_cut else 1

    @property
    def all_parameters(self) -> int:
        """Body parameters of the whole model."""
        width = self.teacher.width
        return body_parameters(self.config.model, self.config.head.embedding_dim, teacher_width=width)[0]

    @property
    def by_muon(self) -> int:
        """Of a tensor rank's body parameters those that Muon moves."""
        model = self.config.model
        muon = self.config.optimizer.name == "muon"
        return block_count(model) * block_matrices(model) // self.tensor if muon else 0

    @property
    def itemsize(self) -> int:
        """Bytes of a body parameter and of an activation."""
        return self.config.train.value_bytes

    @property
    def sum_itemsize(self) -> int:
        """Bytes of an element of a body parameter's summed gradient."""
        return self.config.train.sum_bytes

    @property
    def sums_apart(self) -> bool:
        """Whether gradients add up in another type than they are made in, in memory of their own."""
        return self.sum_itemsize != self.itemsize

    @property
    def recompute(self) -> tuple[Recompute, ...]:
        """What each block recomputes."""
        return recompute_of_run(self.config, self.micro_batch, self.config.model.image_size)

    @property
    def images(self) -> int:
        """Images of one data rank in a step."""
        return self.micro_batch * self.micro_steps

    @property
    def micro_rows(self) -> int:
        """Regions of a micro-step over all data ranks."""
        return self.micro_batch * self.data * self.config.data.regions_per_image


def lay_out(config: RunConfig, ranks: int, labels: Labels, device: str) -> Layout:
    """Spread a run over ranks, each a gpu or a processor.

    Raises:
        UserError: The ranks do not suit parallel.tensor or the global batch.
    """
    tensor = config.parallel.tensor
    if ranks % tensor:
        raise UserError(f"parallel.tensor must divide the number of ranks {ranks}, got {tensor}")
    data = ranks // tensor
    cut, regions = batching(config, data), config.data.regions_per_image
    draws = cut.micro_batch * data / cut.draw_images
    heads = {
        kind: _head(config, kind, labels, ranks, draws, cut.draw_images * regions * share, device)
        for kind, share in labels.shares.items()
        if labels.by_kind[kind] and config.head.by_kind[kind].weight
    }
    path = config.distill.teacher
    teacher = teacher_cost(path, config.model.grid) if path else TeacherCost(0)
    body = body_parameters(config.model, config.head.embedding_dim, tensor, teacher.width)
    return Layout(config, labels, ranks, data, cut.micro_batch, cut.micro_steps, *body, heads, teacher)


def _head(
    run: RunConfig, kind: str, labels: Labels, ranks: int, draws: float, rows: float, device: str
) -> HeadLayout:
    """One head, of whose rows each draw has so many."""
    config = run.head
    settings, classes = config.by_kind[kind], labels.by_kind[kind]
    most_labels = {"object": run.data.max_object_labels, "text": TEXT_TOKENS}
    local, positives = -(-classes // ranks), rows * most_labels[kind]
    drawn, typical, most = float(local), local, local
    if sampled := settings.sample_rate < 1 and classes > settings.min_negatives:
        share = max(settings.sample_rate, settings.min_negatives / classes)
        drawn = local * (share - (1 - share) * math.expm1(-positives / classes))
        missed = (1 - settings.sample_rate) * math.exp(-positives / classes)
        typical = math.ceil(local * (1 - missed))
        most = min(local, round(drawn + 2 * math.sqrt(drawn)))
    else:
        draws, rows = 1.0, draws * rows  # Draws of all classes are one.
    flying = 2 if ranks > 1 else 1
    cut = plan_tiles(max(1, round(rows)), max(1, most), typical, 4, config.chunk_bytes // flying, device)
    waves = 0
    if device == "gpu" and config.backend != "torch":
        count = max(1, round(rows))
        groups = tuple(
            Draw(slice(begin, begin + count), slice(0, 0), typical)
            for begin in range(0, max(1, round(draws)) * count, count)
        )
        waves = len(lay_waves(groups, config.chunk_bytes // run.train.value_bytes, flying))
    return HeadLayout(local, draws, rows, drawn, cut, sampled, waves)
