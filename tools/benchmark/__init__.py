"""Comparisons in one run on one machine: our parts beside honest peers, or beside stated goals.

A function below ``@part(flags)`` is a part; what parts share is in part, measure, memory, scenes and browser.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def parts() -> Iterator[tuple[str, str, str]]:
    """Name, module and docstring of every part, without importing what it brings with it."""
    for file in Path(__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "part(" in "".join(
                map(ast.unparse, node.decorator_list)
            ):
                yield node.name, file.stem, ast.get_docstring(node) or ""
