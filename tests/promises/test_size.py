"""What `tools/size` measures stays where it has come to, and it measures what it says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "size"


@pytest.fixture(scope="module")
def size():
    """tools/size as a module."""
    loader = SourceFileLoader("size", str(TOOL))
    spec = importlib.util.spec_from_loader("size", loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["size"] = module
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures(size):
    return size.measure()


def test_a_figure_that_was_reached_stays_reached(figures):
    lost = [figure for figure in figures if figure.held and figure.value > figure.wanted]

    assert [(figure.name, figure.value, figure.places) for figure in lost] == []


MODULE = """\
import typing

def plain(a: typing.Any, b: "dict[str, Any]") -> Any:
    x = 1 if a else 2 if b else 3  # fmt: skip
    return x if a else 1

def told():
    "A docstring."
    see = "https://example.org/{}"

class Public:
    def method(self, a: Any = None): ...
    def _own(self): ...

class _Private:
    def method(self): ...

def _long():
{}
""".format("x" * 100, "    pass\n" * 60)


def test_each_figure_counts_what_it_names(size, tmp_path, monkeypatch):
    monkeypatch.setattr(size, "ROOT", tmp_path)
    (tmp_path / "m.py").write_text(MODULE + f"WIDE = '{'x' * 100}'\n")
    source = size.Source(tmp_path / "m.py")

    assert source.skips() == ["m.py:4"] == source.nested_conditionals()
    assert [place.split()[0] for place in source.long_lines()] == [f"m.py:{len(source.lines)}"]
    assert source.long_functions() == ["m.py:18 _long"]
    assert source.public_functions() == [
        ("m.py:3 plain", False),
        ("m.py:7 told", True),
        ("m.py:12 method", False),
    ]
    assert source.anys() == ["m.py:3", "m.py:3", "m.py:3", "m.py:12"]


def test_complexity_is_found(size, tmp_path, monkeypatch):
    monkeypatch.setattr(size, "ROOT", tmp_path)
    monkeypatch.setattr(size.imports, "PACKAGE", tmp_path)
    branches = "".join(f"    if x == {number}:\n        return {number}\n" for number in range(11))
    (tmp_path / "m.py").write_text(f"def simple(x):\n    return x\n\ndef winding(x):\n{branches}")

    (place,) = size.complex_functions()
    assert place.startswith("m.py:4 ") and "winding" in place


def test_something_loose_beside_the_packages_is_found(size, tmp_path, monkeypatch):
    monkeypatch.setattr(size.imports, "PACKAGE", tmp_path)
    for name in ("__init__.py", "loose.py", "package/__init__.py", "gone/__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    assert size.loose_modules() == ["loose.py"]


def test_the_command_prints_figures_or_the_places_of_one(size, figures, monkeypatch, capsys):
    monkeypatch.setattr(size, "measure", lambda: figures)
    monkeypatch.setattr(sys, "argv", ["size", "--json"])
    assert size.main() == 0
    printed = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["size", "--where", "packages"])
    assert size.main() == 0

    assert printed["loose modules"] == 0 and printed["statements"] > 1000
    assert len(capsys.readouterr().out.splitlines()) == printed["packages"]


def test_the_command_needs_nothing_but_the_checkout(tmp_path):
    done = subprocess.run([TOOL, "--help"], cwd=tmp_path, capture_output=True, check=False)

    assert done.returncode == 0 and done.stderr == b""
