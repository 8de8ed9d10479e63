"""Who wishes which versions: requirements files, and the bounds that a working copy declares."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from hpctrain.sites.doctor.versions import Pin

# Options of pip for one requirement (pip, "Per-requirement options"); those that take a value.
_OPTION = re.compile(r"\s--(?:hash|config-settings?|global-option)[ =]\S+|\s--[a-z-]+(?:=\S+)?")
_INCLUDE = re.compile(r"(?:-r|--requirement|-c|--constraint)[ =]?\s*(?P<path>\S+)\Z")
_EGG = re.compile(r"(?P<url>\S+://\S+)#(?:\S*&)?egg=(?P<name>[A-Za-z0-9._-]+)")


@dataclass(frozen=True)
class Checkout:
    """What a working copy declares: versions of Python, pins, and lines that could not be read."""

    python: str = ""
    python_source: str = ""
    pins: list[Pin] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


def read_requirements(path: str, _open: tuple[str, ...] = ()) -> tuple[list[Pin], list[str]]:
    """The pins of a requirements file and of those it includes, and what names no package.

    Raises OSError when the file itself cannot be read.
    """
    pins: list[Pin] = []
    other: list[str] = []
    inside = (*_open, os.path.realpath(path))
    for number, line in _lines(path):
        where = f"{path}:{number}"
        include = _INCLUDE.match(line)
        if include:
            file = os.path.join(os.path.dirname(path), include["path"])
            if os.path.realpath(file) in inside:
                continue
            try:
                more, rest = read_requirements(os.path.normpath(file), inside)
            except OSError:
                other.append(f"{os.path.normpath(file)}, named at {where}, is not there")
                continue
            pins += more
            other += rest
        elif not line.startswith("-"):
            pin = _pin(_OPTION.sub("", line).strip(), where)
            if isinstance(pin, Pin):
                pins.append(pin)
            else:
                other.append(f"{where} {pin}")
    return pins, other


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each line, comments left out and continued lines put together."""
    with open(path, encoding="utf-8", errors="replace") as file:
        number, text = 0, ""
        for index, line in enumerate(file, 1):
            number = number or index
            text += line.rstrip("\r\n")
            if text.endswith("\\"):
                text = text[:-1]
                continue
            plain = re.sub(r"(^|\s)#.*", "", text).strip()
            if plain:
                yield number, plain
            number, text = 0, ""


def _pin(text: str, where: str) -> Pin | str:
    """The pin of one requirement, or why there is none."""
    egg = _EGG.match(text)
    if egg:
        return Pin(egg["name"], "", where, url=egg["url"])
    try:
        wish = Requirement(text)
    except InvalidRequirement:
        return "names no package" if "://" in text else "is no requirement"
    marker = str(wish.marker or "")
    versions = str(wish.specifier)
    return Pin(
        wish.name, versions, where, marker=marker, extras=tuple(wish.extras), url=wish.url or ""
    )


def read_checkout(folder: str, files: Sequence[str], names: Collection[str]) -> Checkout:
    """The bounds that a working copy sets for the packages `names`; nothing where it has none of
    the files.

    The recipe says which packages it needs; the working copy only bounds them.
    """
    used = {canonicalize_name(name) for name in names}
    out = Checkout()
    for name in files:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        if name.endswith(".toml"):
            python, pins = _pyproject(path)
            out = replace(
                out,
                python=python or out.python,
                python_source=path if python else out.python_source,
            )
        else:
            pins, other = read_requirements(path)
            out.other.extend(other)
        mine = [pin for pin in pins if canonicalize_name(pin.package) in used]
        out.pins.extend(replace(pin, required=False) for pin in mine)
    return out


def _pyproject(path: str) -> tuple[str, list[Pin]]:
    """(requires-python, dependencies) of a pyproject.toml, empty where it declares none that can be
    read."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            loaded: dict[str, Any] = tomllib.load(file)
    except (OSError, ValueError):
        return "", []
    project = loaded.get("project")
    if not isinstance(project, dict):
        return "", []
    wanted, texts = project.get("requires-python"), project.get("dependencies")
    pins = (
        [_pin(text, path) for text in texts if isinstance(text, str)]
        if isinstance(texts, list)
        else []
    )
    python = wanted if isinstance(wanted, str) and _valid(wanted) else ""
    return python, [pin for pin in pins if isinstance(pin, Pin)]


def _valid(versions: str) -> bool:
    try:
        SpecifierSet(versions)
    except InvalidSpecifier:
        return False
    return True
