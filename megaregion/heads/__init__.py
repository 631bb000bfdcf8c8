"""Classification heads: margin, sampling, streaming loss, and the class-sharded head that joins them."""

from megaregion.heads.communication import GatheredFeatures, gather_features
from megaregion.heads.sharded import ClassShardedHead, HeadLoss, LocalTensor
from megaregion.heads.targets import NonFiniteFeatures, Targets

__all__ = [
    "ClassShardedHead",
    "GatheredFeatures",
    "HeadLoss",
    "LocalTensor",
    "NonFiniteFeatures",
    "Targets",
    "gather_features",
]
