"""Where tokens lie between the linears of the blocks; the model itself knows no rank.

Shapes: B images, T tokens of each (image tokens or region tokens), D width.
"""

from __future__ import annotations

from torch import Tensor


class Stream:
    """Tokens whole, as one process has them.

    Sequence parallelism puts another in its place, under which what lies between the linears (norms, sums)
    sees only this rank's part of the tokens, [rows, D], and the linears take and give such parts. A part may
    end in rows that pad it.
    """

    def cut(self, tokens: Tensor) -> Tensor:
        """This rank's part of tokens that every rank has whole, [B, T, D]."""
        return tokens

    def join(self, part: Tensor, images: int, tokens: int) -> Tensor:
        """All ranks' parts as [B, T, D], for computations that every rank repeats.

        Args:
            part: This rank's part.
            images: B.
            tokens: T.
        """
        return part
