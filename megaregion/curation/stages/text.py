"""Stages ocr and tokenizer: the words of every image, with all confidences, and the classes of text.

The classes are a sentencepiece model learned from the recognised words and a corpus. Case stays (EXIT and
exit look different); Unicode is normalised by NFKC. Word starts are a piece of their own, so that a syllable
is one class wherever it stands; :mod:`megaregion.data.info` turns a text into its set of classes.
"""

from __future__ import annotations

import hashlib
import io
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import override

from megaregion.curation.engines import Reader, load_reader
from megaregion.curation.inputs.source import ImageFile
from megaregion.curation.picture import ImageWords, Picture, Pixels, read_words, write_words
from megaregion.curation.stages.stage import ImageStage, Output, Stage, describe, plain
from megaregion.data.info import WORD_START
from megaregion.errors import UserError
from megaregion.files import file_sha256

WORDS, MODEL = "words.jsonl", "tokenizer.model"

OTHER_PIECES = 3 + 256 + 1
"""Unknown, start and end of text, one piece for each byte, and the word start."""
MAX_WORD = 64
"""Characters of a word that are read; longer ones are noise."""
HASHES = 2**64
"""A hash is less than this."""


class Ocr(ImageStage):
    """Writes words.jsonl."""

    name = "ocr"
    version = 3

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
            for image, pixels in self._pixels(number, output):
                words = [] if pixels is None else self._reader.read(pixels)
                write_words(file, ImageWords(image.key, words))
                output.counts["words found"] += len(words)
                output.counts.update(f"words {word.direction}" for word in words if word.direction)

    def _pixels(self, number: int, output: Output) -> Iterator[tuple[ImageFile, Pixels | None]]:
        """Each image of a piece; None where it cannot be used, or nobody reads."""
        if self.job.settings.reader.ocr != "none":
            yield from self.looks(((image, None) for image in self.images(number)), output)
            return
        for image in self.images(number):
            yield image, None
            output.tick()

    @override
    def on_gpu(self) -> bool:
        if self.job.settings.reader.ocr == "none":
            return False
        from megaregion.curation.engines.ocr import offers_gpu

        return offers_gpu()

    @override
    def look(self, image: ImageFile, picture: Picture, wanted: Any) -> Pixels:
        return picture.pixels

    @cached_property
    def _reader(self) -> Reader:
        return load_reader(self.job.settings.reader)


class Tokenizer(Stage):
    """Writes tokenizer.model."""

    name = "tokenizer"
    reads = ("ocr",)
    whole = True

    @override
    def settings(self) -> dict[str, Any]:
        settings = self.job.settings.tokenizer
        return plain(settings) | {"corpus": corpus_identity(settings.corpus)}

    @override
    def work(self, number: int, output: Output) -> None:
        settings = self.job.settings.tokenizer
        images = read_words([self.path(piece, WORDS) for piece in self.needs(number)])
        words = (word.text for image in images for word in image.above(settings.min_confidence))
        texts, output.counts["different words"] = distinct_texts(words, settings.tokenizer_texts)
        with output.file(MODEL) as file:
            file.write(train_tokenizer(texts, read_corpus(settings.corpus), settings.vocab))
        output.tick()


def default_corpus() -> set[str]:
    """The words of Python's own help: as they are, in lower and upper case, and capitalised.

    Without the upper case, signs in capitals would split into single letters.
    """
    from pydoc_data.topics import topics

    words = {word for text in topics.values() for word in re.findall(r"[^\W\d_]{2,}", text)}
    return {form for word in words for form in (word, word.lower(), word.upper(), word.capitalize())}


def read_corpus(path: str) -> set[str]:
    """The distinct words of a text file, or of the default corpus if no path is given.

    Raises UserError where the file cannot be read, is not UTF-8 or holds no text.
    """
    if not path:
        return default_corpus()
    words: set[str] = set()
    try:
        with Path(path).open(encoding="utf-8") as file:
            for line in file:
                words.update(line.split())
    except OSError as error:
        raise UserError(f"--corpus {path} cannot be read ({error.strerror}); name another file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--corpus {path} is not UTF-8 ({error.reason}); convert it first") from None
    if not words:
        raise UserError(f"--corpus {path} holds no text")
    return words


def corpus_identity(path: str) -> str:
    """Hash of a corpus, or the name of the default one; raises as :func:`read_corpus`."""
    try:
        return file_sha256(Path(path)) if path else "default"
    except OSError as error:
        raise UserError(f"--corpus {path} cannot be read ({error.strerror}); name another file") from None


def train_tokenizer(texts: Iterable[str], corpus: Iterable[str], vocabulary: int) -> bytes:
    """The file of a unigram model with exactly so many pieces; the same input gives the same bytes.

    Every distinct word of texts and corpus counts once, so that a sign seen a thousand times is still spelled
    in pieces that it shares with other words. Raises UserError where the text does not yield so many pieces.
    """
    from sentencepiece import SentencePieceTrainer

    words = {word[:MAX_WORD] for text in (*texts, *corpus) for word in text.split()}
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter([*_spelled(words, vocabulary), *string.punctuation, *string.digits]),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocabulary,
            user_defined_symbols=[WORD_START],
            byte_fallback=True,
            # Less would push rare characters such as $ into bytes.
            character_coverage=1.0,
            # One thread and no sampling, so that the same text gives the same model.
            num_threads=1,
            shuffle_input_sentence=False,
            input_sentence_size=0,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1]
        raise UserError(
            f"--vocab {vocabulary} does not fit {len(words)} distinct words (sentencepiece: {reason}); "
            "use another --vocab or a larger --corpus"
        ) from None
    return model.getvalue()


def _spelled(words: set[str], vocabulary: int) -> list[str]:
    """Words in the most frequent characters only; rarer ones are left to the byte pieces.

    Full coverage gives every character a piece. An OCR engine for many scripts misreads textures as rare
    characters, which would take the room of real pieces: a character must occur in two words, and all of
    them together get at most half of the room.
    """
    # sentencepiece takes its word start as a character of the text for a control mark.
    clean = sorted(word.replace(WORD_START, "") for word in words)
    counts = Counter(character for word in clean for character in word)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    spelled = {c for c in ranked[: (vocabulary - OTHER_PIECES) // 2] if counts[c] > 1}
    table = {ord(character): None for character in ranked if character not in spelled}
    return [word for word in (word.translate(table) for word in clean) if word]


def distinct_texts(texts: Iterable[str], limit: int) -> tuple[list[str], int]:
    """Texts with the smallest hashes, which neither order nor repeats change; memory holds twice the limit.

    Gives so many at most, sorted, and how many there were, beyond the limit within a few thousandths.
    """
    hashes: dict[str, int] = {}
    bound = HASHES

    def prune(most: int) -> None:
        nonlocal hashes, bound
        if len(hashes) > most:
            hashes = dict(sorted(hashes.items(), key=lambda item: (item[1], item[0]))[:limit])
            bound = max(hashes.values()) + 1

    for text in texts:
        if text not in hashes and (number := _hash(text)) < bound:
            hashes[text] = number
            prune(2 * limit)
    prune(limit)
    return sorted(hashes), len(hashes) if bound == HASHES else round(limit * HASHES / bound)


def _hash(text: str) -> int:
    content = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
