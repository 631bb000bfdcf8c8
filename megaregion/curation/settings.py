"""Every setting of a curation run, by stage; a stage is redone when one of its own settings changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from megaregion.errors import UserError

MIN_VOCABULARY = 384
"""Fewest text classes: 256 are single bytes, and digits, punctuation and letters need room too."""

FLAT_CENTERS = 512
"""Most centers for which plain k-means is as fast as any other."""

MAX_PASSES = 12
"""Most refinement passes; each is a stage of its own."""


def _setting(default: Any, unit: str, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A field that becomes a flag; the unit stands for the value in the help, the text says the effect."""
    return field(default=default, metadata={"unit": unit, "help": text, "choices": choices})


@dataclass(frozen=True)
class ImageSettings:
    """Which images are read; these enter the stages propose, ocr, embed and pack."""

    min_image_side: int = _setting(64, "PX", "skip images whose shortest edge has fewer pixels (paper: 336)")
    max_image_pixels: int = _setting(
        89_478_485, "PX", "refuse larger images, in pixels, as decompression bombs"
    )
    piece_images: int = _setting(
        128, "N", "images that one piece of work takes; a kill costs at most that much"
    )


@dataclass(frozen=True)
class ProposeSettings:
    """Boxes that may hold an object, and how object-like each is."""

    proposer: str = _setting("selective-search", "", "who proposes", choices=("selective-search", "sam"))
    sam: str = _setting("", "FOLDER", "folder with SAM's weights, as transformers saves them")
    sam_grid: int = _setting(16, "N", "SAM: points along each side of the prompt grid (its paper: 32)")
    proposal_sides: tuple[int, ...] = _setting(
        (256, 160),
        "PX",
        "selective search: longest side, in pixels, of each size at which an image is segmented",
    )
    proposal_scales: tuple[int, ...] = _setting(
        (150,), "SCALE", "selective search: sizes of the segments to start from; 150 300 finds more"
    )
    min_edge: float = _setting(
        0.1,
        "PX_OR_SHARE",
        "least box edge: pixels, or below 1 a share of the image's shortest edge (paper: 128 px)",
    )
    max_area: float = _setting(0.6, "SHARE", "greatest share of the image that a box covers")
    max_aspect: float = _setting(4.0, "RATIO", "greatest ratio of a box's edges")
    nms_iou: float = _setting(
        0.7, "IOU", "of two boxes with a greater IoU, the less object-like is a duplicate"
    )


@dataclass(frozen=True)
class EmbedSettings:
    """Which proposals are kept, and how their crops are embedded."""

    max_regions: int = _setting(12, "N", "most object regions of one image; the most object-like are kept")
    min_objectness: float = _setting(0.05, "P", "proposals less likely to be an object are background, 0..1")
    text_overlap: float = _setting(
        0.5, "IOU", "proposals with a greater IoU with a word are text, not objects"
    )
    embedder: str = _setting("lite0", "", "who embeds: EfficientNet-Lite0 or CLIP", choices=("lite0", "clip"))
    clip: str = _setting("", "FOLDER", "folder with CLIP's weights, as transformers saves them")
    crop_side: int = _setting(
        128, "PX", "Lite0: side, in pixels, to which a crop is resized (trained at 224)"
    )


@dataclass(frozen=True)
class ClusterSettings:
    """The k-means that turns embeddings into classes."""

    clusters: int = _setting(256, "K", "number of centers, the object classes (paper: 1000000)")
    cluster_iterations: int = _setting(20, "N", "passes of k-means over the embeddings")
    cluster_seed: int = _setting(0, "SEED", "seed of k-means")
    cluster_method: str = _setting(
        "auto",
        "",
        f"flat k-means, or in first-level cells with refinement; auto: flat up to {FLAT_CENTERS} centers",
        choices=("auto", "flat", "cells"),
    )
    first_level: int = _setting(0, "G", "first-level cells, each a piece of work; 0 takes the root of K")
    refine_passes: int = _setting(
        10, "N", f"passes over all embeddings after the cells are done, 0 to {MAX_PASSES}"
    )

    @property
    def hierarchical(self) -> bool:
        """Whether centers are found in first-level cells."""
        by_size = self.cluster_method == "auto" and self.clusters > FLAT_CENTERS
        return by_size or self.cluster_method == "cells"


@dataclass(frozen=True)
class AssignSettings:
    """The labels; more than 4096 centers are not all looked at, see assign-probes."""

    assign_probes: int = _setting(
        16, "N", "cells of centers that are looked through for each region; 0 looks at every center"
    )
    chunk_memory: int = _setting(
        512, "MIB", "memory for embeddings that are worked on at once, in cluster stages and in assign"
    )


@dataclass(frozen=True)
class OcrSettings:
    """Who reads the text."""

    ocr: str = _setting(
        "rapidocr", "", "OCR engine; none reads no text", choices=("rapidocr", "paddleocr", "none")
    )
    paddle: str = _setting("", "FOLDER", "paddleocr: folder with the folders det and rec of its models")
    ocr_side: int = _setting(384, "PX", "rapidocr: longest side, in pixels, at which text is looked for")


