"""The house: fifteen packages on nine floors, no circle anywhere, and what plans and renders is
pure."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from imports import (  # noqa: E402
    PACKAGE,
    circles,
    entries,
    floors,
    graph,
    imported,
    module_files,
    name_of,
    package_of,
)

# A package imports only from packages on floors below its own. docs/architecture.md says what lives
# where.
FLOORS = {
    "runtime": 1,
    "base": 2,
    "config": 3,
    "slurm": 3,
    "triage": 3,
    "imports": 4,
    "recipes": 4,
    "data": 4,
    "plan": 5,
    "train": 5,
    "runs": 6,
    "sites": 6,
    "jobs": 7,
    "sandbox": 8,
    "cli": 9,
}
# What may lie beside the packages.
LOOSE = {"__init__.py", "__main__.py", "py.typed"}

# Modules of these packages look at no clock, environment, network or process, and write nothing …
PURE = ("base", "config", "recipes", "plan")
# … but for these.
IMPURE = {
    "base.files",
    "base.terminal",
    "config.new_run",
    "config.trust",
    "plan.check",
    "plan.look.reading",
    "plan.run_dir",
    "plan.template_cache",
}
# Alone in reading the environment: where the user's own files lie.
MAY_READ_ENVIRONMENT = {"base.paths"}
EFFECTS = set(
    "subprocess socket time datetime urllib http ssl asyncio random secrets uuid getpass pwd"
    " platform requests multiprocessing threading tempfile shutil".split()
)
OS_EFFECTS = set(
    "environ environb getenv putenv system popen fork getlogin uname remove unlink rename replace"
    " mkdir makedirs rmdir link symlink chmod execvp execvpe spawnv".split()
)
MODULES = module_files()


def test_beside_the_packages_lies_nothing():
    assert entries(PACKAGE) == set(FLOORS) | LOOSE


def test_unit_tests_lie_in_folders_named_for_the_packages():
    # The golden cases go through all of what plans and renders.
    assert entries(ROOT / "tests/unit") - set(FLOORS) == {"test_golden.py"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_its_own_package_and_from_lower_floors(path):
    package = package_of(name_of(path))
    if package == "__main__":
        return
    wrong = [
        f"{path}:{line}: {name_of(path)} imports {other}, which is not below it"
        for line, other in imported(path)
        if package_of(other) != package and FLOORS[package_of(other)] >= FLOORS.get(package, 0)
    ]

    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(graph()) == []


def test_the_runtime_imports_nothing_of_ours_and_nothing_to_install():
    """It runs on the batch host's own python3, out of the run directory."""
    siblings = {other.stem for other in (PACKAGE / "runtime").glob("*.py")}
    for path in (PACKAGE / "runtime").rglob("*.py"):
        known = sys.stdlib_module_names | siblings
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]

            assert {name.split(".")[0] for name in names} <= known, f"{path}: {names}"


def test_trainers_run_inside_jobs_and_only_the_command_line_reaches_into_them():
    for path in MODULES:
        name = name_of(path)
        others = [other for _, other in imported(path) if package_of(other) == "train"]

        assert not others or package_of(name) in ("train", "cli"), f"{name} imports {others}"


