"""Stages pack and publish: a shard from each slice of the images, and the dataset.

Shapes: r regions of a slice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.inputs.source import ImageFile
from megaregion.curation.picture import (
    BadImage,
    ImageRegions,
    ImageWords,
    Proposal,
    Word,
    checksum,
    read_regions,
    read_words,
)
from megaregion.curation.stages.balance import FATE_NAMES, FATES, STARTS, TWIN, Balance
from megaregion.curation.stages.cluster import CENTERS, LABELS, OTHERS
from megaregion.curation.stages.regions import REGIONS
from megaregion.curation.stages.stage import Job, Output, Piece, Stage, plain
from megaregion.curation.stages.text import MODEL, WORDS
from megaregion.data.info import (
    CENTERS_NAME,
    INFO_NAME,
    TOKENIZER_NAME,
    ShardEntry,
    load_tokenizer,
    token_set,
)
from megaregion.data.sample import RegionRecord, SampleRecord
from megaregion.data.writer import ShardWriter, write_dataset
from megaregion.errors import UserError
from megaregion.schemas.curation import DROPPED

ENTRY = "entry.json"
DAMAGED = "damaged after it was proposed"
"""Why an image is not packed whose size and time of change stayed."""

T = TypeVar("T")


class Pack(Stage):
    """Writes shards/shard-00003.tar with its index, and entry.json: the shard's line in dataset.json.

    Pieces are slices of their own length, so that another shard size costs no new proposals. A slice
    without any region gives no shard, and null as entry.
    """

    name = "pack"
    reads = ("embed", "assign", "ocr")
    version = 3

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._balanced = Balance(job).pieces() > 0
        self.reads_whole = ("balance", "tokenizer") if self._balanced else ("tokenizer",)

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings
        # What else is said of packing enters through the stage balance.
        own = {name: plain(settings.pack)[name] for name in ("samples_per_shard", "cluster_cap")}
        return own | plain(settings.image) | {"min_confidence": settings.tokenizer.min_confidence}

    @override
    def pieces(self) -> int:
        return -(-len(self.job.source) // self.job.settings.pack.samples_per_shard)

    @override
    def span(self, number: int) -> tuple[int, int]:
        size = self.job.settings.pack.samples_per_shard
        return number * size, min((number + 1) * size, len(self.job.source))

    @override
    def identity(self, number: int) -> list[Any]:
        source, slices = self.job.source, self.slices(number)
        found = [self.span(number), [source.identity(each) for each in slices]]
        return (
            [*found, list(map(source.captions, slices))] if self.job.settings.annotation.captions else found
        )

    @override
    def prepare(self) -> None:
        # Until all shards fit together again, nobody may take them for a dataset.
        (self.job.shards / INFO_NAME).unlink(missing_ok=True)

    @override
    def work(self, number: int, output: Output) -> None:
        name = f"shard-{number:05d}"
        samples = self._samples(number, output)
        first = next(samples, None)
        entry = None
        if first is not None:
            with ShardWriter(self.job.shards, name) as writer:
                writer.add(*first)
                for sample in samples:
                    writer.add(*sample)
            entry = writer.entry._asdict()
            output.counts["shards"] += 1
            output.files.append(self.job.shards / f"{name}.tar")
            output.files.append(self.job.shards / f"{name}.index.npy")
        with output.file(ENTRY) as file:
            file.write(json.dumps(entry).encode())

    def _samples(self, number: int, output: Output) -> Iterator[tuple[str, bytes, SampleRecord]]:
        """The samples of a piece: every readable image with at least one region."""
        tokenizer = load_tokenizer(self.path(Piece("tokenizer", 0), MODEL))
        confidence = self.job.settings.tokenizer.min_confidence
        for image, found, labels, read in self._rows(number):
            output.tick()
            if not found.width:
                continue
            words = read.above(confidence)
            output.counts["words kept"] += len(words)
            output.counts["words below confidence"] += len(read.words) - len(words)
            texts = [(word, token_set(tokenizer, word.text)) for word in words]
            output.counts["words without token"] += sum(not tokens for _, tokens in texts)
            output.counts["tokens"] += sum(len(tokens) for _, tokens in texts)
            first = [own[0] for own in labels]
            for fate, why in FATE_NAMES.items():
                output.counts[DROPPED + why] += first.count(fate)
            output.counts["images near-duplicate"] += {*first} == {TWIN}
            objects = [_object(r, own) for r, own in zip(found.regions, labels, strict=True) if own[0] >= 0]
            regions = (*objects, *(_text(word, tokens) for word, tokens in texts if tokens))
            if not regions:
                output.counts["images without region"] += 1
                continue
            jpeg = self._jpeg(image, found.checksum)
            if jpeg is None:
                output.bad[image.path] = DAMAGED
                output.counts[DROPPED + "of a damaged image"] += len(objects)
                output.counts["words of damaged images"] += len(regions) - len(objects)
                continue
            output.counts["images packed"] += 1
            output.counts["object regions"] += len(objects)
            output.counts["text regions"] += len(regions) - len(objects)
            caption = self.job.source.caption(image) if self.job.settings.annotation.captions else ""
            output.counts["captions"] += bool(caption)
            yield image.key, jpeg, SampleRecord(found.width, found.height, regions, caption)

    def _jpeg(self, image: ImageFile, told: int | None) -> bytes | None:
        """What is packed of an image, which propose could decode; None if it was damaged since then."""
        with suppress(BadImage):
            picture = self.job.read(image, decode=False)
            if told is None or (picture.jpeg is not None and checksum(picture.jpeg) == told):
                return picture.encode()
        return None

    def _rows(self, number: int) -> Iterator[tuple[ImageFile, ImageRegions, list[list[int]], ImageWords]]:
        """Each image of the piece with what earlier stages say of it, of each region all labels."""
        pieces = self.slices(number)
        labels = (label for piece in pieces for label in self._labels(piece).tolist())
        start, (first, last) = int(self.job.source.starts[pieces.start]), self.span(number)
        # The first slice of images begins before this piece, the last one ends after it.
        rows = islice(read_images(self.job, pieces, labels), first - start, last - start)
        for image, row in zip(self.job.source.between(first, last), rows, strict=True):
            yield image, *row

    def _labels(self, piece: int) -> NDArray[np.int64]:
        """Labels of a slice's regions, nearest first, [r, k]; why not, for those that are not packed."""
        assigned = Piece("assign", piece)
        labels: NDArray[np.int64] = self.job.store.load(assigned, LABELS)
        if self._balanced:
            balance = Piece("balance", 0)
            first, last = self.job.store.load(balance, STARTS)[piece : piece + 2]
            fates = self.job.store.load(balance, FATES, mapped=True)[first:last]
            labels = np.where(fates < 0, fates, labels)
        if self.job.settings.assign.labels_per_region == 1:
            return labels[:, None]
        return np.column_stack([labels, self.job.store.load(assigned, OTHERS)])


