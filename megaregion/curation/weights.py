"""Weights of transformers' models in a local folder: loaded, placed, and told apart."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from megaregion.errors import UserError

ENDINGS = (".json", ".safetensors", ".onnx", ".yml", ".yaml", ".txt")
"""Files that make up a model."""


def describe(folder: Path) -> str:
    """A short hash over the model's files, so that other weights count as another setting."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in ENDINGS:
            digest.update(f"{path.relative_to(folder)}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def device() -> torch.device:
    """A GPU if there is one; else the CPU, on one thread: workers are the unit of parallelism."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


def load_model(kind: Any, folder: Path) -> Any:
    """Load a model of a given class for inference, from safetensors alone and without the network.

    Raises:
        UserError: The folder has no such model, or not all of its weights.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder} holds no {kind.__name__} that can be loaded: {reason}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{folder} lacks {len(missing)} weights of {kind.__name__}, {missing[0]} first; "
            "give a folder that save_pretrained wrote"
        )
    return model.eval().to(device())
