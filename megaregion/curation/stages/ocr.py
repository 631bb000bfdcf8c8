"""Stage ocr: the words of every image, with all confidences."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import override

from megaregion.curation.picture import Picture
from megaregion.curation.reader import Reader, load_reader
from megaregion.curation.records import ImageWords, write_words
from megaregion.curation.source import ImageFile
from megaregion.curation.stage import Stage, plain
from megaregion.curation.store import Output

WORDS = "words.jsonl"


class Ocr(Stage):
    """Writes words.jsonl."""

    name = "ocr"

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.reader
        values = plain(settings, self.job.settings.image)
        if settings.ocr == "paddleocr":
            from megaregion.curation.weights import describe

            values["paddle"] = describe(Path(settings.paddle))
        return values

    @override
    def work(self, number: int, output: Output) -> None:
        with output.file(WORDS) as file:

            def read(image: ImageFile, picture: Picture | None) -> None:
                words = [] if picture is None else self._reader.read(picture.pixels)
                write_words(file, ImageWords(image.key, words))
                output.counts["words found"] += len(words)

            self.for_each(number, output, read)

    @cached_property
    def _reader(self) -> Reader:
        return load_reader(self.job.settings.reader)
