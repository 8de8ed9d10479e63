"""The layers of hpctrain: a module imports only from lines above its own, and what plans and renders is pure."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hpctrain"

# Lowest first. A package is one line (inside it, modules import each other freely), unless a part of it has its own.
LAYERS = [
    # -- the base
    "base.errors", "base.units", "runtime", "jobs", "runs", "slurm", "config", "base", "base.paths", "config.document", "config.fields", "config.text", "base.shell",
    # -- pure: what a run is, and what it becomes
    "config.sbatch", "config.site", "config.run", "config.recipe", "config.pipeline", "config.trainers.sft", "config.trainers.dpo", "config.trainers.trl", "config.billing", "config.container", "recipes", "plan", "plan.make", "plan.render", "plan.load",
    # -- effects: files, Slurm, this machine
    "base.terminal", "base.files", "plan.template_cache", "plan.run_dir", "slurm.commands", "slurm.facts", "slurm.jobs", "runs.records", "plan.check", "jobs.checkpoints", "jobs.bad_nodes", "jobs.side", "jobs.ledger",
    "jobs.chain", "triage", "runs.starts", "runs.daemons", "runs.diagnose", "runs.diagnosis", "runs.status", "runs.logs", "runs.status_table", "runs.cost", "runs.bills", "runs.report", "sites.doctor", "sites", "jobs.ladder", "jobs.pipeline", "data", "sandbox", "sandbox.rehearse", "train",
    # -- what single verbs need
    "config.new_run", "sites.show", "sites.draft", "config.recipe_show", "plan.overrides", "config.json_schema", "sites.shell", "sites.upload", "jobs.neox_export",
    # -- the command line
    "cli", "__main__",
]  # fmt: skip
PURE = LAYERS[: LAYERS.index("plan.load") + 1]
# Alone in reading the environment: where the user's own files lie.
MAY_READ_ENVIRONMENT = {"base.paths"}
EFFECTS = {
    "subprocess", "socket", "time", "datetime", "urllib", "http", "ssl", "asyncio", "random", "secrets", "uuid", "getpass", "pwd", "platform",
    "requests", "multiprocessing", "threading", "tempfile", "shutil",
}  # fmt: skip
OS_EFFECTS = {"environ", "environb", "getenv", "putenv", "system", "popen", "fork", "getlogin", "uname", "remove", "unlink", "rename", "replace",
              "mkdir", "makedirs", "rmdir", "link", "symlink", "chmod", "execvp", "execvpe", "spawnv"}  # fmt: skip
# runtime/ runs on the batch host's own python3, so it does as it must there; it imports nothing of ours.
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_shipped" not in path.parts)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(name: str) -> str | None:
    """The line of the table that a module belongs to: the longest that is it or a package around it."""
    fitting = [layer for layer in LAYERS if name == layer or name.startswith(layer + ".")]
    return max(fitting, key=len) if fitting else None


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, our module without `hpctrain.`) of every import anywhere in a file; names of the package itself left out."""
    found = []
    package = ["hpctrain", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module or ""
            )
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append((node.lineno, full if is_module(full) else base))
    ours = [(line, name) for line, name in found if name.split(".")[0] == "hpctrain"]
    return [(line, name[len("hpctrain.") :]) for line, name in ours if name != "hpctrain"]


