"""The text classes of a run: its dataset's tokenizer, and how often each token is read in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sentencepiece import SentencePieceProcessor

from megaregion.data.info import TOKENIZER_NAME, load_tokenizer, token_set
from megaregion.data.sample import BadSample, parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError

Tokens = tuple[int, ...]

TOP = 5
"""Tokens that count where a word's are recalled."""
NAMED = 32
"""Most tokens that are named for a word; no word has as many."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the prior of its tokens."""

    processor: SentencePieceProcessor
    prior: Tokens
    """The five tokens that most text regions of the training shards hold."""

    def tokens(self, text: str) -> Tokens:
        """Gold tokens of a text, by curation's own rule."""
        return token_set(self.processor, text)

    def pieces(self, tokens: Tokens) -> list[str]:
        """Tokens as they are spelled."""
        return [str(self.processor.id_to_piece(token)) for token in tokens]


def open_vocabulary(shards: ShardedDataset, trained_on: Mapping[str, Any]) -> Vocabulary | None:
    """Open a dataset's tokenizer and count its tokens; None for a dataset without text.

    Args:
        shards: The dataset.
        trained_on: The dataset's description in the checkpoint's manifest.

    Raises:
        UserError: The tokenizer cannot be read, or is not the one that the run was trained with.
    """
    if shards.info.text_classes == 0:
        return None
    expected = trained_on.get("tokenizer_sha256")
    if expected is not None and expected != shards.info.tokenizer_sha256:
        raise UserError(
            f"{shards.folder / TOKENIZER_NAME} is not the tokenizer that the run was trained with; name the "
            "run's dataset with --dataset"
        )
    processor = load_tokenizer(shards.folder / TOKENIZER_NAME)
    return Vocabulary(processor, frequent_tokens(_text_regions(shards)))


def frequent_tokens(regions: Iterable[Tokens]) -> Tokens:
    """The five tokens that most regions hold, given each one's distinct tokens; ties go to the smaller id."""
    counts = Counter(token for tokens in regions for token in tokens)
    return tuple(sorted(counts, key=lambda token: (-counts[token], token))[:TOP])


def _text_regions(shards: ShardedDataset) -> Iterator[Tokens]:
    for index in range(len(shards)):
        try:
            record = parse_sample(shards.read(index).record)
        except BadSample:
            continue  # Training skips it too.
        for region in record.regions:
            if region.kind == "text":
                yield region.labels
