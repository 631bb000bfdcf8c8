"""Turn a checkpoint into a folder that other libraries load.

python tools/convert_checkpoint.py to-hf runs/demo exported/demo --check
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megaregion.command_line import run
from megaregion.errors import UserError
from megaregion.export import Exported, export_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TOLERANCE = 1e-4
"""Largest difference of features, as a share of the largest feature, that rounding can explain."""


def main() -> None:
    arguments = _parser().parse_args()
    dtype = DTYPES[arguments.dtype]
    exported = export_checkpoint(arguments.checkpoint, arguments.out, dtype)
    _print_table(exported, arguments.dtype)
    if arguments.check:
        _check(exported, dtype)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Turn a checkpoint into a folder that other libraries load.")
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    to_hf = formats.add_parser(
        "to-hf",
        help="a HuggingFace folder for AutoModel and AutoImageProcessor",
        description="Write the encoder of a checkpoint as a HuggingFace folder (MLCDVisionModel).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    to_hf.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a run's folder, its checkpoints folder or one step-... folder",
    )
    to_hf.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be absent or empty")
    to_hf.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="type of the written weights")
    to_hf.add_argument(
        "--check", action="store_true", help="load OUT with transformers and compare its features with ours"
    )
    return parser


def _print_table(exported: Exported, dtype: str) -> None:
    model = exported.model
    rows = {
        "checkpoint": exported.checkpoint,
        "step": f"{exported.step:,}",
        "model": f"{model.depth} blocks, width {model.width}, {model.heads} heads, {model.activation}",
        "parameters": f"{exported.parameters:,}",
        "image": f"{model.image_size} px, patch {model.patch_size} px",
        "weights": f"{exported.size / 2**20:.1f} MiB, {dtype}",
        "written to": exported.folder,
    }
    for name, value in rows.items():
        print(f"{name:<12}{value}")


def _check(exported: Exported, dtype: torch.dtype) -> None:
    from megaregion.export.parity import feature_difference

    difference = feature_difference(exported.checkpoint, exported.folder, dtype)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{exported.folder} gives features that differ from the checkpoint's by {difference:.1e} of the "
            f"largest, more than {TOLERANCE:.0e}; do not use it, and compare the installed transformers with "
            "requirements.txt"
        )
    print(f"{'checked':<12}features equal the checkpoint's to {difference:.1e} of the largest")


if __name__ == "__main__":
    run(main)
