"""Where an atlas comes from: a finished curation, or anything that tells labels and samples as it does.

What tools/curate.py writes serves, and so does a dataset's folder alone; without the stages nobody knows how
near a region lies to its center, and pages show random members only.

Shapes: r regions of a batch, K centers of C channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.curation.picture import ImageRegions, read_regions
from megaregion.curation.stages.cluster import COSINES
from megaregion.curation.stages.regions import REGIONS
from megaregion.data.image import decode_image
from megaregion.data.info import CENTERS_NAME, INFO_NAME, TOKENIZER_NAME, load_tokenizer
from megaregion.data.sample import BadSample, Box, SampleRecord, parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]
Rows = NDArray[np.void]
"""Labelled regions, [r] of :data:`ROW`; a text region gives one row for each of its tokens."""
ROW = np.dtype([("label", np.int64), ("sample", np.int64), ("region", np.int32), ("closeness", np.float32)])
"""Cluster or token, number of the sample, place of the region in its record, cosine to the center or NaN."""
BATCH = 4096
"""Samples of a batch."""


class Batch(NamedTuple):
    """The regions of some consecutive samples."""

    samples: int
    objects: Rows
    texts: Rows


class Sample(NamedTuple):
    """One sample, its image decoded to RGB."""

    key: str
    image: Image.Image
    record: SampleRecord


class Source(Protocol):
    """Gives everything that an atlas shows; picklable, so that workers can read too."""

    title: str
    """What the atlas is of, in a few words."""
    samples: int
    """Number of samples."""
    knows_closeness: bool
    """Whether the cosine of each region to its center is known."""

    @property
    def identity(self) -> str:
        """Hash of the content: equal sources give equal atlases."""
        ...

    def centers(self) -> Floats:
        """The centers, [K, C]; may be mapped from a file."""
        ...

    def pieces(self) -> Sequence[str]:
        """The text of each token; empty without text."""
        ...

    def batches(self) -> Iterator[Batch]:
        """All regions, in the order of the samples."""
        ...

    def read(self, number: int) -> Sample:
        """Read a sample; raises BadSample if it is damaged."""
        ...


def rank_within(labels: Integers) -> Integers:
    """Place of each row among those of its label, [r]; rows of a label stand together."""
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    return np.arange(len(labels)) - np.repeat(starts, np.diff(starts, append=len(labels)))


class _Piece(NamedTuple):
    """What one piece of the stages left."""

    regions: Path
    cosines: Path


class CuratedSource:
    """Reads what tools/curate.py wrote: a run's folder, or a dataset's.

    Raises:
        UserError: There is no finished dataset, it has no centers, or a file is not the one packed.
    """

    def __init__(self, folder: Path) -> None:
        shards = folder / "shards" if (folder / "shards").is_dir() else folder
        if not (shards / INFO_NAME).is_file():
            raise UserError(
                f"{folder} holds no finished curation ({shards / INFO_NAME} does not exist); name the --out "
                "folder of tools/curate.py"
            )
        self._dataset = ShardedDataset(shards)
        if self._dataset.info.centers_sha256 is None:
            raise UserError(f"{shards} was packed without {CENTERS_NAME}; curate it with tools/curate.py")
        self._pieces = _find_pieces(folder) if shards != folder else []
        self._centers_path = shards / CENTERS_NAME
        self.title, self.samples = folder.resolve().name, len(self._dataset)
        self.knows_closeness = bool(self._pieces)

    @cached_property
    def identity(self) -> str:
        """Hash of dataset.json, which names the hash of every shard, and of the stages' cosines."""
        content = hashlib.sha256((self._dataset.folder / INFO_NAME).read_bytes())
        for piece in self._pieces:
            content.update(piece.cosines.read_bytes())
        return content.hexdigest()

    def centers(self) -> Floats:
        """The centers, mapped from their file.

        Raises:
            UserError: They cannot be read, or are not finite.
        """
        try:
            centers: Floats = np.load(self._centers_path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{self._centers_path} cannot be read ({error}); curate again") from None
        expected = self._dataset.info.object_classes
        if centers.ndim != 2 or len(centers) != expected:
            raise UserError(
                f"{self._centers_path} must hold {expected} centers, got an array of shape {centers.shape}; "
                "curate again"
            )
        return centers

    def pieces(self) -> list[str]:
        """The text of each token."""
        if not self._dataset.info.text_classes:
            return []
        tokenizer = load_tokenizer(self._dataset.folder / TOKENIZER_NAME)
        return [tokenizer.id_to_piece(token) for token in range(self._dataset.info.text_classes)]

    def batches(self) -> Iterator[Batch]:
        """All regions; damaged records have none.

        Raises:
            UserError: A label has no class, or the stages are of another run.
        """
        images = _read_cosines(self._pieces)
        for start in range(0, self.samples, BATCH):
            stop = min(start + BATCH, self.samples)
            rows: dict[str, list[tuple[int, int, int, float]]] = {"object": [], "text": []}
            for number in range(start, stop):
                raw = self._dataset.read(number)
                cosines = _find_cosines(raw.key, images) if self._pieces else {}
                try:
                    record = parse_sample(raw.record)
                except BadSample:
                    continue
                for place, region in enumerate(self._dataset.labelled(number, raw.key, record).regions):
                    closeness = cosines.get(region.box, math.nan)
                    rows[region.kind] += [(label, number, place, closeness) for label in region.labels]
            yield Batch(stop - start, np.array(rows["object"], ROW), np.array(rows["text"], ROW))

    def read(self, number: int) -> Sample:
        """Read a sample.

        Raises:
            BadSample: It is damaged.
        """
        raw = self._dataset.read(number)
        return Sample(raw.key, decode_image(raw.image), parse_sample(raw.record))


def _find_cosines(key: str, images: Iterator[tuple[ImageRegions, Floats]]) -> dict[Box, float]:
    """The cosine of each of an image's boxes.

    Shards and stages list images in one order, so one pass over the stages serves all; images that were not
    packed are passed over.

    Raises:
        UserError: No later image has this key.
    """
    for image, cosines in images:
        if image.key == key:
            return dict(zip((region.box for region in image.regions), cosines.tolist(), strict=True))
    raise UserError(
        f"sample {key!r} of the shards is not where the curation's stages have it; the stages are of "
        "another run: curate again, or name the folder of the shards to do without them"
    )


def _read_cosines(pieces: list[_Piece]) -> Iterator[tuple[ImageRegions, Floats]]:
    for piece in pieces:
        try:
            cosines: Floats = np.load(piece.cosines, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{piece.cosines} cannot be read ({error}); curate again") from None
        start = 0
        for image in read_regions([piece.regions]):
            stop = start + len(image.regions)
            if stop > len(cosines):
                raise UserError(f"{piece.cosines} has fewer rows than {piece.regions}; curate again")
            yield image, cosines[start:stop]
            start = stop


def _find_pieces(folder: Path) -> list[_Piece]:
    """The stages' pieces, in order; none unless embed and assign are both complete."""
    assigned = sorted((folder / "stages" / "assign").glob(f"[0-9]*/{COSINES}"))
    pieces = [_Piece(folder / "stages" / "embed" / path.parent.name / REGIONS, path) for path in assigned]
    return pieces if all(piece.regions.is_file() for piece in pieces) else []
