"""The house in numbers, counted from the syntax trees of megaregion/ and tools/: `python tests/house.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef

GOALS = {
    "files": 190,
    "lines of Python": 30_000,
    "files that tools/pretrain.py reaches": 60,
    "modules of fewer than 60 lines with one importer": 10,
    "import circles": 0,
    "lines of train_step": 40,
    "lines of the longest function": 60,
    "most parameters of a function": 8,
    "bytes of README.md": 12_288,
    "lines of the longest file": 500,
}
"""The most that each should be; a kernel of triton has as many parameters as it has places in memory."""
CEILINGS = {**GOALS, "lines of Python": 44_198}
"""The most that each may be today, where a goal is still missed: lower it when the house has shrunk."""


@dataclass
class House:
    """Every Python file below megaregion/ and tools/, parsed once."""

    trees: dict[str, ast.Module]
    """Syntax tree by path from the root."""
    lines: dict[str, int]
    """Lines by path."""
    names: dict[str, str] = field(init=False)
    """Path by dotted module name."""

    def __post_init__(self) -> None:
        self.names = {_module(path): path for path in self.trees}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """What each file imports of the house, at its head or inside a function."""
        return {path: set(self._imported(path)) - {path} for path in self.trees}

    def _imported(self, path: str) -> Iterator[str]:
        for node in ast.walk(self.trees[path]):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            yield from (self.names[name] for name in wanted if name in self.names)

    def reached(self, start: str) -> set[str]:
        """Files that are read when ``start`` runs, the packages around each included."""
        seen, waiting = set(), [start]
        while waiting:
            if (path := waiting.pop()) not in seen:
                seen.add(path)
                waiting += [*self.imports[path], *self._packages(path)]
        return seen

    def _packages(self, path: str) -> list[str]:
        parents = [str(parent / "__init__.py") for parent in Path(path).parents]
        return [parent for parent in parents if parent in self.trees]

    def small_with_one_importer(self) -> list[str]:
        """Modules of fewer than 60 lines that only one other file imports."""
        importers = {path: sum(path in found for found in self.imports.values()) for path in self.trees}
        return [
            path
            for path, count in self.lines.items()
            if count < 60 and importers[path] == 1 and not path.endswith("__init__.py")
        ]

    def circles(self) -> int:
        """1 if imports run in a circle, 0 if not."""
        # A package's face hands names on, so it stands above its own modules.
        graph = {path: found for path, found in self.imports.items() if not path.endswith("__init__.py")}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError:
            return 1
        return 0

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Every function with its file."""
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, Function):
                    yield path, node

    def figures(self) -> dict[str, int]:
        """What is counted, under the names of GOALS."""
        functions = list(self.functions())
        step = next(node for _, node in functions if node.name == "train_step")
        return {
            "files": len(self.trees),
            "lines of Python": sum(self.lines.values()),
            "files that tools/pretrain.py reaches": len(self.reached("tools/pretrain.py")),
            "modules of fewer than 60 lines with one importer": len(self.small_with_one_importer()),
            "import circles": self.circles(),
            "lines of train_step": length(step),
            "lines of the longest function": max(length(node) for _, node in functions),
            "most parameters of a function": max(parameters(node) for _, node in functions),
            "bytes of README.md": (ROOT / "README.md").stat().st_size,
            "lines of the longest file": max(self.lines.values()),
        }


def read_house() -> House:
    """Parse every Python file below megaregion/ and tools/."""
    files = [file for room in ("megaregion", "tools") for file in sorted((ROOT / room).rglob("*.py"))]
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in files}
    return House(
        {path: ast.parse(text) for path, text in texts.items()},
        {path: len(text.splitlines()) for path, text in texts.items()},
    )


def length(node: Function) -> int:
    """Lines from the def to the last statement."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def parameters(node: Function) -> int:
    """Parameters of a function, without self and cls; 0 of a kernel of triton."""
    if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
        return 0
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in given)


def _module(path: str) -> str:
    parts = list(Path(path).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "tools" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    house = read_house()
    for name, value in house.figures().items():
        print(f"{name:<50}{value:>8,}   at most {GOALS[name]:,}{'' if value <= GOALS[name] else '   missed'}")
    print("\nsmall with one importer:", *house.small_with_one_importer(), sep="\n  ")
    worst = sorted(house.functions(), key=lambda found: -length(found[1]))[:5]
    print(
        "\nlongest:",
        *(f"  {length(node)} {path}:{node.lineno} {node.name}" for path, node in worst),
        sep="\n",
    )
    most = sorted(house.functions(), key=lambda found: -parameters(found[1]))[:5]
    print(
        "\nmost parameters:", *(f"  {parameters(n)} {path}:{n.lineno} {n.name}" for path, n in most), sep="\n"
    )
    print("\nlongest files:", *sorted(((n, p) for p, n in house.lines.items()), reverse=True)[:5], sep="\n  ")
