"""A run directory for the guard: what a link does when it starts, on the oldest Python that must
run it too."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import checkpoints
import pytest

from hpctrain.runtime import history
from hpctrain.runtime import link as guard

RUNTIME = Path(history.__file__).parent
# Python 3.6 where this machine has one; the syntax of the oldest is checked for everybody by
# test_runtime_is_python_3_6.
OLD = sorted(map(str, (Path.home() / ".pyenv/versions").glob("3.6.*/bin/python")))
PYTHONS = [sys.executable, *OLD[:1]]


class Run:
    """A run directory with nothing but plan.json and runtime/, and the guard in a process of its
    own."""

    def __init__(self, top: Path, **guard):
        self.dir, self.ckpt = top / "run dir", top / "ckpt's"
        self.aside = top / "ckpt's.hpctrain"
        self.start = str(top / "base" / "global_step50")
        self.guard = {
            "schema_version": 1,
            "run": "ft",
            "layout": "deepspeed",
            "checkpoint_dir": str(self.ckpt),
            "start": None,
            "tensor_parallel": 1,
            "pipeline_parallel": 0,
            "data_parallel": 2,
            "zero_stage": 1,
            "target": 300,
            "give_up_after": 3,
            "after_each": None,
            "quarantine": True,
            "counter": "latest",
            **guard,
        }
        self.dir.mkdir(parents=True)
        (top / "logs").mkdir(exist_ok=True)
        shutil.copytree(RUNTIME, self.dir / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
        self.python = sys.executable
        self.bin = top / "bin"
        self.bin.mkdir(exist_ok=True)
        self.scancelled = top / "scancelled"
        self.fake("scancel", f'printf "%s\\n" "$@" >> {shlex.quote(str(self.scancelled))}')
        self.fake("scontrol", 'echo "JobId=$4 JobState=TIMEOUT Restarts=0"')
        self.write_plan()

    def write_plan(self, **changes):
        self.guard.update(changes)
        (self.dir / "plan.json").write_text(json.dumps({"guard": self.guard}))

    def fake(self, name, body):
        (self.bin / name).write_text("#!/bin/sh\n" + body + "\n")
        (self.bin / name).chmod(0o755)

    def environment(self, job="7", restart=0, **env):
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "SLURM_JOB_ID": job,
            "SLURM_RESTART_COUNT": str(restart),
            "SLURM_JOB_NODELIST": "nid[01-02]",
            "HPCTRAIN_LOCK_WAIT_S": "0.2",
            **env,
        }

    def call(self, *args, **env):
        command = [
            self.python or sys.executable,
            "-B",
            str(self.dir / "runtime" / "__main__.py"),
            args[0],
            "--run-dir",
            str(self.dir),
        ]
        return subprocess.run(
            [*command, *map(str, args[1:])],
            env=self.environment(**env),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def begin(self, link=None, **env):
        if self.python is None:  # in this process: the same function, without the start of a Python
            said = []
            with mock.patch.dict(os.environ, self.environment(**env), clear=True):
                found = guard.begin(str(self.dir), link, os.environ, said.append)
            self.said = "\n".join(said)
            return {key[len("HPCTRAIN_") :].lower(): value for key, value in found.items()}
        done = self.call("begin", *(["--link", link] if link else []), **env)
        assert done.returncode == 0, done.stderr
        self.said = done.stderr
        found = dict(line.split("=", 1) for line in done.stdout.splitlines())
        return {
            key[len("HPCTRAIN_") :].lower(): shlex.split(value)[0] if value != "''" else ""
            for key, value in found.items()
        }

    def end(self, code=0, **env):
        if self.python is None:
            with mock.patch.dict(os.environ, self.environment(**env), clear=True):
                return guard.end(str(self.dir), code, os.environ, lambda text: None)
        done = self.call("end", "--exit-code", code, **env)
        assert done.returncode == 0, done.stderr

    def link(self, number, **kwargs):
        """A link that ends without a checkpoint."""
        found = self.begin(number, job=str(100 + number), **kwargs)
        if found["decision"] == "run":
            self.end(1, job=str(100 + number), **kwargs)
        return found

    def records(self, name="links.jsonl"):
        return history_records(self.dir / name)

    def save(self, step, **kwargs):
        return checkpoints.save(str(self.ckpt), step, 1, 2, **kwargs)

    def base(self, name="global_step50", **kwargs):
        self.start = checkpoints.save(os.path.dirname(self.start), 50, 1, 2, name=name, **kwargs)
        self.write_plan(start=self.start)
        return self.start


def history_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(params=PYTHONS, ids=lambda path: "this" if path == sys.executable else "3.6")
def run(tmp_path, request):
    found = Run(tmp_path)
    found.python = request.param
    return found


@pytest.fixture
def quick(tmp_path):
    found = Run(tmp_path)
    found.python = None
    return found
