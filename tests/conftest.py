"""Fixtures for all tests: a bare environment, run.yaml writing, and running a job script without a
Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples each time, and no limits on wall time: a test that fails on a busy machine only,
# or one time in a hundred, says nothing about the change under test. HYPOTHESIS_SEARCH=1 looks for
# new examples.
settings.register_profile(
    "steady",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=not os.environ.get("HYPOTHESIS_SEARCH"),
)
settings.load_profile("steady")

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # what several tests share
# stand-ins for what hpctrain works with; jobs of tests use them too
sys.path.insert(0, str(TESTS / "standin"))


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden from what is rendered now",
    )


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path_factory):
    """No test sees the developer's own config, profiles, templates or Slurm settings."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "HPCTRAIN_")) and name != "SLURM_CONF":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "1")


@pytest.fixture
def hpctrain():
    """Run the command line in a process of its own: `hpctrain("render", …)` gives the
    CompletedProcess."""

    def run(*args, cwd=None, env=None, **kwargs):
        return subprocess.run(
            [sys.executable, "-m", "hpctrain", *map(str, args)],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **kwargs,
        )

    return run


@pytest.fixture
def line_of_error():
    """The line of run.yaml at which the one error of a plan with these words in it points; nothing
    is rendered beside it."""

    def find(run_yaml, plan, words):
        (problem,) = [problem for problem in plan.errors if words in problem.what]
        assert plan.resolved.configs == {}
        number = int(problem.where.removeprefix(str(run_yaml)).split(":")[1])
        return run_yaml.read_text().splitlines()[number - 1]

    return find


@pytest.fixture
def run_job(tmp_path):
    """Run a job script with fakes for srun, singularity, module and scontrol: gives the process and
    what they noted."""

    def run(job, env=None, args=()):
        log = tmp_path / "fake.log"
        log.write_text("")
        environment = {
            "PATH": f"{TESTS}/fakes/bin:{os.path.dirname(sys.executable)}:/usr/bin:/bin",
            "HOME": str(tmp_path / "home"),
            "USER": "someone",
            "FAKE_LOG": str(log),
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "nid000001",
            **(env or {}),
        }
        done = subprocess.run(
            ["bash", str(job), *args],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done, [json.loads(line) for line in log.read_text().splitlines()]

    return run


@pytest.fixture
def cli(capsys):
    """Run the command line in this process: `cli("site", "list")` gives (exit code, stdout,
    stderr). Faster than `hpctrain`."""
    from hpctrain.cli import main

    def run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run
