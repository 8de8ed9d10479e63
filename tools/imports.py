"""Which module of hpctrain imports which, read from the source; for tests/promises/test_layers.py
and tools/size."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hpctrain"
SHIPPED = "_shipped"  # made by a build: templates and site profiles inside the wheel


def module_files() -> list[Path]:
    """Every module of hpctrain."""
    return sorted(path for path in PACKAGE.rglob("*.py") if SHIPPED not in path.parts)


def entries(folder: Path) -> set[str]:
    """The files of a folder, and its folders that hold any; what Python compiled and builds made is
    left out."""
    names = set()
    for path in folder.iterdir():
        files = [path] if path.is_file() else path.rglob("*")
        if path.name != SHIPPED and any(one.is_file() and one.suffix != ".pyc" for one in files):
            names.add(path.name)
    return names


def name_of(path: Path) -> str:
    """The module's dotted name without `hpctrain.`; that of hpctrain itself is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(name: str) -> str:
    """The package of a module with this dotted name."""
    return name.split(".")[0]


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, our module without `hpctrain.`) of every import anywhere in a file, inside functions
    too.

    Names of `hpctrain/__init__.py` itself are left out.
    """
    modules = []
    package = ["hpctrain", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            modules += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                start = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{start}.{alias.name}"
                modules.append((node.lineno, full if _is_module(full) else start))
    ours = [(line, name) for line, name in modules if package_of(name) == "hpctrain"]
    return [(line, name[len("hpctrain.") :]) for line, name in ours if name != "hpctrain"]


def graph() -> dict[str, set[str]]:
    """By module, the modules that it imports."""
    return {name_of(path): {other for _, other in imported(path)} for path in module_files()}


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_names: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        open_names.append(name)
        for other in sorted(imports.get(name, ())):
            if other not in order:
                visit(other)
            if other in open_names:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            group = open_names[open_names.index(name) :]
            del open_names[-len(group) :]
            if len(group) > 1 or name in imports.get(name, ()):
                groups.append(sorted(group))

    for name in imports:
        if name not in order:
            visit(name)
    return groups


def floors(imports: Mapping[str, set[str]]) -> dict[str, int]:
    """By package, its floor: 1 for one that imports no other, else one above the highest of those
    it imports.

    Packages in a circle lie where they are first met: ask `circles` first.
    """
    below: dict[str, set[str]] = {}
    for name, others in imports.items():
        package = package_of(name)
        below.setdefault(package, set()).update(map(package_of, others))
    floor: dict[str, int] = {}

    def visit(package: str) -> int:
        if package not in floor:
            floor[package] = 1
            highest = max(map(visit, below.get(package, set()) - {package}), default=0)
            floor[package] = highest + 1
        return floor[package]

    for package in below:
        visit(package)
    return floor


def _is_module(full: str) -> bool:
    path = PACKAGE.parent.joinpath(*full.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
