"""The encoder as plain modules that know no rank, and the plan by which their linears may be cut.

One noun a file:

    vit             VisionTransformer: image tokens, and region tokens that ride along
    block           one pre-norm block
    attention       queries, keys and values; image attention and region attention
    rotary          2D rotary angles
    encoder         RegionEncoder: the transformer with the projection that the heads read
    initialisation  weights as a function of (seed, parameter name)
    plan            which linear is cut by columns and which by rows
"""

from megaregion.models.encoder import RegionEncoder, decays
from megaregion.models.initialisation import initialise
from megaregion.models.plan import tensor_parallel_plan
from megaregion.models.vit import Tokens, VisionTransformer

__all__ = ["RegionEncoder", "Tokens", "VisionTransformer", "decays", "initialise", "tensor_parallel_plan"]
