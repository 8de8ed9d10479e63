"""One real Slurm for the whole test session, shaped like LUMI, started without root and without installing anything."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpctrain.sandbox import sandbox as sandboxes
from hpctrain.sandbox.from_site import shape_from_site
from hpctrain.sandbox.shape import ClusterShape
from hpctrain.site import load_site


@dataclass(frozen=True)
class Sandbox:
    """A running sandbox and how to talk to it."""

    status: sandboxes.Status

    @property
    def environ(self) -> dict[str, str]:
        assert self.status.record is not None
        return sandboxes.shell_environ(self.status.record, os.environ)

    def run(
        self, *argv: str, cwd: Path | None = None, timeout_s: float = 120, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """A command in the sandbox's shell; its output as text."""
        return subprocess.run(
            argv,
            cwd=cwd,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ok(self, *argv: str, cwd: Path | None = None, timeout_s: float = 120, **environ: str) -> str:
        """The same, which must succeed; its stdout."""
        result = self.run(*argv, cwd=cwd, timeout_s=timeout_s, **environ)
        assert result.returncode == 0, f"{argv}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout


def lumi(num_nodes: int = 4, **options: object) -> ClusterShape:
    """LUMI-G nodes and one LUMI-C node, with timeouts short enough for tests."""
    defaults = {"kill_wait_s": 3, "slurmd_timeout_s": 60}
    return shape_from_site(
        load_site("lumi"), {"lumi-g": num_nodes, "lumi-c": 1, "lumi-d": 0}, **{**defaults, **options}
    )  # type: ignore[arg-type]


def started(
    shape: ClusterShape, name: str, directory: Path, environ: Mapping[str, str] = os.environ
) -> Iterator[Sandbox]:
    """A sandbox that is ended whatever happens, also at Ctrl-C."""
    try:
        status, _ = sandboxes.up(shape, name, directory, environ, source="unpacked")
        yield Sandbox(status)
    finally:
        sandboxes.down(name, directory, environ)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """The session's shared sandbox: 4 LUMI-G nodes nid[000001-000004] and a LUMI-C node nid000005."""
    yield from started(lumi(), "tests", tmp_path_factory.mktemp("sandbox"))


@pytest.fixture
def idle(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The shared sandbox, its queue emptied and its nodes brought back afterwards."""
    yield sandbox
    cancel(sandbox.ok, ["-u", str(os.geteuid())])


def cancel(ok: object, words: Sequence[str]) -> None:
    """scancel and wait until the queue is empty."""
    import time

    ok("scancel", *words)  # type: ignore[operator]
    for _ in range(200):
        if not ok("squeue", "-h").strip():  # type: ignore[operator]
            return
        time.sleep(0.1)
