"""What comments, docstrings and pages point at is there: files by path, functions by module."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

from hpctrain.config import run, site

ROOT = Path(__file__).parents[2]
# Not tools/: so are folders of GPT-NeoX and verl called, whose files are pointed at too.
OURS = "hpctrain|tests|docs|examples|site_profiles|templates"
PATH = re.compile(rf"(?<![\w/.<-])(?:{OURS})/[\w/.*-]*[\w*]")
NAME = re.compile(r"`(?:hpctrain\.)?(?:[a-z_]+\.)*([a-z_]+)\.([A-Za-z_]\w*)(?:\(\w*\))?`")
BESIDE = re.compile(r"\b([\w-]+\.(?:md|ya?ml|py|txt)) (?:next to|beside) this file")
ELSEWHERE = re.compile(r"[^\n]*(?:the project's notes|our notes)[^\n]*")
# Of other projects, which have modules of the same name.
FOREIGN = {"open_instruct.finetune", "preprocess_sft.py"}
SHIPPED = {path.name: path for path in (ROOT / "templates").rglob("*.py")}
FILES = {"json", "jsonl", "yaml", "pt"}
FOLDERS = ("hpctrain", "templates", "site_profiles", "tools", "docs")
SOURCES = [
    *(
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file()
        and path.suffix in (".py", ".j2", ".yaml", ".md", "")
        and path.name != "import-scripts.md"  # paths in others' repositories
    ),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]


def names_by_module():
    """Module or package name -> what any module of that name defines, imports or has inside."""
    names = defaultdict(set)
    for path in (ROOT / "hpctrain").rglob("*.py"):
        stem = path.parent.name if path.stem == "__init__" else path.stem
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names[stem].add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names[stem].add(node.id)
            elif isinstance(node, ast.alias):
                names[stem].add(node.asname or node.name)
        inside = path.parent if path.stem == "__init__" else path
        names[inside.parent.name].add(inside.stem)
    return names


NAMES = names_by_module()
# `chain.jobs` is a key of run.yaml and `slurm.always` one of a profile, not names of our modules.
KEYS = {*run.FIELDS, *site.FIELDS}


def gone(text, folder, in_python=True):
    """What a text points at and is not there; modules only where the text is of our code."""
    missing = [path for path in PATH.findall(text) if not any(ROOT.glob(path))]
    missing = [path for path in missing if not (ROOT / f"{path}.py").exists()]
    missing += [name for name in BESIDE.findall(text) if not (folder / name).exists()]
    for module, name in NAME.findall(text) if in_python else ():
        if name == "py":
            there = f"{module}.py" in FOREIGN or module in NAMES or SHIPPED.get(f"{module}.py")
            missing += [] if there else [f"{module}.py"]
        elif module in NAMES and module not in KEYS and name not in NAMES[module] | FILES:
            missing += [] if f"{module}.{name}" in FOREIGN else [f"{module}.{name}"]
    return missing + ELSEWHERE.findall(text)


def prose(path):
    """Docstrings and comments of a Python file; all of any other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    with_docstrings = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, with_docstrings)]
    told = [ast.get_docstring(node) or "" for node in nodes]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join([*told, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_pointed_at_is_there(path):
    assert gone(prose(path), path.parent, path.suffix == ".py") == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("see `hpctrain/runtime/nosuch.py`", ["hpctrain/runtime/nosuch.py"]),
        ("tests/golden/local-*", []),
        ("ask `rules.judge(engine)`", ["rules.judge"]),
        ("ask `judge.judge(engine)`", []),
        ("`hpctrain.triage.judge.nosuch`", ["judge.nosuch"]),
        ("the page is NOSUCH.md next to this file", ["NOSUCH.md"]),
        ("(slurm.md §9 of the project's notes)", ["(slurm.md §9 of the project's notes)"]),
        ("`chain.jobs`, `plan.json`, `nosuch.py`", ["nosuch.py"]),
    ],
)
def test_this_test_can_fail(text, missing):
    assert gone(text, ROOT) == missing
