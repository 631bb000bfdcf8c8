"""A trained encoder in other people's formats.

One noun a file:

huggingface   a checkpoint as a folder that transformers loads
mlcd          names, layout and settings of transformers' MLCDVisionModel
card          the model card that goes with it
parity        the exported folder's features against the checkpoint's
"""

from megaregion.export.huggingface import Exported, export_checkpoint

__all__ = ["Exported", "export_checkpoint"]
