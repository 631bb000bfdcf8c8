"""Measure an encoder on scenes and annotated images, beside honest baselines, and show the result.

The names below are the harness for other people's encoders; README.md has an example.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaregion.evaluation.annotated import Annotated, read_annotated
    from megaregion.evaluation.encoders import BoxedImage, EncodesRegions, Features, load_huggingface
    from megaregion.evaluation.harness import mteb_model, score_regions

__all__ = [
    "Annotated", "BoxedImage", "EncodesRegions", "Features", "load_huggingface", "mteb_model",
    "read_annotated", "score_regions",
]  # fmt: skip
_ROOMS = {
    "annotated": ("Annotated", "read_annotated"),
    "encoders": ("BoxedImage", "EncodesRegions", "Features", "load_huggingface"),
    "harness": ("mteb_model", "score_regions"),
}


def __getattr__(name: str) -> Any:
    # Not at the start: what training starts beside itself lowers its priority before torch is imported.
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
