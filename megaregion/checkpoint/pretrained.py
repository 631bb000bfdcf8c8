"""Weights that a run begins with instead of drawn ones: our checkpoint, or somebody's HuggingFace folder.

Only the transformer's weights are taken: projection and heads belong to the classes of one dataset. The image
size is free, for rotary positions have no table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaregion.checkpoint.format import BODY
from megaregion.checkpoint.huggingface import EncoderFolder, is_encoder_folder
from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint, open_checkpoint, run_config
from megaregion.config import DataConfig, ModelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.models import VisionTransformer

FUNCTION = ("patch_size", "width", "depth", "heads", "mlp_width", "activation", "norm_eps", "rope_theta")
"""Settings that weights only make sense with."""


@dataclass(frozen=True)
class Pretrained:
    """Weights to begin with."""

    source: EncoderFolder | CheckpointReader
    model: ModelConfig
    """Settings of the transformer that they belong to."""
    data: DataConfig
    """Mean and deviation of the images it saw."""
    notices: tuple[str, ...] = ()
    """What a user should know of them, a line each."""

    def read(self, name: str) -> Tensor:
        """One parameter under its name in VisionTransformer, float32.

        Raises:
            UserError: It is missing or damaged.
        """
        if isinstance(self.source, EncoderFolder):
            return self.source.read(name)
        try:
            return self.source.read(f"{BODY}{name}").float()
        except DamagedCheckpoint as error:
            raise UserError(f"{error}; copy the checkpoint again") from error

    @torch.no_grad()
    def fill(self, vit: VisionTransformer) -> None:
        """Put the weights into a transformer, whole on this rank; its image size may be another.

        Region tokens' own weights become copies of the blocks' where there are none yet, as in a new run.

        Raises:
            UserError: The transformer's settings are others.
        """
        theirs, ours = self.model, vit.config
        other = [key for key in FUNCTION if getattr(theirs, key) != getattr(ours, key)]
        if other:
            told = ", ".join(
                f"model.{key} {getattr(theirs, key)} and not {getattr(ours, key)}" for key in other
            )
            raise UserError(
                f"init: the weights in {self.source.folder} need {told}; set them, or add the model.yaml "
                "that tools/convert_checkpoint.py from-hf writes as a last --config"
            )
        for name, parameter in vit.named_parameters():
            parameter.copy_(self.read(self._source_of(name)))

    def advice(self, config: RunConfig) -> list[str]:
        """What a user who begins a run with these weights should know."""
        found = list(self.notices)
        if (self.data.mean, self.data.std) != (config.data.mean, config.data.std):
            found.append(
                f"they saw images normalised by data.mean {list(self.data.mean)} and data.std "
                f"{list(self.data.std)}, this run has others"
            )
        return found

    def _source_of(self, name: str) -> str:
        """Whose values a parameter takes: for a region token's own weights perhaps the block's."""
        if ".region." not in name:
            return name
        block, theirs = int(name.split(".")[1]), self.model
        if theirs.region_weights == "separate" and block >= theirs.depth - theirs.region_layers:
            return name
        return name.replace(".region.", ".")


def open_pretrained(path: Path, verify: bool = True) -> Pretrained:
    """Open a HuggingFace folder, or what :func:`open_checkpoint` opens.

    Raises:
        UserError: It is none of them, or damaged.
    """
    if is_encoder_folder(path):
        folder = EncoderFolder(path)
        return Pretrained(folder, folder.model, folder.data, tuple(folder.notices))
    reader = open_checkpoint(path, verify)
    config = run_config(reader)
    return Pretrained(reader, config.model, config.data)