def is_module(full: str) -> bool:
    path = PACKAGE.parent.joinpath(*full.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_lower_layers(path):
    name = name_of(path)
    if not name:
        assert imported(path) == []
        return
    layer = layer_of(name)
    assert layer, f"put `{name.split('.')[0]}` into the table of {__file__}, above everything that imports it"
    wrong = []
    for line, other in imported(path):
        below = layer_of(other)
        assert below, f"{path}:{line}: `{other}` is not in the table"
        if below != layer and LAYERS.index(below) > LAYERS.index(layer):
            wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {name} imports {other}, which is above it")

    assert wrong == []


def test_the_runtime_imports_nothing_of_ours_and_nothing_to_install():
    for path in (PACKAGE / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            siblings = {other.stem for other in (PACKAGE / "runtime").glob("*.py")}

            # What measures the nodes uses the collectives that it finds there, if any.
            found = {"mpi4py", "torch"} if path.name == "preflight.py" else set()
            assert all(name.split(".")[0] in sys.stdlib_module_names | siblings | found for name in names), (
                f"{path}: {names}"
            )


def test_trainers_run_inside_jobs_and_only_the_command_line_reaches_into_them():
    for path in MODULES:
        name = name_of(path)
        others = [other for _, other in imported(path) if layer_of(other) == "train"]

        assert not others or layer_of(name) in ("train", "cli"), f"{name} imports {others}"


def test_only_slurm_py_starts_slurm_commands():
    commands = {"sbatch", "squeue", "sacct", "scancel", "srun", "scontrol", "sinfo"}
    starters = {"run", "Popen", "call", "check_call", "check_output", "execvp", "execvpe", "which"}
    for path in MODULES:
        if layer_of(name_of(path)) in ("slurm.commands", "sandbox", "runtime"):
            continue  # a sandbox starts the daemons themselves; the guard cancels successors from inside the job
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                not isinstance(node, ast.Call)
                or not isinstance(node.func, ast.Attribute)
                or node.func.attr not in starters
            ):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id in ("subprocess", "os", "shutil")):
                continue
            words = {word.value for word in ast.walk(node) if isinstance(word, ast.Constant)}

            assert not words & commands, f"{path}:{node.lineno}: {words & commands}"


@pytest.mark.parametrize("path", [p for p in MODULES if layer_of(name_of(p)) in set(PURE) - {"runtime"}], ids=name_of)
def test_from_spec_to_render_nothing_touches_clock_environment_network_or_processes(path):
    name, wrong = name_of(path), []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wrong += [(node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in EFFECTS]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            wrong += [(node.lineno, node.module)] if (node.module or "").split(".")[0] in EFFECTS else []
            wrong += [
                (node.lineno, f"os.{alias.name}")
                for alias in node.names
                if node.module == "os" and alias.name in OS_EFFECTS
            ]
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            and node.attr in OS_EFFECTS
        ):
            wrong += (
                [] if name in MAY_READ_ENVIRONMENT and node.attr == "environ" else [(node.lineno, f"os.{node.attr}")]
            )
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("eval", "exec", "__import__", "input", "print")
        ):
            wrong.append((node.lineno, node.func.id))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            modes = [word.value for word in node.args[1:2] if isinstance(word, ast.Constant)]
            wrong += [(node.lineno, f"open for {mode}") for mode in modes if set(str(mode)) & set("wax+")]

    assert wrong == []


def test_this_test_can_fail(tmp_path, monkeypatch):
    """A module that breaks each rule is caught."""
    bad = PACKAGE / "base/units.py"
    text = "from hpctrain import cli\nimport hpctrain.plan.render\nimport time, os\nfrom ..cli import main\nx = os.environ\n"
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: text if self == bad else real(self, *a, **k))

    assert [other for _, other in imported(bad)] == ["cli", "plan.render", "cli"]
    with pytest.raises(AssertionError, match="units imports cli"):
        test_a_module_imports_only_from_lower_layers(bad)
    with pytest.raises(AssertionError, match="os.environ"):
        test_from_spec_to_render_nothing_touches_clock_environment_network_or_processes(bad)


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


@pytest.mark.parametrize("words, allowed", [
    (["--help"], ()), (["--version"], ()), (["render", "--help"], ()),
    (["site", "--help"], ()), (["init", "--help"], ()), (["completion", "bash"], ()), (["shell", "--help"], ()), (["check", "--help"], ()),
])  # fmt: skip
def test_help_imports_nothing_heavy(words, allowed):
    code = f"import sys, atexit; atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)); from hpctrain.cli import main; main({words})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    loaded = set(ast.literal_eval(done.stderr.splitlines()[-1]))

    assert done.returncode == 0 and loaded <= set(allowed), loaded


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
    code = f"import sys, atexit; atexit.register(lambda: print([m for m in {heavy} if m in sys.modules], file=sys.stderr)); from hpctrain.cli import main; main({words})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_text_made_for_comments_stands_in_comments_only():
    """The filter `comment` only keeps a value on its line: within quotes, `$(…)` in it would run."""
    lines = [
        (path.name, number, line)
        for path in sorted((PACKAGE.parent / "templates").rglob("*.j2"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\|\s*comment\b", line)
    ]
    assert lines and [found for found in lines if not re.search(r"#.*\|\s*comment\b", found[2])] == []
