"""The project's tracked Python files, parsed."""

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = "proto/gen/"


@dataclass(frozen=True)
class Source:
    path: str
    """Relative to the repository root."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        name = self.path.removesuffix(".py").replace("/", ".")
        return name.removesuffix(".__init__")

    def imports(self) -> Iterator[str]:
        """Full dotted names; `from a.b import c` yields a.b.c, as c may be a module."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = self._package(node)
                yield from (f"{package}.{alias.name}" for alias in node.names)

    def functions(self) -> Iterator[tuple[str, int]]:
        """Names with their length in lines, without decorators."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1

    def _package(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        # One dot means the module's package, which is the module itself for an __init__.
        parts = self.module.split(".")
        up = node.level - 1 if self.path.endswith("__init__.py") else node.level
        base = parts[: len(parts) - up]
        return ".".join([*base, *([node.module] if node.module else [])])


def tracked_sources(*folders: str) -> list[Source]:
    """Python files that git tracks and that still exist, under the given folders or everywhere."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--", *(f"{folder}/*.py" for folder in folders or ("**",))],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    wanted = [name for name in names if name.endswith(".py") and not name.startswith(GENERATED)]
    return [Source(name, (ROOT / name).read_text()) for name in wanted if (ROOT / name).exists()]
