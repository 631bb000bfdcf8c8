"""A trained encoder in other people's formats, and theirs as the start of a run.

huggingface           a checkpoint as a folder that transformers loads, and such a folder as a checkpoint
layouts               the formats that it is written in
hub                   the model card that goes with it, from card.md.jinja, and the way to the Hub
folder                a folder that appears complete or not at all, and its weights
modeling_megaregion   the class with region features that is copied beside weights and runs alone
image_processing_megaregion   the image processor that keeps shapes, copied too
parity                how far two encoders' features are apart
"""

from megaregion.export.huggingface import Exported, ExportOptions, export_checkpoint, write_start

__all__ = ["ExportOptions", "Exported", "export_checkpoint", "write_start"]
