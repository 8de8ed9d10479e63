"""What a project of this field has beside its code, and that it agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from trove_classifiers import classifiers as trove

from hpctrain import __version__

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def quoted(table):
    """The texts of every list in a table of pyproject.toml (no Python before 3.11 reads TOML by
    itself)."""
    body = PYPROJECT.split(f"[{table}]\n")[1].split("\n[")[0]
    return re.findall(r'"((?:[^"\\]|\\.)*)"', body)


def dependencies():
    """Every requirement that pyproject.toml declares, those of the extras included."""
    base = PYPROJECT.split("\ndependencies = [")[1].split("\n]")[0]
    texts = [*re.findall(r'"([^"]+)"', base), *quoted("project.optional-dependencies")]
    return [wish for wish in map(Requirement, texts) if wish.name != "hpctrain"]


def test_each_dependency_has_a_lower_bound():
    for wish in dependencies():
        if not wish.name.startswith("types-"):
            assert any(one.operator in (">=", "==") for one in wish.specifier), wish


def test_the_citation_names_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"], citation["license"]) == (
        "1.2.0",
        __version__,
        "Apache-2.0",
    )
    assert citation["title"] == "hpctrain" and citation["authors"] and citation["message"]


def test_the_classifiers_are_known_ones_and_name_every_python_that_is_allowed():
    found = [text for text in quoted("project") if " :: " in text]
    assert found and set(found) <= set(trove) and len(set(found)) == len(found)
    assert (
        "Programming Language :: Python :: 3.9" in found
        and 'requires-python = ">=3.9"' in PYPROJECT
    )


@pytest.mark.parametrize(
    "name", ["SECURITY.md", "CONTRIBUTING.md", "LICENSE", "CHANGELOG.md", "hpctrain/py.typed"]
)
def test_the_files_that_people_look_for_are_there(name):
    assert (ROOT / name).is_file()


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (ROOT / "tools").iterdir() if path.suffix == "")
)
def test_every_tool_is_named_for_those_who_work_on_it(name):
    if (ROOT / "tools" / name).is_file() and name != "env":
        assert name in (ROOT / "CONTRIBUTING.md").read_text().split("tools/ ")[1].split("```")[
            0
        ] or (f"tools/{name}" in (ROOT / "CONTRIBUTING.md").read_text())
