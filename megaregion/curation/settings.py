"""Every setting of a curation run, by stage; a stage is redone when one of its own settings changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megaregion.bounds import Count, Pixels, PositiveInt, Real, Seed, Share, Text, Whole
from megaregion.errors import UserError
from megaregion.settings import check, flag_name

MIN_VOCABULARY = 384
"""Fewest text classes: 256 are single bytes, and digits, punctuation and letters need room too."""
MAX_PIXELS = 89_478_485
"""Pixels of the largest image that training will decode."""

Iou = Annotated[float, Real(0, 1, "IOU")]
Probability = Annotated[float, Real(0, 1, "P")]
Folder = Annotated[str, Text("FOLDER")]


@dataclass(frozen=True)
class ImageSettings:
    """Which images are read; these enter the stages propose, ocr, embed and pack."""

    min_image_side: Pixels = 64
    """Skip images whose shortest edge has fewer pixels (paper: 336)."""
    max_image_pixels: Annotated[int, Whole(1, MAX_PIXELS, "PX")] = MAX_PIXELS
    """Refuse larger images, in pixels, as decompression bombs."""
    piece_images: Annotated[int, Whole(1, 10**6, "IMAGES")] = 128
    """Images that one piece of work takes; a kill costs at most that much."""


@dataclass(frozen=True)
class AnnotationSettings:
    """What came with the images: boxes, masks and texts; columns beside them."""

    annotations: Literal["prefer", "only", "ignore"] = "prefer"
    """Propose only where no annotation of an image is usable, nowhere, or everywhere."""
    annotations_file: Annotated[str, Text("FILE")] = ""
    """The JSON or CSV file of annotations, if it lies elsewhere; no other one is read then."""
    annotated_pixels: Literal["auto", "stored", "upright"] = "auto"
    """What boxes are of, where EXIF turns an image; auto goes by the size that the annotation names, and
    takes the stored pixels where that does not tell."""
    captions: bool = False
    """Keep the text beside an image, or of an annotation, in its record."""
    image_column: Annotated[str, Text("NAME")] = ""
    """Parquet and Arrow files: the column of images, where a file has several."""


@dataclass(frozen=True)
class ProposeSettings:
    """Boxes that may hold an object, and how object-like each is."""

    proposer: Literal["selective-search", "sam"] = "selective-search"
    """Who proposes."""
    sam: Folder = ""
    """Folder with the weights of SAM, SAM 2 or another of transformers' AutoModelForMaskGeneration."""
    sam_grid: Annotated[int, Whole(1, 256)] = 16
    """SAM: points along each side of the prompt grid (its paper: 32)."""
    proposal_sides: tuple[Annotated[int, Whole(32, 4096, "PX")], ...] = (256, 160)
    """Selective search: longest side, in pixels, of each size at which an image is segmented."""
    proposal_scales: tuple[Annotated[int, Whole(1, 10**6, "SCALE")], ...] = (150,)
    """Selective search: sizes of the segments to start from; 150 300 finds more."""
    min_edge: Annotated[float, Real(0, 16_384, "PX_OR_SHARE")] = 0.1
    """Least box edge: pixels, or below 1 a share of the image's shortest edge (paper: 128 px)."""
    max_area: Share = 0.6
    """Greatest share of the image that a box covers."""
    max_aspect: Annotated[float, Real(1, 10_000, "RATIO", advice="1 keeps squares only")] = 4.0
    """Greatest ratio of a box's edges."""
    nms_iou: Iou = 0.7
    """Of two boxes with a greater IoU, the less object-like is a duplicate."""


@dataclass(frozen=True)
class EmbedSettings:
    """Which proposals are kept, and how their crops are embedded."""

    max_regions: Annotated[int, Whole(1, 10_000)] = 12
    """Most object regions of one image; the most object-like are kept."""
    min_objectness: Probability = 0.05
    """Proposals less likely to be an object are background."""
    text_overlap: Iou = 0.5
    """Proposals with a greater IoU with a word are text, not objects."""
    embedder: Literal["lite0", "hf", "clip"] = "lite0"
    """Who embeds: EfficientNet-Lite0, the vision encoder of a HuggingFace folder, or CLIP of one."""
    encoder: Folder = ""
    """Hf: folder of any vision encoder that transformers' AutoModel loads, also of an export of our own."""
    clip: Folder = ""
    """Folder with CLIP's weights, as transformers saves them."""
    crop_side: Annotated[int, Whole(32, 1024, "PX", multiple=16)] = 128
    """Lite0: side, in pixels, to which a crop is resized (trained at 224)."""


