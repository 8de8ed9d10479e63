"""What a sandbox says when this machine does not let it live or end, each fault made for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.base import errors
from hpctrain.sandbox import state

from .conftest import Sandbox

pytestmark = pytest.mark.slurm
HPCTRAIN = (sys.executable, "-m", "hpctrain", "sandbox")
PLACES = """
import socket, subprocess, sys
held = [socket.socket() for _ in range({first}, {stop}, {step})]
for number, one in enumerate(held):
    one.bind(("", {first} + {step} * number + 1))
sys.exit(subprocess.call(sys.argv[1:]))
"""


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("apart", "told"),
    [
        (("unshare", "-r"), "another user namespace"),
        (("unshare", "-rpf", "--mount-proc"), "another PID namespace"),
    ],
    ids=["user", "pid"],
)
def test_from_another_namespace_down_says_that_it_cannot_end_it_and_ends_nothing(
    sandbox: Sandbox, apart: tuple[str, ...], told: str
) -> None:
    where = ("--name", sandbox.name, "--dir", str(sandbox.directory))
    done = run(*apart, *HPCTRAIN, "down", *where)
    assert done.returncode == errors.ENVIRONMENT, done.stderr
    assert (
        "cannot be ended from here" in done.stderr
        and told in done.stderr
        and "has ended" not in done.stderr
    )
    status = run(*apart, *HPCTRAIN, "status", *where)
    assert status.returncode == errors.NO and "out of sight" in status.stdout
    assert sandbox.ok("sinfo", "-h", "-p", "dev-g", "-o", "%D").strip() == "4"


def test_a_range_of_ports_in_use_is_said_and_nothing_is_left(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    """One port of every block is really bound, in a network of its own."""
    ports = state._PORTS
    script = PLACES.format(first=ports.start, stop=ports.stop, step=state._UNIT)
    directory = tmp_path / "box"
    done = run(
        "unshare",
        "-rn",
        sys.executable,
        "-c",
        script,
        *HPCTRAIN,
        "up",
        "--nodes",
        "1",
        "--dir",
        str(directory),
        "--slurm",
        "unpacked",
    )
    assert done.returncode == errors.ENVIRONMENT, done.stderr
    assert f"free TCP ports in a row between {ports.start} and {ports.stop}" in done.stderr
    assert not {"etc", "run", state.RECORD} & {path.name for path in directory.iterdir()}


def test_a_full_disk_is_said_and_nothing_is_left(sandbox: Sandbox, tmp_path: Path) -> None:
    command = (
        f'mount -t tmpfs -o size=64k none {tmp_path} && cd {tmp_path} && {{ "$@"; code=$?; ls -A'
        " box; exit $code; }"
    )
    up = (*HPCTRAIN, "up", "--nodes", "1", "--dir", f"{tmp_path}/box", "--slurm", "unpacked")
    done = run("unshare", "-rm", "sh", "-c", command, "x", *up)
    assert done.returncode == errors.ENVIRONMENT, done.stderr
    assert f"{tmp_path}/box: the disk is full" in done.stderr and "--dir" in done.stderr
    assert done.stdout.split() == ["lock", "log"]
