"""What was read, and what the text's classes make of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megaregion.curation.stages.records import read_words
from megaregion.curation.stages.stage import Job
from megaregion.curation.stages.store import Piece
from megaregion.curation.stages.text import MODEL, WORDS
from megaregion.data.info import load_tokenizer, token_set

KNOWN_TEXTS = 200_000
"""Distinct texts that are counted at once; beyond twice as many, the rarest are forgotten."""

SHOWN = 20
"""Most frequent texts and tokens that are reported."""

BINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Borders of the confidences that are counted together."""


@dataclass(frozen=True)
class TextQuality:
    """How good the text labels are."""

    words: int
    """Everything that was read, whatever the confidence."""
    kept: int
    """Words above the least confidence."""
    confidence: dict[str, int]
    """Words by confidence: the lower border of the bin, and their number."""
    tokens_per_word: float
    """Mean number of classes of a word that is kept."""
    used_tokens: int
    """Classes that occur."""
    vocabulary: int
    byte_tokens: float
    """Share of the tokens that stand for single bytes: spelling that the vocabulary does not know."""
    texts: list[tuple[str, int]]
    """The most frequent texts."""
    tokens: list[tuple[str, int]]
    """The most frequent tokens."""


def text_quality(job: Job) -> TextQuality:
    """Measure the text of a run whose stages ocr and tokenizer are done."""
    tokenizer = load_tokenizer(job.store.folder(Piece("tokenizer", 0)) / MODEL)
    least = job.settings.tokenizer.min_confidence
    bins = np.zeros(len(BINS) - 1, dtype=np.int64)
    texts: Counter[str] = Counter()
    tokens: Counter[int] = Counter()
    kept = 0
    for number in range(job.source.slices):
        path = job.store.folder(Piece("ocr", number)) / WORDS
        for image in read_words([path]):
            bins += np.histogram([word.score for word in image.words], BINS)[0]
            for word in image.above(least):
                kept += 1
                texts[word.text] += 1
                tokens.update(token_set(tokenizer, word.text))
        if len(texts) > 2 * KNOWN_TEXTS:
            texts = Counter(dict(texts.most_common(KNOWN_TEXTS)))
    total = tokens.total()
    single = sum(count for token, count in tokens.items() if tokenizer.is_byte(token))
    return TextQuality(
        words=int(bins.sum()),
        kept=kept,
        confidence={f"{low:.1f}": int(count) for low, count in zip(BINS, bins, strict=False)},
        tokens_per_word=total / max(1, kept),
        used_tokens=len(tokens),
        vocabulary=tokenizer.get_piece_size(),
        byte_tokens=single / max(1, total),
        texts=texts.most_common(SHOWN),
        tokens=[(tokenizer.id_to_piece(token), count) for token, count in tokens.most_common(SHOWN)],
    )
