"""Pages from templates: self-contained HTML, in which everything from outside is escaped."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from megaregion.files import write_text

ENCODERS = ("trained", "untrained", "pixels", "curation")
"""Encoders with a colour of their own; the others share one."""


def render(template: str, **values: Any) -> Markup:
    """Fill a template of templates/.

    Args:
        template: File name without its ending .jinja.
        values: All that the template names.
    """
    return Markup(_templates.get_template(f"{template}.jinja").render(values))


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template and write it; readers see the old page or the new one."""
    write_text(path, render(template, **values))


def data_uri(image: Image.Image, longest: int) -> str:
    """The image inside a URI, shrunk to this longest side: a JPEG, or a PNG if it has transparency."""
    small = image.copy()
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    kind, options = ("png", {}) if image.mode == "RGBA" else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    small.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def encoder_style(encoder: str) -> str:
    """CSS class that colours an encoder."""
    return encoder if encoder in ENCODERS else "other"


def _percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


_templates = Environment(
    loader=PackageLoader("megaregion.evaluation"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {
    "percent": _percent,
    "px": "{:.1f}".format,
    "style": encoder_style,
    "thousands": "{:,}".format,
    "uri": data_uri,
}
