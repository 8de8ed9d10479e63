"""templates/verl-gad/check_verl.py: the imported verl is the stage's branch of the working copy, or
the job says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.base.paths import shipped_dir

SCRIPT = os.path.join(shipped_dir("templates"), "verl-gad", "check_verl.py")


def git(folder: Path, *words: str) -> str:
    argv = [
        "git",
        "-C",
        str(folder),
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "-c",
        "init.defaultBranch=main",
        *words,
    ]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy called verl with the branches main, warmup and gad, each one commit
    further."""
    folder = tmp_path_factory.mktemp("origin") / "verl"
    (folder / "verl").mkdir(parents=True)
    (folder / "verl" / "__init__.py").write_text("raise SystemExit('imported, which takes long')\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    for branch in ("main", "warmup", "gad"):
        git(folder, "checkout", "-q", "-B", branch)
        git(folder, "commit", "-q", "--allow-empty", "-m", branch)
    return folder


@pytest.fixture
def copy(origin: Path, tmp_path: Path) -> Path:
    git(tmp_path, "clone", "-q", "--branch", "warmup", str(origin), "it's a copy")
    return tmp_path / "it's a copy"


def check(
    folder: Path, branch: str, *, path: Path | None = None, cwd: Path | None = None
) -> tuple[int, str]:
    argv = [sys.executable, "-B", SCRIPT, str(folder), branch]
    environ = {
        **os.environ,
        "PYTHONPATH": str(path or folder),
        "SLURMD_NODENAME": "n7",
        "PATH": "/nonexistent",
    }
    done = subprocess.run(argv, env=environ, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_stages_branch_passes_without_importing_anything(copy: Path) -> None:
    code, said = check(copy, "warmup")

    assert (code, "at branch warmup" in said, "imported" in said) == (0, True, False), said


def test_another_branch_is_refused_with_the_command_that_changes_it(copy: Path) -> None:
    code, said = check(copy, "gad")

    assert (
        code == 1
        and "on n7" in said
        and f"is at warmup, and the stage needs branch gad; run: git -C {copy} checkout gad" in said
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_detached_head_passes_at_the_branchs_commit_only(copy: Path, packed: bool) -> None:
    git(copy, "checkout", "-q", "--detach", "origin/gad")
    if packed:
        git(copy, "pack-refs", "--all")

    assert check(copy, "gad")[0] == 0
    code, said = check(copy, "warmup")
    assert code == 1 and f"is at commit {git(copy, 'rev-parse', 'HEAD')[:12]}" in said


def test_a_worktree_has_a_branch_of_its_own(copy: Path, tmp_path: Path) -> None:
    git(copy, "worktree", "add", "-q", str(tmp_path / "second"), "gad")
    git(copy, "checkout", "-q", "main")

    assert check(tmp_path / "second", "gad")[0] == 0
    git(tmp_path / "second", "checkout", "-q", "--detach")
    assert check(tmp_path / "second", "gad")[0] == 0
    assert check(copy, "gad")[0] == 1


def test_a_package_from_elsewhere_is_refused(copy: Path, origin: Path) -> None:
    code, said = check(copy, "warmup", path=origin)

    assert code == 1 and f"takes {origin}/verl, not {copy}/verl; install it" in said


def test_a_folder_that_only_looks_like_the_package_is_refused(copy: Path, tmp_path: Path) -> None:
    """Started beside a clone called verl, Python takes the clone's folder for the package and finds
    nothing in it."""
    (tmp_path / "beside" / "verl").mkdir(parents=True)
    code, said = check(copy, "warmup", path=tmp_path / "beside")

    assert code == 1 and "finds a folder" in said and "install it" in said


def test_no_package_and_no_working_copy_are_said(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, said = check(copy, "warmup", path=tmp_path / "empty")
    assert code == 1 and "has no package verl" in said

    plain = tmp_path / "plain"
    (plain / "verl").mkdir(parents=True)
    (plain / "verl" / "__init__.py").touch()
    code, said = check(plain, "warmup")
    assert code == 1 and "is no git working copy" in said


def test_a_link_to_the_working_copy_is_the_working_copy(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)

    assert check(tmp_path / "link", "warmup", path=copy)[0] == 0
