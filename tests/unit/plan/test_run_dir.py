"""The run directory: all of it or nothing, and never over something else without being told."""

from __future__ import annotations

import os
import stat

import pytest

from hpctrain.base.errors import Refused
from hpctrain.plan.load import load_plan
from hpctrain.plan.run_dir import COMMIT, STAGED, run_files, write_run_dir

FILES = {"job.sbatch": b"#!/bin/bash\n", "plan.json": b"{}\n", "runtime/a.py": b"pass\n"}


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "r"


def write(run_dir, files=None, force=False):
    return write_run_dir(str(run_dir), FILES if files is None else files, force)


def test_a_new_one_has_every_file_and_a_folder_for_logs(run_dir):
    old = os.umask(0o027)
    try:
        assert write(run_dir) is True
    finally:
        os.umask(old)
    assert tree(run_dir) == FILES and (run_dir / "logs").is_dir()
    assert stat.S_IMODE((run_dir / "job.sbatch").stat().st_mode) == 0o750
    assert stat.S_IMODE((run_dir / "plan.json").stat().st_mode) == 0o640
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o750
    assert [path.name for path in run_dir.parent.iterdir()] == ["r"]


def test_the_same_again_changes_nothing(run_dir):
    write(run_dir)
    (run_dir / "logs").rmdir()
    before = (run_dir / "plan.json").stat().st_mtime_ns
    assert write(run_dir) is False
    assert (run_dir / "plan.json").stat().st_mtime_ns == before and (run_dir / "logs").is_dir()


def test_a_change_is_refused_with_its_difference_until_it_is_forced(run_dir):
    write(run_dir)
    (run_dir / "links.jsonl").write_bytes(b"{}\n")
    (run_dir / "logs" / "r-1.out").write_bytes(b"log")
    changed = {**FILES, "plan.json": b'{"a": 1}\n', "new.yml": b"x\n"}
    with pytest.raises(Refused, match="was rendered from something else") as caught:
        write(run_dir, changed)
    why = caught.value.problems[0].why
    assert (
        "plan.json:" in why
        and "  -{}" in why
        and '  +{"a": 1}' in why
        and "new.yml: would be added" in why
    )
    assert "job.sbatch" not in why and tree(run_dir)["plan.json"] == b"{}\n"
    assert write(run_dir, changed, force=True) is True
    assert tree(run_dir) == {**changed, "links.jsonl": b"{}\n", "logs/r-1.out": b"log"}
    assert not (run_dir / COMMIT).exists() and not (run_dir / STAGED).exists()


def test_a_long_difference_is_cut(run_dir):
    write(run_dir, {**FILES, "plan.json": "".join(f"{n}\n" for n in range(30)).encode()})
    with pytest.raises(Refused) as caught:
        write(run_dir)
    lines = caught.value.problems[0].why.splitlines()
    # One line of `@@` and thirty of each number, of which twelve are shown.
    assert lines[0] == "plan.json:" and len(lines) == 14 and lines[-1] == "  … 20 more lines"


def test_an_empty_folder_and_one_with_logs_only_are_filled(run_dir):
    run_dir.mkdir(parents=True)
    assert write(run_dir) is True and tree(run_dir) == FILES
    other = run_dir.parent / "other"
    (other / "logs").mkdir(parents=True)
    assert write(other) is True and tree(other) == FILES


def test_a_folder_of_something_else_and_a_file_are_never_touched(run_dir):
    run_dir.mkdir(parents=True)
    (run_dir / "thesis.tex").write_bytes(b"mine")
    for force in (False, True):
        with pytest.raises(Refused, match="holds files that are not a run's"):
            write(run_dir, force=force)
    assert tree(run_dir) == {"thesis.tex": b"mine"}
    path = run_dir.parent / "file"
    path.write_bytes(b"mine")
    with pytest.raises(Refused, match="is there and is no folder"):
        write(path, force=True)
    assert path.read_bytes() == b"mine"
    link = run_dir.parent / "link"
    link.symlink_to("nowhere")
    with pytest.raises(Refused):
        write(link)


def test_a_render_that_was_cut_off_before_its_commit_leaves_the_old_files(run_dir):
    write(run_dir)
    (run_dir / STAGED).mkdir()
    (run_dir / STAGED / "plan.json").write_bytes(b"half")
    assert write(run_dir) is False and tree(run_dir)["plan.json"] == b"{}\n"
    assert write(run_dir, {**FILES, "plan.json": b"[]\n"}, force=True) is True
    assert not (run_dir / STAGED).exists()


def test_a_render_that_was_cut_off_after_its_commit_is_finished_first(run_dir):
    write(run_dir)
    (run_dir / COMMIT / "runtime").mkdir(parents=True)
    changed = {
        "job.sbatch": b"#!/bin/sh\n",
        "plan.json": FILES["plan.json"],
        "runtime/a.py": b"new\n",
    }
    for name in ("job.sbatch", "runtime/a.py"):
        (run_dir / COMMIT / name).write_bytes(changed[name])
    assert write(run_dir, changed) is False
    assert tree(run_dir) == changed


def test_the_job_script_is_the_last_to_change(run_dir, monkeypatch):
    write(run_dir)
    moved = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (moved.append(os.path.basename(b)), replace(a, b))
    )
    write(run_dir, {name: text + b"#" for name, text in FILES.items()}, force=True)
    assert moved == ["plan.json", "a.py", "job.sbatch"]


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    parent = tmp_path / "runs"
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError(17, "File exists")))
    with pytest.raises(Refused, match="was made by someone else at this moment"):
        write_run_dir(str(parent / "r"), FILES)
    assert list(parent.iterdir()) == []


def test_the_files_of_a_plan_are_what_it_was_made_from_and_what_runs_it(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "name: r\nsite: local\nrecipe: command\ntime: 10m\nrecipe_options: {argv: [hostname]}\n"
    )
    loaded = load_plan(str(tmp_path / "run.yaml"))
    files = run_files(loaded)
    assert files["run.yaml"] == (tmp_path / "run.yaml").read_bytes()
    assert files["job.sbatch"].startswith(b"#!/bin/bash\n") and b"name: local" in files["site.yaml"]
    assert {"runtime/__main__.py", "runtime/link.py", "plan.json"} <= set(files)
    assert not [name for name in files if name.endswith(".pyc")]
