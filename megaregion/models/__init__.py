"""The encoder as plain modules that know no rank, and the plan by which their linears may be cut.

One noun a file:

    vit             the encoder, from patches to region embeddings
    rotary          2D rotary angles
    linear          a linear layer, as each kind of device does it fastest
    initialisation  weights as a function of (seed, parameter name)
    plan            which linear is cut by columns and which by rows
    recompute       what the backward pass computes again instead of keeping
    flops           operations counted from sizes alone
"""

from megaregion.models.initialisation import initialise
from megaregion.models.plan import tensor_parallel_plan
from megaregion.models.vit import RegionEncoder, Tokens, VisionTransformer, decays

__all__ = ["RegionEncoder", "Tokens", "VisionTransformer", "decays", "initialise", "tensor_parallel_plan"]
