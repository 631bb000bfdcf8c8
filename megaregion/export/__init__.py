"""A trained encoder in other people's formats, and theirs as the start of a run.

One noun a file:

huggingface       a checkpoint as a folder that transformers loads
layouts           the formats that it is written in
mlcd              settings of transformers' MLCDVisionModel; names and layout lie in checkpoint/huggingface.py
llava             those of LLaVA-OneVision-1.5's RICE tower
remote/           the class with region features that is copied beside weights
card              the model card that goes with them, and what was measured of the run
weight_files      safetensors files written key by key
folder            a folder that appears complete or not at all
start             somebody's folder as a checkpoint that a run begins with
parity            how far two encoders' features are apart
"""

from megaregion.export.huggingface import Exported, ExportOptions, export_checkpoint
from megaregion.export.start import write_start

__all__ = ["ExportOptions", "Exported", "export_checkpoint", "write_start"]
