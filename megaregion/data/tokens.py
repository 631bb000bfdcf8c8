"""Text labels: the distinct tokens of a region's text, the same rule for shards and for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megaregion.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

WORD_START = "▁"
"""The piece that sentencepiece puts in front of a word; alone, it says nothing about the text."""


def load_tokenizer(path: Path) -> SentencePieceProcessor:
    """Load a sentencepiece model.

    Raises:
        UserError: The file is missing or is no sentencepiece model.
    """
    from sentencepiece import SentencePieceProcessor

    if not path.is_file():
        raise UserError(f"{path} does not exist; tools/curate.py writes it beside the shards")
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} is no sentencepiece model ({error}); write it anew with tools/curate.py"
        ) from None


def token_set(processor: SentencePieceProcessor, text: str) -> tuple[int, ...]:
    """Tokenize a region's text into the set of classes that are its positives.

    Args:
        processor: The dataset's tokenizer.
        text: What the region reads, one word or several.

    Returns:
        Distinct token ids in order of first appearance, without the bare word-start piece, control
        pieces and the unknown piece; empty for text that has no other token.
    """
    skipped = {processor.piece_to_id(WORD_START)}
    tokens = dict.fromkeys(processor.encode(text))
    return tuple(
        token
        for token in tokens
        if token not in skipped and not processor.is_control(token) and not processor.is_unknown(token)
    )
