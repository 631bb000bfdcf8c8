"""How a run lies on its ranks: parameters, micro-batches, rows and classes of one rank.

Shapes: D width, M MLP width, E embedding width, K classes of a head over all ranks.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaregion.checks import batching
from megaregion.config import HeadConfig, ModelConfig, RunConfig
from megaregion.data.info import INFO_NAME, read_info
from megaregion.errors import UserError
from megaregion.heads.tiles import TilePlan, plan_tiles
from megaregion.models.costs import Recompute, recompute_of_run

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


def known_labels(config: RunConfig, classes: int | None, vocabulary: int | None) -> Labels:
    """The label spaces: given ones, else those of the run's dataset, else the paper's."""
    folder, labels = Path(config.data.path), Labels()
    if (folder / INFO_NAME).is_file():
        try:
            info = read_info(folder)
        except UserError as error:
            raise UserError(f"{error}; or give --classes and --vocabulary") from None
        labels = Labels(info.object_classes, info.text_classes, source=str(folder / INFO_NAME))
    if classes is None and vocabulary is None:
        return labels
    return Labels(
        labels.object_classes if classes is None else classes,
        labels.text_classes if vocabulary is None else vocabulary,
        source="as given",
    )


@dataclass(frozen=True)
class BodyParameters:
    """The encoder's parameters, by what tensor parallelism does with them."""

    whole: int
    """Held by every tensor rank."""
    cut: int
    """Spread over the tensor ranks."""
    small: int
    """Of one tensor rank's parameters, those in tensors of at most 10,000, which ZeRO 3 keeps whole."""

    def on_rank(self, tensor: int) -> int:
        """Parameters of one tensor rank."""
        return self.whole + self.cut // tensor


def body_parameters(model: ModelConfig, embedding_dim: int, tensor: int = 1) -> BodyParameters:
    """Count the encoder's parameters.

    Args:
        model: Sizes of the transformer.
        embedding_dim: E.
        tensor: Tensor ranks; only ``small`` depends on them.
    """
    width, mlp = model.width, model.mlp_width
    blocks = model.depth + (model.region_layers if model.region_weights == "separate" else 0)
    vectors = [width, width, width, width, width, width, 3 * width // tensor, mlp // tensor]
    alone = [width, model.head_dim // 2, *[width] * 4]
    return BodyParameters(
        whole=3 * model.patch_size**2 * width + sum(alone) + width * embedding_dim + blocks * 6 * width,
        cut=blocks * (4 * width * width + 2 * width * mlp + 3 * width + mlp),
        small=sum(v for v in alone if v <= 10_000) + blocks * sum(v for v in vectors if v <= 10_000),
    )


@dataclass(frozen=True)
class HeadLayout:
    """One head on one rank, in one draw and one micro-step."""

    local_classes: int
    """Classes that this rank holds."""
    rows: float
    """Rows of a micro-step over all data ranks."""
    draw_rows: float
    """Rows of a draw."""
    drawn: float
    """Classes of a draw on this rank, as expected."""
    tiles: TilePlan
    """How a draw's scores are cut."""
    sampled: bool
    """Whether a draw has only some classes."""

    @property
    def draws(self) -> float:
        """Draws of a micro-step."""
        return self.rows / self.draw_rows

    @property
    def kept(self) -> float:
        """Share of the scores that is kept from the sums to the gradient."""
        tiles = -(-self.tiles.total_classes // self.tiles.classes)
        return min(1.0, self.tiles.kept / tiles)

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
    body: BodyParameters
    heads: dict[str, HeadLayout]
    """By label kind; those with classes and weight."""
    zero_stage: int
    """The stage that runs, as DeepSpeed's settings have it."""
    bucket: int
    """Elements of DeepSpeed's buffer for gradients that are reduced together."""

    @property
    def tensor(self) -> int:
        """Ranks that share one copy of the model."""
        return self.config.parallel.tensor

    @property
    def spread(self) -> int:
        """Ranks that share the tokens between the linears."""
        return self.tensor if self.config.parallel.tokens_cut else 1

    @property
    def parameters(self) -> int:
        """Body parameters of one tensor rank."""
        return self.body.on_rank(self.tensor)

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
    cut = batching(config, data)
    regions = config.data.regions_per_image
    rows, draw_rows = cut.micro_batch * data * regions, cut.draw_images * regions
    kinds = {
        "object": (config.head.object, labels.object_classes, 1 - labels.text_share),
        "text": (config.head.text, labels.text_classes, labels.text_share),
    }
    heads = {
        kind: _head(
            settings, classes, ranks, rows * share, draw_rows * share, config.head.chunk_bytes, device
        )
        for kind, (settings, classes, share) in kinds.items()
        if classes and settings.weight
    }
    body = body_parameters(config.model, config.head.embedding_dim, tensor)
    zero = _zero_settings(config, data)
    return Layout(
        config, labels, ranks, data, cut.micro_batch, cut.micro_steps, body, heads,
        zero_stage=zero["stage"], bucket=zero["reduce_bucket_size"],
    )  # fmt: skip


def _zero_settings(config: RunConfig, data: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        # megatron tells that it has no Transformer Engine; no run here needs it.
        warnings.simplefilter("ignore")
        from megaregion.parallel.zero import deepspeed_config
    settings: dict[str, Any] = deepspeed_config(config, data)["zero_optimization"]
    return settings


def _head(
    settings: HeadConfig,
    classes: int,
    ranks: int,
    rows: float,
    draw_rows: float,
    chunk: int,
    device: str,
) -> HeadLayout:
    local = -(-classes // ranks)
    sampled = settings.sample_rate < 1 and classes > settings.min_negatives
    positive = -math.expm1(-draw_rows / classes)
    share = max(settings.sample_rate, settings.min_negatives / classes) if sampled else 1.0
    drawn = local * (share + (1 - share) * positive)
    budget = chunk // (2 if ranks > 1 else 1)
    count = max(1, round(drawn))
    tiles = plan_tiles(max(1, round(draw_rows)), count, count, 4, budget, device)
    return HeadLayout(local, rows, draw_rows, drawn, tiles, sampled)
