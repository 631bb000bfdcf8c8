"""The parts of ``tools/benchmark.py``: one file a part, each with its flags and how it measures.

A part is a module with ``HELP`` (a line), ``DESCRIPTION`` (what the ratios mean), ``add_arguments(parser)``
and ``measure(options, device) -> Report``. What is slow to import is imported inside ``measure``, for every
part is loaded to show the help.
"""

from __future__ import annotations

from benchmark.commands import (
    assign,
    atlas,
    checkpoint,
    convert,
    curation,
    embed,
    guards,
    head,
    kmeans,
    loader,
    model,
    ocr,
    plan,
    step,
)

PARTS = {
    "assign": assign,
    "atlas": atlas,
    "checkpoint": checkpoint,
    "convert": convert,
    "curation": curation,
    "embed": embed,
    "guards": guards,
    "head": head,
    "kmeans": kmeans,
    "loader": loader,
    "model": model,
    "ocr": ocr,
    "plan": plan,
    "step": step,
}
"""Part modules by the name that the command line knows."""