def test_only_the_package_slurm_starts_slurm_commands():
    commands = {"sbatch", "squeue", "sacct", "scancel", "srun", "scontrol", "sinfo"}
    starters = {"run", "Popen", "call", "check_call", "check_output", "execvp", "execvpe", "which"}
    for path in MODULES:
        # A sandbox starts the daemons themselves; the guard cancels successors from inside the job.
        if package_of(name_of(path)) in ("slurm", "sandbox", "runtime"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            of = node.func.value
            if node.func.attr not in starters or not isinstance(of, ast.Name):
                continue
            if of.id not in ("subprocess", "os", "shutil"):
                continue
            words = {word.value for word in ast.walk(node) if isinstance(word, ast.Constant)}

            assert not words & commands, f"{path}:{node.lineno}: {words & commands}"


def effects(path: Path) -> list[tuple[int, str]]:
    """(line, what) of everything in a file that touches more than its arguments."""
    told = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            told += [(node.lineno, name) for name in names if name.split(".")[0] in EFFECTS]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if module.split(".")[0] in EFFECTS:
                told.append((node.lineno, module))
            if module == "os":
                names = [alias.name for alias in node.names]
                told += [(node.lineno, f"os.{name}") for name in names if name in OS_EFFECTS]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os" and node.attr in OS_EFFECTS:
                told.append((node.lineno, f"os.{node.attr}"))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            told += call_effects(node, node.func.id)
    return told


def call_effects(node: ast.Call, function: str) -> list[tuple[int, str]]:
    if function in ("eval", "exec", "__import__", "input", "print"):
        return [(node.lineno, function)]
    if function == "open":
        modes = [str(word.value) for word in node.args[1:2] if isinstance(word, ast.Constant)]
        return [(node.lineno, f"open for {mode}") for mode in modes if set(mode) & set("wax+")]
    return []


@pytest.mark.parametrize(
    "path", [path for path in MODULES if package_of(name_of(path)) in PURE], ids=name_of
)
def test_from_spec_to_render_nothing_touches_clock_environment_network_or_processes(path):
    name = name_of(path)
    allowed = {"os.environ"} if name in MAY_READ_ENVIRONMENT else set()
    told = [(line, what) for line, what in effects(path) if what not in allowed]
    if name in IMPURE:
        assert told, f"{name} is pure now: take it off the list"
        return

    assert told == []


def test_these_tests_can_fail(tmp_path, monkeypatch):
    """A module that breaks each rule is caught."""
    bad = PACKAGE / "base/units.py"
    text = (
        "from hpctrain import cli\nimport hpctrain.plan.render\nimport time, os\n"
        "def f():\n    from ..cli import main\nx = os.environ\n"
    )
    real = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: text if self == bad else real(self, *a, **k)
    )

    assert [other for _, other in imported(bad)] == ["cli", "plan.render", "cli"]
    with pytest.raises(AssertionError, match="units imports cli"):
        test_a_module_imports_only_from_its_own_package_and_from_lower_floors(bad)
    with pytest.raises(AssertionError, match="os.environ"):
        test_from_spec_to_render_nothing_touches_clock_environment_network_or_processes(bad)
    with pytest.raises(AssertionError, match="base.units"):
        test_no_modules_import_each_other_in_a_circle()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}}) == []
    assert floors({"a.x": {"b.y", "a.z"}, "a.z": set(), "b.y": {"c.v"}, "c.v": set()}) == {
        "c": 1,
        "b": 2,
        "a": 3,
    }


HEAVY = (
    "numpy",
    "pandas",
    "torch",
    "submitit",
    "sentencepiece",
    "jinja2",
    "yaml",
    "hpctrain.config.run",
    "hpctrain.plan.render",
)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["render", "--help"],
        ["site", "--help"],
        ["init", "--help"],
        ["completion", "bash"],
        ["shell", "--help"],
        ["check", "--help"],
    ],
)
def test_help_imports_nothing_heavy(words):
    code = (
        f"import sys, atexit; atexit.register(lambda: print([m for m in {HEAVY} if m in"
        f" sys.modules], file=sys.stderr)); from hpctrain.cli import main; main({words})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))

    assert done.returncode == 0 and not loaded


@pytest.mark.parametrize(
    "words",
    [
        ["render", "--dry-run"],
        ["check"],
        ["plan"],
        ["site", "check"],
        ["upload", "--dry-run", "run.yaml", "--site", "lumi", "--to", "/x"],
    ],
)
def test_everyday_verbs_import_no_heavy_package(words, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "name: r\nsite: local\nrecipe: command\ntime: 10m\nrecipe_options: {argv: [hostname]}\n"
    )
    heavy = ("numpy", "pandas", "torch", "submitit", "sentencepiece", "asyncio", "multiprocessing")
    code = (
        f"import sys, atexit; atexit.register(lambda: print([m for m in {heavy} if m in"
        f" sys.modules], file=sys.stderr)); from hpctrain.cli import main; main({words})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_text_made_for_comments_stands_in_comments_only():
    """The filter `comment` only keeps a value on its line: within quotes, `$(…)` in it would
    run."""
    lines = [
        (path.name, number, line)
        for path in sorted((PACKAGE.parent / "templates").rglob("*.j2"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\|\s*comment\b", line)
    ]
    assert (
        lines and [found for found in lines if not re.search(r"#.*\|\s*comment\b", found[2])] == []
    )
