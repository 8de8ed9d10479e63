"""Mutation tests of the core: breaks a line, runs the unit tests of that module, and counts who
notices.

    tools/mutants [--each N] [--seed S] [--workers N] [--list FILE] [MODULE…]

The mutants are cosmic-ray's (operators, comparisons, numbers, booleans, `not`, decorators, loops,
exceptions); of each module `--each` are drawn by the seed. A module is a path such as `plan/shape`,
or a package. The tests of a module are those of its own name, and what the table below names beside
them. Prints a line per module and each survivor with its change; exits 1 when fewer than 90 % are
noticed.

Works in copies under the temporary folder; the working tree stays as it is. Not part of tools/test:
20 mutants of each module take half an hour on two cores.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WANTED = 0.9
TIMEOUT_S = 120
CONFIG, PLAN, JOBS = "tests/unit/config", "tests/unit/plan", "tests/unit/jobs"
LINK = ["tests/unit/runtime/link"]
# Module -> the unit tests that hold it, beside tests/unit/<package>/test_<module>.py.
TESTS: dict[str, list[str]] = {
    "base/shell": [],
    "config/billing": [],
    "config/container": [f"{PLAN}/test_job.py"],
    "config/document": [],
    "config/fields": [],
    "config/recipe": [],
    "config/run": [],
    "config/sbatch": [f"{PLAN}/test_job.py"],
    "config/site": [],
    "config/text": [],
    "config/trainers/dpo": [f"{CONFIG}/test_dpo_config.py"],
    "config/trainers/sft": [f"{CONFIG}/test_sft_config.py"],
    "plan/check": [],
    "plan/job": [],
    "plan/limits": [],
    "plan/load": [f"{PLAN}/test_start_words.py"],
    "plan/make": [f"{PLAN}/test_job.py", f"{PLAN}/test_shape.py", f"{PLAN}/test_start_words.py"],
    "plan/notes": [f"{PLAN}/test_limits.py"],
    "plan/overrides": [],
    "plan/render": ["tests/unit/test_golden.py"],
    "plan/run_dir": [],
    "plan/shape": [],
    "plan/template_lint": [],
    "slurm/commands": [],
    "slurm/facts": ["tests/unit/sites/test_draft.py"],
    "slurm/jobs": [],
    "jobs/bad_nodes": [f"{JOBS}/test_chain.py", "tests/unit/runs/test_starts.py"],
    "jobs/chain": [],
    "jobs/checkpoints": [],
    "jobs/ladder": [],
    "jobs/ledger": [],
    "jobs/pipeline/bills": [f"{JOBS}/test_pipeline.py"],
    "jobs/pipeline/queue": [f"{JOBS}/test_pipeline.py"],
    "jobs/pipeline/stages": [f"{JOBS}/test_pipeline.py"],
    "jobs/side": [f"{JOBS}/test_chain.py"],
    "runtime/layouts": ["tests/unit/runtime/test_layouts.py", *LINK],
    "runtime/link": LINK,
    "runtime/survey": LINK,
}


class Mutant(NamedTuple):
    """One change of a module: what it makes of the file, and on which line."""

    module: str
    line: int
    operator: str
    text: str


class Verdict(NamedTuple):
    mutant: Mutant
    noticed: bool
    took_s: float


def main() -> int:
    args = _arguments()
    modules = [module for module in TESTS if not args.modules or _named(module, args.modules)]
    if not modules:
        sys.exit(f"no such module; there are: {' '.join(TESTS)}")
    began = time.monotonic()
    mutants = [one for module in modules for one in drawn(module, args.each, args.seed)]
    print(f"{len(mutants)} mutants of {len(modules)} modules, seed {args.seed}", flush=True)
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="hpctrain-mutants-") as folder:
        _check_unbroken(modules, Path(folder))
        with _workers(args.workers, folder) as pool:
            for verdict in pool.map(judge, mutants):
                verdicts.append(verdict)
                if not verdict.noticed:
                    print(f"\n{_survivor(verdict.mutant)}", flush=True)
                if not len(verdicts) % 25:
                    took = time.monotonic() - began
                    print(
                        f"{len(verdicts)} of {len(mutants)}, {took:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )
    return report(modules, verdicts, time.monotonic() - began, args.list)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "modules",
        nargs="*",
        metavar="MODULE",
        help="such as plan/shape, or a package such as slurm",
    )
    parser.add_argument(
        "--each", type=int, default=20, help="mutants drawn of each module [20]; 0: all"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the draw [1]")
    parser.add_argument("--workers", type=int, default=2, help="mutants tried at a time [2]")
    parser.add_argument("--list", type=Path, metavar="FILE", help="write every verdict as JSON")
    return parser.parse_args()


def _named(module: str, wanted: Sequence[str]) -> bool:
    return any(
        module == name.removesuffix(".py") or module.startswith(name.rstrip("/") + "/")
        for name in wanted
    )


def drawn(module: str, count: int, seed: int) -> list[Mutant]:
    """`count` of the module's mutants, the same for the same seed and text."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / "hpctrain" / f"{module}.py").read_text(encoding="utf-8")
    changes = list(_changes(source))
    random.Random(f"{seed} {module}").shuffle(changes)
    mutants: list[Mutant] = []
    for name, occurrence, line in changes:
        if count and len(mutants) == count:
            break
        text = mutate_code(source, get_operator(name)(), occurrence)
        if text and text != source and _compiles(text):
            mutants.append(Mutant(module, line, name.rpartition("/")[2], text))
    return mutants