def read_images(
    job: Job, slices: range, labels: Iterator[T]
) -> Iterator[tuple[ImageRegions, list[T], ImageWords]]:
    """Each image of some slices, with those of its regions' labels that are its own, and its words."""
    regions = read_regions(job.store.folder(Piece("embed", number)) / REGIONS for number in slices)
    words = read_words(job.store.folder(Piece("ocr", number)) / WORDS for number in slices)
    for found, read in zip(regions, words, strict=True):
        yield found, list(islice(labels, len(found.regions))), read


def _object(region: Proposal, labels: list[int]) -> RegionRecord:
    label, *others = labels
    facts = region.score, "", region.mask, region.source_class, tuple(others)
    return RegionRecord("object", region.box, label, (), *facts)


def _text(word: Word, tokens: tuple[int, ...]) -> RegionRecord:
    return RegionRecord("text", word.box, tokens=tokens, score=word.score, text=word.text)


class Publish(Stage):
    """Writes shards/dataset.json, centers.npy and, if there is text, tokenizer.model."""

    name = "publish"
    reads = ("pack",)
    reads_whole = ("cluster", "tokenizer")
    whole = True

    @override
    def settings(self) -> dict[str, Any]:
        return {}

    @override
    def slices(self, number: int) -> range:
        return range(Pack(self.job).pieces())

    @override
    def work(self, number: int, output: Output) -> None:
        *packed, cluster, tokenizer = self.needs(number)
        entries = [json.loads(self.path(piece, ENTRY).read_bytes()) for piece in packed]
        shards = [ShardEntry(**entry) for entry in entries if entry is not None]
        if not shards:
            raise UserError(
                "no image has a region that can be labelled; loosen --min-edge or --min-objectness"
            )
        self._remove_others({shard.name for shard in shards})
        centers, model = self.path(cluster, CENTERS), self.path(tokenizer, MODEL)
        text = any(shard.texts for shard in shards)
        info = write_dataset(
            self.job.shards,
            shards,
            object_classes=len(np.load(centers, mmap_mode="r", allow_pickle=False)),
            text_classes=load_tokenizer(model).get_piece_size() if text else 0,
            centers=centers,
            tokenizer=model if text else None,
        )
        output.counts["samples"] = info.samples
        for name in (INFO_NAME, CENTERS_NAME, *([TOKENIZER_NAME] if text else [])):
            output.files.append(self.job.shards / name)
        output.tick()

    def _remove_others(self, names: set[str]) -> None:
        """Remove shards that a run with other settings left, and what a killed one had begun."""
        for path in self.job.shards.glob("shard-*"):
            if path.name.split(".")[0] not in names:
                path.unlink()
        for path in self.job.shards.glob(".shard-*.partial"):
            path.unlink()
