"""The reference of all settings, written from the dataclasses of config.py and the sentences in them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any, Literal

from megaregion import config
from megaregion.config import RunConfig

HEAD = """# Settings of a run

Written by `python tools/config_reference.py` from `megaregion/config.py`; a test holds the two together.

A run is one set of settings: YAML files merged in order, then flags with dots:

    python tools/pretrain.py --config configs/demo.yaml --optimizer.lr 5e-4 --name try-5e-4

`--print_config` prints all settings of a command line as YAML. An unknown key is refused, and the nearest
known one is named. The files beside this page are examples: `demo.yaml` for two cores, the others for GPUs.
"""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting."""

    key: str
    """With dots, as on the command line."""
    kind: str
    """Its type, or the words it may be."""
    default: str
    told: str
    """What it does."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The settings of one dataclass."""

    key: str
    """Prefix of its settings; empty for the run itself."""
    told: str
    settings: tuple[Setting, ...]


def groups() -> Iterator[Group]:
    """Every group of settings, in the order of RunConfig's fields."""
    yield from _groups(RunConfig, RunConfig(), "")


def page() -> str:
    """The reference as Markdown."""
    parts = [HEAD]
    for group in groups():
        title = f"`{group.key}`" if group.key else "The run itself"
        rows = "\n".join(
            f"| `{setting.key}` | {_cell(setting.kind)} | {_cell(setting.default)} | {_cell(setting.told)} |"
            for setting in group.settings
        )
        table = f"| setting | type | default | effect |\n|---|---|---|---|\n{rows}"
        parts.append(f"## {title}\n\n{group.told}\n\n{table}\n")
    return "\n".join(parts)


def sentences(kind: type) -> dict[str, str]:
    """The sentence under each field of a dataclass, by the field's name."""
    tree = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def _groups(kind: type, values: Any, prefix: str) -> Iterator[Group]:
    told, types = sentences(kind), typing.get_type_hints(kind, vars(config))
    plain, nested = [], []
    for field in dataclasses.fields(kind):
        key, value = f"{prefix}{field.name}", getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((type(value), value, f"{key}."))
        else:
            plain.append(Setting(key, _kind(types[field.name]), _written(value), told[field.name]))
    summary = " ".join((inspect.getdoc(kind) or "").split())
    yield Group(prefix.removesuffix("."), summary, tuple(plain))
    for each in nested:
        yield from _groups(*each)


def _kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f"`{word}`" for word in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        parts = typing.get_args(annotation)
        if dataclasses.is_dataclass(parts[0]):
            return f"list of {{{', '.join(item.name for item in dataclasses.fields(parts[0]))}}}"
        return f"{len(parts)} {_kind(parts[0])}s"
    return {int: "integer", float: "number", bool: "true or false", str: "text"}.get(
        annotation, str(annotation)
    )


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(f'{item:g}' if item != round(item, 6) else str(item) for item in value)}]`"
    return f"`{value}`" if value != "" else "empty"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
