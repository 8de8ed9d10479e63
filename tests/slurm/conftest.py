"""One real Slurm for the whole test session, shaped like LUMI, started without root and without
installing anything."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chains
import pytest

from hpctrain.config.site import load_site
from hpctrain.sandbox import sandbox as sandboxes
from hpctrain.sandbox.from_site import shape_from_site
from hpctrain.sandbox.shape import ClusterShape

ACCOUNT = "project_465000000"


@dataclass(frozen=True)
class Sandbox:
    """A running sandbox and how to talk to it."""

    name: str
    directory: Path
    environ: Mapping[str, str]

    def run(
        self, *argv: str, cwd: Path | None = None, timeout_s: float = 120, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """A command as in `hpctrain sandbox shell`; its output as text."""
        return subprocess.run(
            argv,
            cwd=cwd,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ok(
        self, *argv: str, cwd: Path | None = None, timeout_s: float = 120, **environ: str
    ) -> str:
        """The same, which must succeed; its stdout."""
        result = self.run(*argv, cwd=cwd, timeout_s=timeout_s, **environ)
        assert result.returncode == 0, (
            f"{argv}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        )
        return result.stdout

    def job(self, tmp_path: Path, script: str, *options: str, **environ: str) -> str:
        """Submit a bash script from `tmp_path`, wait for its end, and return what it printed; it
        must succeed."""
        (tmp_path / "job.sh").write_text("#!/bin/bash\n" + script)
        log = tmp_path / "job.log"
        log.unlink(missing_ok=True)
        submit = ("sbatch", "--parsable", "-t", "5", "-o", str(log), *options, "job.sh")
        job = self.ok(*submit, cwd=tmp_path, **environ).strip()
        # Not `sbatch --wait`, which looks only every few seconds.
        self.wait_for(
            lambda: self.state(job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), 120
        )
        text = log.read_text() if log.exists() else ""
        assert self.state(job) == "COMPLETED", f"{self.state(job)}\n{text}"
        return text

    def state(self, job: str) -> str:
        """A job's state as `scontrol show job` has it."""
        return self.ok("scontrol", "show", "job", job).split("JobState=")[1].split()[0]

    def wait_for(self, condition: Any, limit_s: float = 60) -> None:
        """Until `condition()` is true."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, self.ok("squeue") + self.ok("sinfo", "-N")
            time.sleep(0.1)

    def empty(self) -> None:
        """Cancel every job and bring every node back."""
        self.ok("scancel", "-u", self.ok("id", "-un").strip())
        self.wait_for(lambda: not self.ok("squeue", "-h").strip())
        if self.ok("sinfo", "-h", "-t", "down,drain").strip():
            self.run("scontrol", "update", "nodename=ALL", "state=resume")


def lumi(num_nodes: int = 4, **options: Any) -> ClusterShape:
    """LUMI-G nodes and one LUMI-C node, with times short enough for tests."""
    counts = {"lumi-g": num_nodes, "lumi-c": 1, "lumi-d": 0}
    return shape_from_site(
        load_site("lumi"), counts, **{"kill_wait_s": 3, "slurmd_timeout_s": 60, **options}
    )


@contextlib.contextmanager
def started(shape: ClusterShape, name: str, directory: Path) -> Iterator[Sandbox]:
    """A sandbox that is ended whatever happens, also at Ctrl-C."""
    try:
        status, _ = sandboxes.up(shape, name, directory, os.environ, source="unpacked")
        assert status.record is not None
        yield Sandbox(name, directory, sandboxes.shell_environ(status.record, os.environ))
    finally:
        sandboxes.down(name, directory, os.environ)


@pytest.fixture(scope="session")
def _session_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with started(lumi(), "tests", tmp_path_factory.mktemp("sandbox")) as box:
        yield box


@pytest.fixture
def sandbox(_session_sandbox: Sandbox) -> Iterator[Sandbox]:
    """The session's shared sandbox: LUMI-G nodes nid[000001-000004] and LUMI-C node nid000005; no
    jobs are left in it."""
    yield _session_sandbox
    _session_sandbox.empty()


@pytest.fixture(scope="session")
def _session_accounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    shape = lumi(2, accounting=True, accounts=(ACCOUNT,))
    with started(shape, "accounting", tmp_path_factory.mktemp("accounting")) as box:
        yield box


@pytest.fixture
def accounting_sandbox(_session_accounting: Sandbox) -> Iterator[Sandbox]:
    """A shared sandbox with slurmdbd: LUMI's limits on submitted jobs, one account, ACCOUNT; sacct
    works."""
    yield _session_accounting
    _session_accounting.empty()


@pytest.fixture
def idle(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The shared sandbox, its queue emptied afterwards."""
    import time

    yield sandbox
    sandbox.ok("scancel", "-u", str(os.geteuid()))
    for _ in range(300):
        if not sandbox.ok("squeue", "-h").strip():
            break
        time.sleep(0.1)


@pytest.fixture
def make(sandbox: Sandbox, tmp_path: Path) -> Iterator[Any]:
    """Makes a `Chain` in a folder of its own; its jobs are ended afterwards."""

    def made(**changes: Any) -> chains.Chain:
        return chains.Chain(sandbox, tmp_path, **changes)

    yield made
    ids = [job_id for job_id, *_ in chains.Chain(sandbox, tmp_path).queue()]
    if ids:
        sandbox.ok("scancel", *ids)