@dataclass(frozen=True)
class ClusterSettings:
    """The k-means that turns embeddings into classes."""

    clusters: PositiveInt = 256
    """Number of centers, the object classes (paper: 1000000)."""
    cluster_iterations: Annotated[int, Whole(1, 10_000)] = 20
    """Most exact passes of k-means over all embeddings; it ends earlier where no center moves any more."""
    cluster_seed: Seed = 0
    """Seed of k-means."""
    first_level: Count = 0
    """Cells of the first guess; 0 takes the root of the number of centers, and one up to 512 centers."""


@dataclass(frozen=True)
class AssignSettings:
    """The labels: every region's nearest of all centers."""

    chunk_memory: Annotated[int, Whole(1, 10**6, "MIB")] = 512
    """Memory of a process for embeddings that are worked on at once, in cluster and in assign."""
    labels_per_region: Annotated[int, Whole(1, 1000)] = 1
    """Nearest centers that are kept of each object region (paper: 1); training takes the nearest unless
    data.max_object_labels or data.object_labels says otherwise."""


@dataclass(frozen=True)
class OcrSettings:
    """Who reads the text."""

    ocr: Literal["rapidocr", "paddleocr", "none"] = "rapidocr"
    """OCR engine; none reads no text."""
    paddle: Folder = ""
    """Paddleocr: folder with the folders det and rec of its models."""
    ocr_side: Annotated[int, Whole(1, 8192, "PX")] = 384
    """Rapidocr: longest side, in pixels, at which text is looked for."""


@dataclass(frozen=True)
class TokenizerSettings:
    """The classes of text."""

    min_confidence: Probability = 0.7
    """Words must be recognised with more than this (paper: 0.7)."""
    vocab: Annotated[int, Whole(MIN_VOCABULARY, 10**6, "V")] = 512
    """Text classes; 256 of them are single bytes."""
    tokenizer_texts: PositiveInt = 1_000_000
    """Different words that the tokenizer learns from; of more, an even sample."""
    corpus: Annotated[str, Text("FILE")] = ""
    """Text file, UTF-8, that joins the recognised words; Python's help if empty."""


@dataclass(frozen=True)
class PackSettings:
    """The shards."""

    samples_per_shard: Annotated[int, Whole(1, 10**6, "IMAGES")] = 512
    """Images that go into one shard, before those without a region."""
    cluster_cap: Count = 0
    """Most regions of one cluster that are packed, evenly over the images; 0 packs all."""
    cluster_temperature: Annotated[float, Real(0, 1, "T")] = 1.0
    """Of a cluster of n regions about n^T are drawn, all up to the median size; 1 packs all, 0 evens out."""
    balance_over: Literal["clusters", "cells"] = "clusters"
    """What the temperature evens out: all clusters; or those of each cell, --first-level cells of neighbours,
    and then the cells."""
    near_duplicates: Annotated[float, Real(0, 1, "COSINE")] = 0.0
    """Cosine from which a region nearly equals an earlier one of its cluster and is left out; 0 packs all."""


@dataclass(frozen=True)
class CurationSettings:
    """One curation run."""

    image: ImageSettings = field(default_factory=ImageSettings)
    annotation: AnnotationSettings = field(default_factory=AnnotationSettings)
    propose: ProposeSettings = field(default_factory=ProposeSettings)
    embed: EmbedSettings = field(default_factory=EmbedSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    assign: AssignSettings = field(default_factory=AssignSettings)
    reader: OcrSettings = field(default_factory=OcrSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    pack: PackSettings = field(default_factory=PackSettings)


def check_settings(settings: CurationSettings) -> None:
    """Check every setting that can be judged without reading an image.

    Raises:
        UserError: A value is out of bounds or contradicts another.
    """
    check(settings, say=flag_name)
    cluster, corpus = settings.cluster, settings.tokenizer.corpus
    if cluster.first_level > cluster.clusters:
        raise UserError(
            f"--first-level must be at most --clusters {cluster.clusters}, got {cluster.first_level}"
        )
    if settings.pack.balance_over == "cells" and settings.pack.cluster_temperature == 1:
        raise UserError("--balance-over cells needs --cluster-temperature T below 1; 1 packs all regions")
    for who, chosen, flag, path in (
        ("--proposer sam", settings.propose.proposer == "sam", "--sam", settings.propose.sam),
        ("--embedder hf", settings.embed.embedder == "hf", "--encoder", settings.embed.encoder),
        ("--embedder clip", settings.embed.embedder == "clip", "--clip", settings.embed.clip),
        ("--ocr paddleocr", settings.reader.ocr == "paddleocr", "--paddle", settings.reader.paddle),
    ):
        if chosen and not path:
            raise UserError(f"{who} needs {flag} FOLDER with its weights")
        if chosen and not Path(path).is_dir():
            raise UserError(f"{flag} {path} is no folder; give the folder that holds the weights")
    if corpus and not Path(corpus).is_file():
        raise UserError(f"--corpus {corpus} is no file; name a text file, or leave it out")
