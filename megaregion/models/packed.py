"""Attention among the images of one sequence: each reads its own tokens, and nothing is padded.

Shapes: S tokens of all images, I images, H heads, N queries of a region call, d head width.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: tuple[int, ...]
) -> Tensor:
    """Let every image's queries read that image's tokens.

    On a GPU in half precision one kernel takes all images (flash attention over their boundaries); elsewhere
    each image is a call of its own, which costs no operation that a mask would throw away.

    Args:
        query: Queries of the image tokens, [1, H, S, d]; with a mask those of regions, [I, H, N, d].
        key: Keys, [1, H, S, d].
        value: Values, [1, H, S, d].
        mask: What each region sees, [1, 1, N, S], 0 or -inf; None for image tokens.
        lengths: Tokens of each image, in their order in the sequence.

    Returns:
        What was read, in the shape of the queries.
    """
    if mask is None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _by_boundaries(query, key, value, lengths)
    keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    if mask is None:
        own = zip(query.split(lengths, dim=2), keys, values, strict=True)
        return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in own], dim=2)
    parts = zip(query.split(1), keys, values, mask.split(lengths, dim=3), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=m) for q, k, v, m in parts])


def _by_boundaries(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(query.device, non_blocking=True)
    # The kernel wants [S, H, d].
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    read = varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths))
    assert isinstance(read, Tensor)
    return read.transpose(0, 1)[None]
