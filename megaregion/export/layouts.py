"""The formats that a checkpoint is written in: names, settings and what stands beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaregion.checkpoint.huggingface import PREFIX, REGION, mlcd_tensors
from megaregion.config import DataConfig, ModelConfig, RunConfig
from megaregion.export.llava import llava_config, llava_processor, llava_tensors
from megaregion.export.mlcd import mlcd_config, processor_config

REGION_CODE = Path(__file__).parent / "remote" / "modeling_megaregion.py"
"""The class with ``get_region_features``; a copy goes beside the weights."""


@dataclass(frozen=True)
class Layout:
    """One format."""

    tensors: Callable[[str, Tensor, ModelConfig], Iterator[tuple[str, Tensor]]]
    """Key and value in the format of one parameter of VisionTransformer."""
    settings: Callable[[ModelConfig, torch.dtype], dict[str, Any]]
    """Content of config.json, without regions."""
    processor: Callable[[ModelConfig, DataConfig], dict[str, Any]]
    """Content of preprocessor_config.json."""
    regions: bool
    """Whether it has a place for the region part."""
    usage: str
    """Which section of the card says how to load it."""

    def config(self, run: RunConfig, dtype: torch.dtype, regions: bool, projected: bool) -> dict[str, Any]:
        """Content of config.json.

        Args:
            run: Settings of the run.
            dtype: Type of the weights.
            regions: Whether the region part comes along.
            projected: Whether the projection does.

        Raises:
            UserError: The format cannot hold the model.
        """
        content = self.settings(run.model, dtype)
        if regions:
            content["auto_map"] = {"AutoModel": f"{REGION_CODE.stem}.RegionVisionModel"}
            content["region_layers"] = run.model.region_layers
            content["region_weights"] = run.model.region_weights
            content["patch_coverage"] = run.data.patch_coverage
            content["projection_dim"] = run.head.embedding_dim if projected else None
        return content

    def code(self, regions: bool) -> Mapping[str, str]:
        """Python files that stand beside the weights, by name."""
        return {REGION_CODE.name: REGION_CODE.read_text(encoding="utf-8")} if regions else {}


def _prefixed(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for key, value in mlcd_tensors(name, tensor, config):
        yield (key if key.startswith(REGION) else PREFIX + key), value


LAYOUTS = {
    "mlcd": Layout(_prefixed, mlcd_config, processor_config, True, "transformers"),
    "llava-onevision-1.5": Layout(llava_tensors, llava_config, llava_processor, False, "llava"),
}
"""Formats by the name that the command line knows."""
