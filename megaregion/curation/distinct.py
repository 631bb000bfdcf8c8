"""Distinct texts in bounded memory: all of them up to a limit, beyond it an even sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

HASHES = 2**64
"""A hash is less than this."""


class DistinctTexts:
    """Remembers the texts with the smallest hashes: which ones depends neither on order nor on repeats.

    Args:
        limit: Texts that stay in the end; memory holds up to twice as many.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._hashes: dict[str, int] = {}
        self._bound = HASHES

    def add(self, texts: Iterable[str]) -> None:
        """Take texts into account."""
        for text in texts:
            if text in self._hashes:
                continue
            number = _hash(text)
            if number < self._bound:
                self._hashes[text] = number
                if len(self._hashes) > 2 * self._limit:
                    self._prune()

    def texts(self) -> list[str]:
        """The texts, sorted, at most the limit."""
        self._prune()
        return sorted(self._hashes)

    def count(self) -> int:
        """How many distinct texts there were; beyond the limit an estimate within a few thousandths."""
        self._prune()
        return len(self._hashes) if self._bound == HASHES else round(self._limit * HASHES / self._bound)

    def _prune(self) -> None:
        if len(self._hashes) > self._limit:
            kept = sorted(self._hashes.items(), key=lambda item: (item[1], item[0]))[: self._limit]
            self._hashes = dict(kept)
            self._bound = kept[-1][1] + 1


def _hash(text: str) -> int:
    content = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
