"""Every case of tests/golden renders to exactly the files beside it; bash, shellcheck and the lint
find nothing in them.

`pytest --update-golden tests/unit/test_golden.py` rewrites them; the diff is then reviewed like
code.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hpctrain.plan.load import load_plan
from hpctrain.plan.run_dir import run_files

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/run.yaml"))
# A home that would break every unquoted word.
RUN_DIR = '/users/o\'hara/$(touch canary) `id` "runs" 100%/'


SHIPPED = {
    path.read_text(): path for path in sorted((GOLDEN.parents[1] / "templates").rglob("*.py"))
}


def as_golden(files: dict[str, str]) -> dict[str, str]:
    """The files as they are kept: one that is a shipped file unchanged as a line that says so."""
    kept = {}
    for name, text in files.items():
        shipped = SHIPPED.get(text)
        kept[f"{name}.same" if shipped else name] = (
            f"{shipped.relative_to(GOLDEN.parents[1])}\n" if shipped else text
        )
    return kept


def rendered(case: str, monkeypatch) -> dict[str, str]:
    # The hash of runtime/ changes with each of its lines; tests of the job script hold it right.
    monkeypatch.setattr("hpctrain.plan.render._sums", lambda files: "0" * 64)
    monkeypatch.chdir(GOLDEN / case)
    loaded = load_plan("run.yaml", (), RUN_DIR + case)
    assert not loaded.plan.errors, loaded.plan.errors
    files = run_files(loaded)
    return {
        name: raw.decode()
        for name, raw in files.items()
        if "/" not in name and name not in ("run.yaml", "site.yaml")
    }


@pytest.mark.parametrize("case", CASES)
def test_a_case_renders_to_its_golden_files(case, monkeypatch, request):
    files = as_golden(rendered(case, monkeypatch))
    folder = GOLDEN / case / "expected"
    if request.config.getoption("--update-golden"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    expected = {path.name: path.read_text() for path in folder.iterdir()} if folder.is_dir() else {}

    assert files == expected


@pytest.mark.parametrize("case", CASES)
def test_rendering_twice_from_different_folders_gives_the_same_bytes(case, monkeypatch, tmp_path):
    first = rendered(case, monkeypatch)
    copy = tmp_path / "else where"
    shutil.copytree(GOLDEN / case, copy)
    monkeypatch.chdir(tmp_path)
    loaded = load_plan(str(copy / "run.yaml"), (), RUN_DIR + case)
    second = {name: raw.decode() for name, raw in run_files(loaded).items() if name in first}

    assert second == first


@pytest.mark.parametrize("case", CASES)
def test_job_scripts_are_clean_for_bash_and_shellcheck(case):
    for script in sorted((GOLDEN / case / "expected").glob("*.sbatch")):
        for command in (["bash", "-n"], ["shellcheck", "-x", "-S", "style"]):
            done = subprocess.run(
                [*command, str(script)], capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
