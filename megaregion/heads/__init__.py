"""Classification heads: margin, sampling, streaming loss, and the class-sharded head that joins them."""

from megaregion.heads.communication import GatheredFeatures, gather_features
from megaregion.heads.finite import NonFiniteFeatures
from megaregion.heads.head_loss import HeadLoss
from megaregion.heads.sharded import ClassShardedHead, LocalTensor
from megaregion.heads.targets import Targets

__all__ = [
    "ClassShardedHead",
    "GatheredFeatures",
    "HeadLoss",
    "LocalTensor",
    "NonFiniteFeatures",
    "Targets",
    "gather_features",
]
