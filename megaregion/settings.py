"""Settings: frozen dataclasses whose fields have a type of bounds.py, a default and a sentence below.

From them follows all that a user meets: the flag and its line in ``--help`` (command_line.py), the key in a
YAML file, the row in configs/README.md, and the refusal of a value that does not fit.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megaregion.bounds import Kind, Misfit, did_you_mean, kind_of, shown
from megaregion.errors import UserError

YAML_BYTES = 100_000
"""Largest YAML file; all settings of a run are 4 kB."""
YAML_BRACKETS = 300
"""Most brackets that a YAML file opens; the time that they take grows with their square."""
YAML_VALUES = 10_000
"""Most values of a YAML file, those counted that its aliases repeat."""

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One setting."""

    key: str
    """With dots, as ``model.width``."""
    kind: Kind
    default: Any
    told: str
    """What it does."""

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True)
class Section:
    """The settings of one dataclass; those of dataclasses in its fields have sections of their own."""

    key: str
    """Empty for the outermost."""
    told: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Listed(Kind):
    """Any number of sections of one class; what is in each is read and judged as a section."""

    item: type
    metavar: str = "YAML"

    @property
    def told(self) -> str:
        """The keys of one."""
        return f"a list of {{{', '.join(_kinds(self.item))}}}"

    def read(self, value: object) -> tuple[object, ...]:
        """A list, or YAML of one."""
        value = parse_yaml(value) if isinstance(value, str) else value
        if isinstance(value, (list, tuple)):
            return tuple(value)
        raise self.misfit(value)


@cache
def _kinds(cls: type) -> dict[str, Kind | None]:
    """What each field of a dataclass holds: values of a kind, or None for a section of its own."""
    found: dict[str, Kind | None] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        inner = typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            found[name] = None
        elif inner and dataclasses.is_dataclass(inner[0]):
            found[name] = Listed(typing.cast(type, inner[0]))
        else:
            found[name] = kind_of(hint)
    return found


def sections(settings: Any, key: str = "") -> Iterator[Section]:
    """Every section, the outermost first, with the values of ``settings`` as defaults."""
    cls: Any = type(settings)
    told, plain, nested = _sentences(cls), [], []
    for name, kind in _kinds(cls).items():
        value, path = getattr(settings, name), _joined(key, name)
        if kind is None:
            nested.append((value, path))
        else:
            plain.append(Setting(path, kind, value, told[name]))
    yield Section(key, " ".join((inspect.getdoc(cls) or "").split()), tuple(plain))
    for value, path in nested:
        yield from sections(value, path)