@dataclass(frozen=True)
class TokenizerSettings:
    """The classes of text."""

    min_confidence: float = _setting(0.7, "P", "words must be recognised with more than this (paper: 0.7)")
    vocab: int = _setting(512, "V", f"text classes; at least {MIN_VOCABULARY}, as 256 are single bytes")
    tokenizer_texts: int = _setting(
        1_000_000, "N", "different words that the tokenizer learns from; of more, an even sample"
    )
    corpus: str = _setting(
        "", "FILE", "text file, UTF-8, that joins the recognised words; Python's help if empty"
    )


@dataclass(frozen=True)
class PackSettings:
    """The shards."""

    samples_per_shard: int = _setting(
        512, "N", "images that go into one shard, before those without a region"
    )
    cluster_cap: int = _setting(
        0, "N", "most regions of one cluster that are packed, evenly over the images; 0 packs all"
    )


@dataclass(frozen=True)
class CurationSettings:
    """One curation run."""

    image: ImageSettings = field(default_factory=ImageSettings)
    propose: ProposeSettings = field(default_factory=ProposeSettings)
    embed: EmbedSettings = field(default_factory=EmbedSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    assign: AssignSettings = field(default_factory=AssignSettings)
    reader: OcrSettings = field(default_factory=OcrSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    pack: PackSettings = field(default_factory=PackSettings)


def setting_groups() -> Iterator[tuple[str, str, tuple[Field[Any], ...]]]:
    """Name, title and fields of every group of settings, for a command line."""
    defaults = CurationSettings()
    for group in fields(CurationSettings):
        settings = getattr(defaults, group.name)
        yield group.name, type(settings).__doc__ or "", fields(settings)


def settings_from(values: dict[str, Any]) -> CurationSettings:
    """Build settings from values by field name; what is absent keeps its default.

    Raises:
        UserError: A value is out of range or contradicts another.
    """
    defaults = CurationSettings()
    groups = {
        name: type(getattr(defaults, name))(
            **{each.name: values[each.name] for each in members if each.name in values}
        )
        for name, _, members in setting_groups()
    }
    settings = CurationSettings(**groups)
    check_settings(settings)
    return settings


def check_settings(settings: CurationSettings) -> None:
    """Check every setting that can be judged without reading an image.

    Raises:
        UserError: A value is out of range or contradicts another.
    """
    values = {
        each.name: getattr(getattr(settings, g), each.name) for g, _, f in setting_groups() for each in f
    }
    for key in (
        "min_image_side", "max_image_pixels", "piece_images", "sam_grid", "max_regions", "clusters",
        "cluster_iterations", "ocr_side", "samples_per_shard", "tokenizer_texts", "chunk_memory",
    ):  # fmt: skip
        if values[key] < 1:
            raise UserError(f"{_flag(key)} must be at least 1, got {values[key]}")
    for key in ("cluster_seed", "first_level", "assign_probes"):
        if values[key] < 0:
            raise UserError(f"{_flag(key)} must be 0 or more, got {values[key]}")
    if not 0 <= values["refine_passes"] <= MAX_PASSES:
        raise UserError(f"--refine-passes must lie in 0..{MAX_PASSES}, got {values['refine_passes']}")
    if values["first_level"] > values["clusters"]:
        raise UserError(
            f"--first-level must be at most --clusters {values['clusters']}, got {values['first_level']}"
        )
    for key in ("max_area", "nms_iou", "min_objectness", "text_overlap", "min_confidence"):
        if not 0 <= values[key] <= 1:
            raise UserError(f"{_flag(key)} must lie in [0, 1], got {values[key]}")
    if not values["proposal_sides"] or min(values["proposal_sides"]) < 32:
        raise UserError(f"--proposal-sides must be 32 pixels or more, got {values['proposal_sides']}")
    if not values["proposal_scales"] or min(values["proposal_scales"]) < 1:
        raise UserError(f"--proposal-scales must be 1 or more, got {values['proposal_scales']}")
    for key in ("min_edge", "cluster_cap"):
        if values[key] < 0:
            raise UserError(f"{_flag(key)} must be 0 or more, got {values[key]}")
    if values["max_aspect"] < 1:
        raise UserError(f"--max-aspect must be 1 or more, got {values['max_aspect']}; 1 keeps squares only")
    if values["crop_side"] < 32 or values["crop_side"] % 32:
        raise UserError(f"--crop-side must be a multiple of 32 pixels, got {values['crop_side']}")
    if values["vocab"] < MIN_VOCABULARY:
        raise UserError(f"--vocab must be at least {MIN_VOCABULARY}, got {values['vocab']}")
    for who, key, kind in (
        ("sam", "proposer", "--sam"),
        ("clip", "embedder", "--clip"),
        ("paddleocr", "ocr", "--paddle"),
    ):
        path = values[kind.removeprefix("--")]
        if values[key] == who and not path:
            raise UserError(f"{_flag(key)} {who} needs {kind} FOLDER with its weights")
        if values[key] == who and not Path(path).is_dir():
            raise UserError(f"{kind} {path} is no folder; give the folder that holds the weights")
    if values["corpus"] and not Path(values["corpus"]).is_file():
        raise UserError(f"--corpus {values['corpus']} is no file")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
