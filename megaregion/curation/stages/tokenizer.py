"""Stage tokenizer: the text's classes, from the words that were read with confidence and a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from megaregion.curation.distinct import DistinctTexts
from megaregion.curation.records import read_words
from megaregion.curation.stage import Stage, plain
from megaregion.curation.stages.ocr import WORDS
from megaregion.curation.store import Output, Piece
from megaregion.curation.tokenizer import read_corpus, train_tokenizer
from megaregion.data.info import file_sha256

MODEL = "tokenizer.model"


class Tokenizer(Stage):
    """Writes tokenizer.model."""

    name = "tokenizer"
    whole = True

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.tokenizer
        corpus = file_sha256(Path(settings.corpus)) if settings.corpus else "default"
        return plain(settings) | {"corpus": corpus}

    @override
    def needs(self, number: int) -> list[Piece]:
        return [Piece("ocr", piece) for piece in range(self.slices())]

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
