"""Stages ocr and tokenizer: the words of every image, with all confidences, and the classes of text."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import override

from megaregion.curation.engines import load_reader
from megaregion.curation.engines.tokenizer import DistinctTexts, corpus_identity, read_corpus, train_tokenizer
from megaregion.curation.stages.stage import Stage, describe, plain
from megaregion.curation.stages.store import ImageWords, Output, Piece, read_words, write_words
from megaregion.curation.types import Reader

WORDS = "words.jsonl"


class Ocr(Stage):
    """Writes words.jsonl."""

    name = "ocr"
    version = 2

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.reader
        values = plain(settings, self.job.settings.image)
        if settings.ocr == "paddleocr":
            values["paddle"] = describe(Path(settings.paddle))
        return values

    @override
    def work(self, number: int, output: Output) -> None:
        with output.file(WORDS) as file:
            for image, picture in self.pictures(number, output):
                words = [] if picture is None else self._reader.read(picture.pixels)
                write_words(file, ImageWords(image.key, words))
                output.counts["words found"] += len(words)

    @cached_property
    def _reader(self) -> Reader:
        return load_reader(self.job.settings.reader)


MODEL = "tokenizer.model"


class Tokenizer(Stage):
    """Writes tokenizer.model."""

    name = "tokenizer"
    whole = True

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.tokenizer
        return plain(settings) | {"corpus": corpus_identity(settings.corpus)}

    @override
    def needs(self, number: int) -> list[Piece]:
        return self.every("ocr")

    @override
    def work(self, number: int, output: Output) -> None:
        settings = self.job.settings.tokenizer
        images = read_words([self.path(piece, WORDS) for piece in self.needs(number)])
        texts = DistinctTexts(settings.tokenizer_texts)
        for image in images:
            texts.add(word.text for word in image.above(settings.min_confidence))
        with output.file(MODEL) as file:
            file.write(train_tokenizer(texts.texts(), read_corpus(settings.corpus), settings.vocab))
        output.counts["different words"] = texts.count()
        output.tick()