def _changes(source: str) -> Iterator[tuple[str, int, int]]:
    """(operator, which place, line) of everything that cosmic-ray can change and that can
    matter."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    silent = _silent(ast.parse(source))
    nodes = list(ast_nodes(get_ast(source)))
    for name in sorted(operator_names()):
        if _IDLE.search(name):
            continue
        operator = get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, ((line, _), _) in enumerate(places):
            if line not in silent:
                yield name, occurrence, line


# Operators that need arguments; and `==` against `is`, which for small numbers and short texts are
# the same.
_IDLE = re.compile(
    r"/(VariableInserter|VariableReplacer|ReplaceComparisonOperator_(.*_Is(Not)?|Is(Not)?_.*Eq))$"
)


def _silent(tree: ast.Module) -> set[int]:
    """Lines of which no test can notice a change: annotations (never evaluated) and dataclass
    options."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        annotations: list[Any] = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for part in filter(None, annotations):
            lines |= set(range(part.lineno, part.end_lineno + 1))
        if isinstance(node, ast.ClassDef):
            lines |= {part.lineno for part in node.decorator_list}
    # A line that also holds code that runs is worth trying.
    runs = {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, (ast.Compare, ast.BoolOp, ast.Return, ast.If))
    }
    return lines - runs


def _compiles(text: str) -> bool:
    try:
        compile(text, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def _tests(module: str) -> list[str]:
    package, _, name = module.partition("/")
    own = f"tests/unit/{package}/test_{name.rpartition('/')[2]}.py"
    return [*([own] if (ROOT / own).exists() else []), *TESTS[module]]


def _workers(count: int, folder: str) -> ProcessPoolExecutor:
    # Not a multiprocessing.Pool: its processes may have no children, and some tests have.
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start, (folder,))


_COPY = Path()


def _start(folder: str) -> None:
    """Make this process's own copy of the tree, and load what every test needs and nothing of
    ours."""
    global _COPY
    _COPY = _copied(Path(folder))


def _copied(folder: Path) -> Path:
    copy = folder / f"tree-{os.getpid()}"
    skipped = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", "dist", "build")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skipped)
    os.chdir(copy)
    sys.dont_write_bytecode = True
    os.environ.update(
        PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(copy), HPCTRAIN_NO_USER_CONFIG="1"
    )
    # In front of the installed package, which is the tree that this copy was made of.
    sys.path.insert(0, str(copy))
    import hypothesis  # noqa: F401
    import jinja2  # noqa: F401
    import jsonschema  # noqa: F401
    import pytest  # noqa: F401
    import yaml  # noqa: F401

    return copy


def _check_unbroken(modules: Sequence[str], folder: Path) -> None:
    """End here when the tests do not pass, or are not there, without any mutant."""
    paths = sorted({path for module in modules for path in _tests(module)})
    without = [module for module in modules if not _tests(module)]
    if without:
        print(f"no unit tests: {' '.join(without)}")
    with _workers(1, str(folder)) as pool:
        if not pool.submit(_pass, paths, 1800, sys.stderr.fileno()).result():
            sys.exit(f"the unit tests fail as they are: pytest {' '.join(paths)}")


def judge(mutant: Mutant) -> Verdict:
    """Put the mutant into this process's copy and run the module's tests on it."""
    path = _COPY / "hpctrain" / f"{mutant.module}.py"
    whole = path.read_text(encoding="utf-8")
    began = time.monotonic()
    try:
        path.write_text(mutant.text, encoding="utf-8")
        tests = _tests(mutant.module)
        noticed = bool(tests) and not _pass(tests, TIMEOUT_S)
    finally:
        path.write_text(whole, encoding="utf-8")
    return Verdict(mutant, noticed, time.monotonic() - began)


def _pass(tests: Sequence[str], timeout_s: float, out: int | None = None) -> bool:
    """Whether the tests pass, in a process forked from this one; too long counts as not.

    What they say goes to the file descriptor `out`, or nowhere.
    """
    child = os.fork()
    if not child:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null if out is None or not number else out, number)
        code = 1
        try:
            import pytest

            # hypothesis is loaded already, without pytest's rewriting.
            quiet = [
                "-W",
                "ignore::pytest.PytestAssertRewriteWarning",
                "-W",
                "ignore::SyntaxWarning",
            ]
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *quiet]
            code = int(pytest.main([*options, *tests]))
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def report(
    modules: Sequence[str], verdicts: Sequence[Verdict], took_s: float, path: Path | None
) -> int:
    print(f"\n{'module':24} {'mutants':>7} {'noticed':>7} {'seconds':>7}")
    for module in modules:
        mine = [one for one in verdicts if one.mutant.module == module]
        noticed = sum(one.noticed for one in mine)
        share = f"{100 * noticed / len(mine):.0f} %" if mine else ""
        print(f"{module:24} {len(mine):7} {share:>7} {sum(one.took_s for one in mine):7.0f}")
    share = sum(one.noticed for one in verdicts) / max(len(verdicts), 1)
    print(f"{'all':24} {len(verdicts):7} {100 * share:5.1f} % {took_s:7.0f}")
    if path:
        rows = [
            {**one.mutant._asdict(), "text": _change(one.mutant), "noticed": one.noticed}
            for one in verdicts
        ]
        path.write_text(json.dumps(rows, indent=1))
    return 0 if share >= WANTED else 1


def _survivor(mutant: Mutant) -> str:
    where = f"hpctrain/{mutant.module}.py:{mutant.line}"
    return f"{where}: survived {mutant.operator}\n{_change(mutant)}"


def _change(mutant: Mutant) -> str:
    source = (ROOT / "hpctrain" / f"{mutant.module}.py").read_text(encoding="utf-8")
    lines = difflib.unified_diff(source.splitlines(), mutant.text.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


if __name__ == "__main__":
    sys.exit(main())
