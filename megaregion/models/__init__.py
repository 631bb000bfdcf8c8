"""The encoder as plain modules that know no rank."""

from megaregion.models.initialisation import initialise
from megaregion.models.vit import RegionEncoder, Tokens, VisionTransformer, decays, tensor_parallel_plan

__all__ = ["RegionEncoder", "Tokens", "VisionTransformer", "decays", "initialise", "tensor_parallel_plan"]
