"""From a list of positions to a batch: what runs in a worker process.

A sample that cannot be used is replaced by the order's rule, counted and named in its batch. Records are
read for a group of samples before the pictures of the group are decoded: a decoder's tables and pixels push
everything else out of the processor's caches, and short work that finds its code there again takes half the
time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from PIL import Image
from torch.utils.data import Dataset

from megaregion.config import DataConfig
from megaregion.data.ahead import ReadAhead
from megaregion.data.batch import Batch, TransformedSample, collate
from megaregion.data.image import Jpeg, open_image
from megaregion.data.info import DatasetInfo
from megaregion.data.order import SampleOrder
from megaregion.data.patience import LostShard, PatientReader
from megaregion.data.pool import Pool
from megaregion.data.sample import BadSample, SampleRecord, clip_regions, parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.data.transforms import Framed, Transform, check_size
from megaregion.errors import UserError

MAX_TRIES = 100
"""Samples tried for one position, the first included."""
GROUP_BYTES = 16 << 20
"""Encoded images that are held at a time; a batch of 180 photos of 90 KB."""


@dataclass(frozen=True)
class Failure:
    """What ends a run, found in a worker; an exception would arrive wrapped in a traceback."""

    text: str
    storage: bool = False
    """Whether the storage failed, which a later start may find mended; else it is a user's mistake."""

    def to_error(self) -> UserError | LostShard:
        """The exception that tells the run."""
        return (LostShard if self.storage else UserError)(self.text)


@dataclass
class _Finds:
    """What came to light while a batch was read."""

    bad_keys: list[str] = field(default_factory=list)
    bad_reasons: list[str] = field(default_factory=list)
    empty: int = 0
    dropped_regions: int = 0
    lost: int = 0

    def bad(self, key: str, reason: Exception) -> None:
        self.bad_keys.append(key)
        self.bad_reasons.append(str(reason))


@dataclass(frozen=True, eq=False)
class _Undecoded:
    """A sample whose pixels are still to be decoded."""

    framed: Framed
    image: Image.Image | Jpeg
    size: int
    """Bytes of the encoded image."""
    dropped: int
    """Regions without area inside the image."""
    tried: int
    """Samples tried for the position, this one included."""


@dataclass(frozen=True, eq=False)
class Batcher(Dataset[Batch | Failure]):
    """Makes a batch of the samples at some positions."""

    dataset: ShardedDataset
    order: SampleOrder
    transform: Transform
    config: DataConfig
    skips_lost: bool
    """Whether samples of a shard that cannot be read are replaced."""
    pool: Pool | None = None
    """Memory for the batches that worker processes send."""

    @cached_property
    def _reader(self) -> PatientReader:
        return PatientReader(self.dataset, self.config.read_retries, self.config.read_pause)

    @cached_property
    def _ahead(self) -> ReadAhead | None:
        return ReadAhead(self.dataset.mirror, self.order) if self.dataset.mirror is not None else None

    def __getitems__(self, positions: Sequence[int]) -> Batch | Failure:
        """The batch of some positions, or why the run has to end."""
        finds, config = _Finds(), self.config
        if self._ahead is not None:
            self._ahead.reached(positions[0])
        self.dataset.read_ahead([self.order.sample(position) for position in positions])
        samples = self._samples(positions, finds)
        try:
            batch = collate(samples, len(positions), config.mean, config.std, self.pool)
        except (UserError, LostShard) as error:
            return Failure(str(error), storage=isinstance(error, LostShard))
        return replace(batch, **vars(finds))

    def _samples(self, positions: Sequence[int], finds: _Finds) -> Iterator[TransformedSample]:
        group: deque[_Undecoded] = deque()
        size = 0
        for position in positions:
            group.append(found := self._undecoded(position, 0, finds))
            size += found.size
            if size >= GROUP_BYTES:
                yield from self._decoded(group, finds)
                size = 0
        yield from self._decoded(group, finds)

    def _decoded(self, group: deque[_Undecoded], finds: _Finds) -> Iterator[TransformedSample]:
        """Empty the group, so that no picture is held longer than it is needed."""
        while group:
            found = group.popleft()
            framed = found.framed
            try:
                sample = self.transform.decode(found.image, framed)
            except BadSample as reason:
                finds.bad(framed.key, reason)
                group.appendleft(self._undecoded(framed.position, found.tried, finds))
            else:
                finds.dropped_regions += found.dropped
                yield sample

    def _undecoded(self, position: int, tried: int, finds: _Finds) -> _Undecoded:
        """The next usable sample for a position, as far as its record and its image's header tell."""
        for attempt in range(tried, MAX_TRIES):
            index = self.order.replacement(position, attempt) if attempt else self.order.sample(position)
            try:
                raw = self._reader.read(index)
            except LostShard as reason:
                if not self.skips_lost or attempt == MAX_TRIES - 1:
                    raise
                finds.lost += 1
                finds.bad(f"sample {index}", reason)
                continue
            try:
                record, dropped = clip_regions(parse_sample(raw.record))
                check_labels(raw.key, record, self.dataset.info)
                image = open_image(raw.image)
                check_size(image, record)
            except BadSample as reason:
                finds.bad(raw.key, reason)
                continue
            framed = self.transform.frame(record, position, raw.key)
            if framed is not None:
                return _Undecoded(framed, image, len(raw.image), dropped, attempt + 1)
            finds.empty += 1
        raise UserError(
            f"{self.dataset.folder} gave no usable sample in {MAX_TRIES} tries for position {position}; "
            f"bad samples: {', '.join(finds.bad_keys[:5]) or 'none'}; without a region in the crop: "
            f"{finds.empty} (lower data.min_visible or raise data.crop_scale)"
        )


def check_labels(key: str, record: SampleRecord, info: DatasetInfo) -> None:
    """Check that every label of a sample is a class of the heads.

    Raises:
        UserError: A label lies outside its label space; the heads would learn nonsense from it.
    """
    for number, region in enumerate(record.regions):
        greatest = max(region.tokens) if region.label is None else region.label
        classes = info.text_classes if region.label is None else info.object_classes
        if greatest >= classes:
            raise UserError(
                f"sample {key!r}, region {number}: {region.kind} label {greatest} is outside the label space "
                f"of {classes} classes that dataset.json names; label and pack the dataset again"
            )
