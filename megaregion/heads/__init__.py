"""Classification heads: margin, sampling, streaming loss, and the class-sharded head that joins them."""

from megaregion.heads.sampling import Targets
from megaregion.heads.sharded import (
    ClassShardedHead,
    GatheredFeatures,
    HeadLoss,
    LocalTensor,
    NonFiniteFeatures,
)

__all__ = ["ClassShardedHead", "GatheredFeatures", "HeadLoss", "LocalTensor", "NonFiniteFeatures", "Targets"]
