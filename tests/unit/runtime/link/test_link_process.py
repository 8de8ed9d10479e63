"""The guard as a process: old Pythons, any path, damaged plans, full disks, and two links at
once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpctrain.runtime.lock import _job_state

from .conftest import PYTHONS, RUNTIME, Run


def test_runtime_is_python_3_6(tmp_path):
    import ast

    for path in RUNTIME.glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 6))
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else (
                    [node.module or ""]
                    if isinstance(node, ast.ImportFrom) and not node.level
                    else []
                )
            )
            for module in modules:
                assert (
                    module.split(".")[0] in sys.stdlib_module_names
                    if hasattr(sys, "stdlib_module_names")
                    else True
                )
                assert module.split(".")[0] not in (
                    "dataclasses",
                    "zoneinfo",
                    "tomllib",
                    "graphlib",
                    "contextvars",
                ), path


def test_two_links_at_once_the_second_does_not_start(run):
    run.begin(1, job="7")
    run.fake("scontrol", 'echo "JobId=$4 JobState=RUNNING Restarts=0"')
    done = run.call("begin", "--link", 2, job="8")
    assert done.returncode != 0 and done.stdout == ""
    assert "job 7 of run `ft` is running" in done.stderr
    run.end(0, job="7")
    assert run.begin(2, job="8")["decision"] == "run"


def test_a_dead_holders_lock_is_taken_and_a_slurm_that_cannot_tell_is_not_guessed(quick):
    quick.begin(1, job="7")
    quick.fake(
        "scontrol", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1'
    )
    assert "cannot tell" in quick.call("begin", "--link", 2, job="8").stderr
    quick.fake("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert quick.begin(2, job="8")["decision"] == "run"
    assert "taken over" in quick.said


@pytest.mark.parametrize(
    ("said", "restart", "state"),
    [
        ("JobId=1 JobState=RUNNING Restarts=0", 0, "alive"),
        ("JobId=1 JobState=RUNNING Restarts=1", 0, "dead"),
        ("JobId=1 JobState=PENDING Restarts=1", 0, "dead"),
        ("JobId=1 JobState=COMPLETING Restarts=0", 0, "ending"),
        ("JobId=1 JobState=NODE_FAIL Restarts=0", 0, "dead"),
        ("", 0, "dead"),
    ],
)
def test_what_slurm_says_of_a_holder(said, restart, state):
    assert _job_state(said, restart) == state


def test_a_holder_that_is_requeued_under_the_same_id_takes_its_own_lock(quick):
    quick.fake("scontrol", 'echo "JobId=$4 JobState=RUNNING Restarts=1"')
    quick.begin(1, job="7", restart=0)
    assert quick.begin(1, job="7", restart=1)["decision"] == "run"


@pytest.mark.parametrize(
    "content", ["", "{", '{"guard": {}}', '{"guard": {"schema_version": 2}}', "[]"]
)
def test_a_damaged_plan_never_starts_a_job(quick, content):
    (quick.dir / "plan.json").write_text(content)
    done = quick.call("begin")
    assert (
        done.returncode != 0
        and done.stdout == ""
        and "plan.json" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_any_path_comes_through_shell_and_locale(tmp_path, python):
    run = Run(tmp_path / "é'$(touch canary)\n`id` ")
    run.python = python
    run.save(10)
    done = run.call("begin", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    shell = subprocess.run(
        ["bash", "-c", 'eval "$1"; printf %s "$HPCTRAIN_CHECKPOINT"', "x", done.stdout],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert shell.stdout == str(run.ckpt / "global_step10")
    assert not (tmp_path / "canary").exists()


def test_a_guard_that_cannot_write_does_not_start_the_job_and_the_next_one_goes_on(quick):
    """No more than 0 bytes may be written to any file, as with a full quota."""
    quick.save(10)
    (quick.ckpt / "latest").write_text("")
    command = 'ulimit -f 0; exec "$@"'
    done = subprocess.run(
        [
            "bash",
            "-c",
            command,
            "x",
            sys.executable,
            "-B",
            str(quick.dir / "runtime" / "__main__.py"),
            "begin",
            "--run-dir",
            str(quick.dir),
        ],
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0 and done.stdout == "" and "Traceback" not in done.stderr
    assert quick.begin(1)["iteration"] == "10"


def test_a_job_of_another_cluster_is_not_called_dead_because_this_one_does_not_know_it(quick):
    quick.begin(1, job="7", SLURM_CLUSTER_NAME="lumi")
    quick.fake("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert (
        "cannot tell"
        in quick.call("begin", "--link", 2, job="8", SLURM_CLUSTER_NAME="mahti").stderr
    )
    assert quick.begin(2, job="8", SLURM_CLUSTER_NAME="lumi")["decision"] == "run"
