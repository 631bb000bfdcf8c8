"""The part of the network that is trained with the heads: transformer, last norm, projection.

Shapes: B images of H x W pixels, P patches, N regions an image, D width, E embedding width.
"""

from __future__ import annotations

from torch import Tensor, nn

from megaregion.config import ModelConfig
from megaregion.models.vit import VisionTransformer


class RegionEncoder(nn.Module):
    """One embedding for each region of each image; the transformer alone is what gets exported."""

    def __init__(self, config: ModelConfig, embedding_dim: int) -> None:
        super().__init__()
        self.vit = VisionTransformer(config)
        self.projection = nn.Linear(config.width, embedding_dim, bias=False)

    def forward(
        self, images: Tensor, visible: Tensor, grids: tuple[tuple[int, int], ...] | None = None
    ) -> Tensor:
        """Embed regions.

        Args:
            images: Normalised images, [B, 3, H, W].
            visible: True where a region covers a patch, [B, N, P].
            grids: Rows and columns of each image's patches where images share one sequence; images are
                then the S patches of all, [S, 3, p, p], and visible is [N, S].

        Returns:
            Region embeddings, not normalised, [B, N, E].
        """
        tokens = self.vit(images, visible, regions_only=True, grids=grids)
        embeddings: Tensor = self.projection(self.vit.pool(tokens.regions))
        return embeddings


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: on matrices, not on biases, norms and single tokens."""
    return parameter.dim() >= 2 and not name.endswith("class_pos_emb")
