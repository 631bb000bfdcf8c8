"""Data as scripts: a page opened from a file may not fetch, but it may load a script that brings its data.

A chunk is data/NAME.js and calls ``atlas("NAME", content)``.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


def write_chunk(site: Path, name: str, content: Any) -> None:
    """Write one chunk.

    Args:
        site: The atlas's folder.
        name: As clusters/12.
        content: JSON.

    Raises:
        ValueError: A number is not finite.
    """
    path = site / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    # ASCII alone: whatever a text region reads, the file has no letter that ends a line or a script.
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    path.write_bytes(f"atlas({json.dumps(name)},{text})\n".encode("ascii"))


def packed(values: NDArray[Any]) -> str:
    """An array's bytes, little endian, in base64: half as large as its digits, and read at once."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()
