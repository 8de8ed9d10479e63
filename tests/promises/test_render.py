"""What render promises: one line on stdout, the same bytes again, nothing lost, nothing half
written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpctrain.base.errors import Refused
from hpctrain.plan import run_dir as rundir
from hpctrain.plan.load import load_plan
from hpctrain.plan.run_dir import run_files

RUN = """\
name: r
site: local
recipe: command
time: 10m
recipe_options: {argv: [hostname], workdir: /}
"""


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_stdout_is_the_path_of_the_job_script_and_nothing_else(run_yaml, hpctrain, tmp_path):
    done = hpctrain("render", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/runs/r/job.sbatch\n"), done.stderr
    assert (tmp_path / "runs/r/job.sbatch").is_file()
    assert (tmp_path / "runs/r/run.yaml").read_text() == RUN


def test_the_same_bytes_from_wherever_it_is_rendered(tmp_path, monkeypatch):
    """The project's `.hpctrain` is the one beside run.yaml or above it, not the one of the working
    directory."""
    project = tmp_path / "project"
    monkeypatch.delenv("HPCTRAIN_NO_USER_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folders = {folder: folder / ".hpctrain" for folder in (project, tmp_path / "elsewhere")}
    (project / ".git").mkdir(parents=True)
    for folder, own in folders.items():
        (own / "site_profiles" / "local").mkdir(parents=True)
        text = (
            f"name: local\nextends: local\nenv:\n  WHOSE: {{value: {folder.name!r}, why: a test}}\n"
        )
        (own / "site_profiles" / "local" / "profile.yaml").write_text(text)
        (own / "templates" / "command").mkdir(parents=True)
        block = (
            '{% extends "!builtin/command/job.sbatch.j2" %}{% block user_setup %}: templates of '
            + folder.name
        )
        (own / "templates" / "command" / "job.sbatch.j2").write_text(block + "{% endblock %}\n")
    below = project / "runs of mine"
    below.mkdir()
    (below / "run.yaml").write_text(RUN)
    seen = []
    for cwd in (below, project, tmp_path / "elsewhere", Path("/")):
        monkeypatch.chdir(cwd)
        loaded = load_plan(os.path.relpath(below / "run.yaml"))
        assert not loaded.plan.errors
        seen.append(run_files(loaded))
    script = seen[0]["job.sbatch"].decode()

    assert f"WHOSE={project.name}" in script and f": templates of {project.name}" in script
    assert (
        "command/job.sbatch.j2 (an override), command/job.sbatch.j2, base/job.sbatch.j2" in script
    )
    for files in seen[1:]:
        assert files == seen[0]


def test_dry_run_writes_nothing(run_yaml, hpctrain, tmp_path):
    before = tree(tmp_path)
    done = hpctrain("render", "--dry-run", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/runs/r/job.sbatch\n"), done.stderr
    assert tree(tmp_path) == before


def test_rendering_again_changes_nothing(run_yaml, hpctrain, tmp_path):
    hpctrain("render", cwd=tmp_path)
    before = tree(tmp_path)
    done = hpctrain("render", cwd=tmp_path)

    assert done.returncode == 0
    assert tree(tmp_path) == before


def test_a_changed_run_is_refused_with_the_difference_and_replaced_when_forced(
    run_yaml, hpctrain, tmp_path
):
    hpctrain("render", cwd=tmp_path)
    (tmp_path / "runs/r/links.jsonl").write_text("{}\n")
    before = tree(tmp_path / "runs")
    run_yaml.write_text(RUN.replace("10m", "20m"))
    refused = hpctrain("render", cwd=tmp_path)

    assert refused.returncode == 4
    assert "+#SBATCH --time=00:20:00" in refused.stderr
    assert tree(tmp_path / "runs") == before

    forced = hpctrain("render", "--force", cwd=tmp_path)

    assert forced.returncode == 0
    assert "--time=00:20:00" in (tmp_path / "runs/r/job.sbatch").read_text()
    assert (tmp_path / "runs/r/links.jsonl").read_text() == "{}\n"
    assert {path.name for path in (tmp_path / "runs/r").iterdir()} & {
        rundir.COMMIT,
        rundir.STAGED,
    } == set()


def test_an_invalid_run_leaves_no_run_directory(run_yaml, hpctrain, tmp_path):
    run_yaml.write_text(RUN.replace("10m", "soon"))
    done = hpctrain("render", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_not_a_run_is_never_written_into(run_yaml, hpctrain, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    done = hpctrain("render", "-o", "mine", "--force", cwd=tmp_path)

    assert done.returncode == 4
    assert tree(tmp_path / "mine") == {"thesis.tex": b"x"}


FILES = {"plan.json": b"{}", "job.sbatch": b"#!/bin/bash\n", "runtime/__init__.py": b""}
NEW = {"plan.json": b"{1}", "job.sbatch": b"new", "config.yml": b"new"}


def write_and_die_at(run_dir: Path, steps: int) -> int:
    """Write NEW in a process that is gone at its `steps`-th change of the file system; its exit
    code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = steps

    def counted(real):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return real(*args, **kwargs)

        return call

    try:
        for name in ("rename", "replace", "fsync", "mkdir", "chmod"):
            setattr(os, name, counted(getattr(os, name)))
        rundir.write_run_dir(str(run_dir), NEW, force=True)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("there_before", [False, True])
def test_a_crash_at_any_step_leaves_the_old_or_the_new_files(tmp_path, there_before):
    ends = set()
    for steps in range(40):
        run_dir = tmp_path / str(steps) / "run"
        old = {}
        if there_before:
            rundir.write_run_dir(str(run_dir), FILES)
            old = tree(run_dir)
        code = write_and_die_at(run_dir, steps)
        # The next render finishes what was committed, or finds the old state; either way it is
        # whole again.
        try:
            rundir.write_run_dir(str(run_dir), FILES)
        except Refused:
            pass
        now = {
            name: raw for name, raw in tree(run_dir).items() if not name.startswith(rundir.STAGED)
        }
        assert now in ([old, {**FILES, **NEW}] if there_before else [FILES, NEW])
        ends.add(code)
        if code == 0:
            break
    assert ends == {0, 9}, "both cut off and finished"


def test_an_unwritable_place_is_said_in_one_line(run_yaml, hpctrain, tmp_path):
    done = hpctrain("render", "-o", "/proc/nowhere/run", cwd=tmp_path)

    assert done.returncode == 3
    assert done.stderr.startswith("error:")
    assert "Traceback" not in done.stderr