def _joined(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def flag_name(key: str) -> str:
    """The flag of a setting by its last name, as ``--min-edge``."""
    return f"--{key.rpartition('.')[2].replace('_', '-')}"


def setting_names(settings: Any, key: str = "") -> list[str]:
    """The keys of all sections and settings."""
    found = list(sections(settings, key))
    return [section.key for section in found[1:]] + [one.key for part in found for one in part.settings]


def read_settings(base: T, values: object, key: str = "") -> T:
    """Settings from nested values, as YAML, JSON or flags hold them; bounds are not looked at.

    ``base`` is kept where they say nothing; ``key`` says where it stands in the whole.

    Raises:
        UserError: An unknown key (the nearest known one is named), or a value of another kind.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{key or 'the settings'} must be settings with names, got {shown(values)}")
    cls: Any = type(base)
    kinds, changes = _kinds(cls), {}
    for name, value in values.items():
        path = _joined(key, name)
        if name not in kinds:
            raise unknown(path, setting_names(base, key))
        kind = kinds[name]
        if value is None:
            raise UserError(f"{path} is empty; give it a value, or leave the line out to keep its default")
        if kind is None:
            changes[name] = read_settings(getattr(base, name), value, path)
            continue
        changes[name] = _fitting(path, kind.read, value)
        if isinstance(kind, Listed):
            changes[name] = tuple(
                read_settings(kind.item(), one, f"{path}[{place}]") for place, one in enumerate(changes[name])
            )
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def check(settings: Any, key: str = "", say: Callable[[str], str] = str) -> None:
    """Check that every value of a dataclass is of its kind and within its bounds.

    ``key`` says where it stands in the whole, ``say`` how the user wrote a key, from its name with dots.

    Raises:
        UserError: One is not; the text is ``KEY must lie in BOUNDS, got VALUE``, and the way out.
    """
    cls: Any = type(settings)
    for name, kind in _kinds(cls).items():
        value, path = getattr(settings, name), _joined(key, name)
        if kind is None:
            check(value, path, say)
        elif isinstance(kind, Listed):
            for place, one in enumerate(value):
                check(one, f"{path}[{place}]", say)
        else:
            _fitting(say(path), kind.fit, value)


def _fitting(key: str, judge: Callable[[Any], Any], value: object) -> Any:
    try:
        return judge(value)
    except Misfit as misfit:
        raise UserError(f"{key} {misfit}") from None


GONE = {
    "cluster_method": "k-means is exact at any number of centers, and starts from --first-level cells",
    "refine_passes": "all passes of k-means look at all centers, at most --cluster-iterations of them",
    "assign_probes": "every region gets the nearest of all centers",
}
"""What became of settings that older files and commands may name."""


def unknown(key: str, known: Iterable[str]) -> UserError:
    """What to raise about a key that no setting has."""
    name = key.rpartition(".")[2].replace("-", "_")
    if name in GONE:
        return UserError(f"{key} is no setting any more: {GONE[name]}; leave it out")
    hint = did_you_mean(key, known) or "; --help lists all, and another version of megaregion may know it"
    return UserError(f"unknown setting {key}{hint}")


@cache
def _sentences(cls: type) -> dict[str, str]:
    """The sentence under each field of a dataclass, by the field's name."""
    tree = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(str(below.value.value).split())
        for field, below in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


# YAML.


def read_file(base: T, file: Path) -> T:
    """Settings that are those of a YAML file, and those of ``base`` where it says nothing.

    Raises:
        UserError: As :func:`read_yaml` and :func:`read_settings`; the text names the file.
    """
    values = read_yaml(file)
    try:
        return read_settings(base, values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file, as nested texts; None for what is empty.

    Raises:
        UserError: It cannot be read, is no YAML of named settings, or names one twice.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(YAML_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); name a YAML file of settings") from None
    if len(content) > YAML_BYTES:
        raise UserError(f"{file} is larger than {YAML_BYTES // 1000} kB; name a YAML file of settings")
    try:
        values = parse_yaml(content.decode()) or {}
    except (Misfit, UnicodeDecodeError) as error:
        raise UserError(f"{file} {error}".replace("\n", " ")) from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold settings by name, as configs/demo.yaml does, got {shown(values)}")
    return values


def parse_yaml(text: str) -> Any:
    """Nested dicts and lists of texts; kinds of settings, not YAML, say what is a number.

    Raises:
        Misfit: It is no YAML, names a key twice, or is deep or large beyond all settings.
    """
    if text.count("[") + text.count("{") > YAML_BRACKETS:
        raise Misfit(f"is nested too deep: it opens more than {YAML_BRACKETS} brackets")
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        return None if node is None else _plain(node, iter(range(YAML_VALUES)))
    except yaml.YAMLError as error:
        raise Misfit(f"is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise Misfit("is nested too deep; settings have at most four levels") from None


def _plain(node: yaml.Node, left: Iterator[int]) -> Any:
    """A node as dicts, lists and texts; ``left`` ends where it holds too many values."""
    if next(left, None) is None:
        raise Misfit(f"holds more than {YAML_VALUES} values; do not repeat an alias so often")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, left) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        empty = node.style is None and node.value in ("", "~", "null")
        return None if empty else node.value
    values: dict[str, Any] = {}
    for name, value in node.value:
        key = shown(name.value)
        if key in values:
            raise Misfit(f"gives {key} twice, again in line {name.start_mark.line + 1}; keep one")
        values[key] = _plain(value, left)
    others = values.pop("<<", [])
    for other in others if isinstance(others, list) else [others]:
        if not isinstance(other, dict):
            raise Misfit(f"merges {shown(other)} by <<; give it the alias of a mapping")
        values = {**other, **values}
    return values


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= dotted(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def words(value: object) -> str:
    """A setting's value, a list as on a command line."""
    return " ".join(map(words, value)) if isinstance(value, list) else str(value)


def to_yaml(settings: Any) -> str:
    """All settings as a YAML file."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, tuple) else value

    return str(yaml.safe_dump(plain(dataclasses.asdict(settings)), sort_keys=False))
