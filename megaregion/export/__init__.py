"""A trained encoder in other people's formats, and theirs as the start of a run.

One noun a file:

huggingface       a checkpoint as a folder that transformers loads
layouts           the formats that it is written in
mlcd              names, layout and settings of transformers' MLCDVisionModel
llava             those of LLaVA-OneVision-1.5's RICE tower
remote/           the class with region features that is copied beside weights
card              the model card that goes with them
evaluation_table  what was measured of the run, for the card
weight_files      safetensors files written key by key
folder            a folder that appears complete or not at all
encoder_folder    somebody's folder, read under our names
start             what a run begins with, and the starting checkpoint made of it
parity            how far two encoders' features are apart
"""

from megaregion.export.huggingface import Exported, ExportOptions, export_checkpoint
from megaregion.export.start import begin, open_start, write_start

__all__ = ["ExportOptions", "Exported", "begin", "export_checkpoint", "open_start", "write_start"]
