"""Where a sandbox lives: its state directory, the short directory of its sockets, its lock and its
record."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Refused, UsageError
from hpctrain.runtime.files import replace_atomic
from hpctrain.sandbox.shape import ClusterShape, Place, Ports, check_path

RECORD = "sandbox.json"
FULL_KIB = 64  # a disk with less room is full
LOCK_WAIT_S = (
    60  # a node that is brought down or back holds the lock for seconds, several wait in turn
)
# sun_path holds 108 bytes; slurmstepd adds /spool/<node>/<node>_<job>.<step> to the run directory.
_LONGEST_RUN = 56
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}\Z")
# below the ephemeral ports and below the rendezvous ports of jobs (20000 and up)
_PORTS = range(10240, 19968)
_UNIT = 64


class DiskFull(EnvironmentFault):
    """The disk of `folder` has no room left, as `error` shows."""

    def __init__(self, folder: Path, error: BaseException) -> None:
        first = error.problems[0].what if isinstance(error, EnvironmentFault) else str(error)
        super().__init__(
            "the disk is full", where=str(folder), why=first, hint="choose another one with --dir"
        )


@dataclass(frozen=True)
class Record:
    """What is known about a sandbox that was started here. `phase` is `starting` until every node
    is idle."""

    name: str
    phase: str
    host: str
    boot_id: str
    shape: ClusterShape
    place: Place
    packages: str
    version: str

    def in_phase(self, phase: str) -> Record:
        return replace(self, phase=phase)


def state_dir(name: str, given: str, environ: Mapping[str, str]) -> Path:
    """The state directory of a sandbox: `given`, else `$XDG_STATE_HOME/hpctrain/sandbox/<name>`.
    Raises UsageError."""
    if not _NAME.match(name):
        raise UsageError(
            f"`{name}` is not a name for a sandbox", hint="letters, digits, - and _, at most 32"
        )
    if given:
        path = os.path.abspath(os.path.expanduser(given))
    else:
        base = environ.get("XDG_STATE_HOME", "")
        if not base.startswith("/"):
            base = os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".local", "state")
        path = os.path.join(base, "hpctrain", "sandbox", name)
    path = os.path.realpath(path)
    check_path(path, "the sandbox's directory")
    return Path(path)


def run_dir(state: Path, environ: Mapping[str, str]) -> Path:
    """The directory of a sandbox's sockets: below `state` when that is short enough, else one in a
    runtime directory."""
    inside = state / "run"
    if len(str(inside)) <= _LONGEST_RUN:
        return inside
    mark = hashlib.sha256(str(state).encode()).hexdigest()[:10]
    name = f"hpctrain-{os.geteuid()}-{mark}"
    for base in (environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp", "/dev/shm"):
        path = os.path.join(base, name)
        if (
            base.startswith("/")
            and len(path) <= _LONGEST_RUN
            and os.access(base, os.W_OK | os.X_OK)
        ):
            return Path(path)
    raise EnvironmentFault(
        "no directory with a short path can be written for the sandbox's sockets",
        where=str(state),
        why=(
            f"a socket's path has at most 108 bytes; tried {inside}, $XDG_RUNTIME_DIR, /tmp,"
            " /var/tmp, /dev/shm"
        ),
        hint="give a short one: --dir /short/path",
    )


def make_private(path: Path) -> None:
    """Make a directory of mode 0700, or accept one that is already exactly that and ours; never
    through a symlink."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = os.lstat(path)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot make a directory: {error.strerror}", where=str(path)
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise Refused(
            "this is not a directory of ours",
            where=str(path),
            hint="choose another: --dir or --name",
        )
    if status.st_mode & 0o077:
        os.chmod(path, 0o700)


def claim(state: Path) -> None:
    """Make the state directory, refusing one that holds anything but a sandbox."""
    if (
        state.is_dir()
        and any(state.iterdir())
        and not (state / RECORD).exists()
        and not (state / "lock").exists()
    ):
        raise Refused(
            "this directory holds files that are not a sandbox's",
            where=str(state),
            hint="choose an empty or a new one with --dir",
        )
    make_private(state)


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """Hold the sandbox's lock; a crash frees it. Raises EnvironmentFault when another hpctrain
    holds it for long."""
    try:
        descriptor = os.open(
            state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError as error:
        raise EnvironmentFault(
            f"cannot lock the sandbox: {error.strerror}", where=str(state)
        ) from error
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise EnvironmentFault(
                        "another hpctrain has been changing this sandbox for more than"
                        f" {LOCK_WAIT_S} s",
                        where=str(state),
                        hint="wait for it, or use a sandbox of your own with --name",
                    ) from error
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file whole."""
    replace_atomic(str(path), text.encode(), mode)


def save(state: Path, record: Record) -> None:
    """Write the record of a sandbox."""
    data = {**asdict(record), "shape": record.shape.as_json(), "format": 1}
    write_text(state / RECORD, json.dumps(data, indent=1) + "\n")


def load(state: Path) -> Record | None:
    """The record of a sandbox, None when there is none. Raises EnvironmentFault for one that cannot
    be read."""
    try:
        data: dict[str, Any] = json.loads((state / RECORD).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"cannot read the sandbox's record: {error}", where=str(state / RECORD)
        ) from error
    try:
        for key in ("format", "has_bwrap"):  # earlier versions wrote the second
            data.pop(key, None)
        place = dict(data.pop("place"))
        ports = Ports(**place.pop("ports"))
        shape = ClusterShape.from_json(data.pop("shape"))
        return Record(shape=shape, place=Place(ports=ports, **place), **data)
    except (KeyError, TypeError, UsageError) as error:
        raise EnvironmentFault(
            "this sandbox was started by another version of hpctrain",
            where=str(state / RECORD),
            hint="hpctrain sandbox down ends it",
        ) from error


def remove(state: Path, run: Path, *, keep_logs: bool) -> None:
    """Delete a sandbox's files (symlinks are removed, never followed); the record goes last, so a
    crash can be redone."""
    if run != state / "run":
        shutil.rmtree(run, ignore_errors=True)
    kept = {RECORD, "lock", *(("log",) if keep_logs else ())}
    for entry in list(state.iterdir()) if state.is_dir() else ():
        if entry.name in kept:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()
    with contextlib.suppress(FileNotFoundError):
        (state / RECORD).unlink()


def is_full(folder: Path, error: BaseException) -> bool:
    """Whether `error` came because the disk of `folder` is full: it says so, or there is hardly any
    room left.

    A daemon on a full disk ends with words of its own, or without any.
    """
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    if not isinstance(error, (OSError, EnvironmentFault)):
        return False
    return free_kib(folder) < FULL_KIB or os.strerror(errno.ENOSPC) in str(error)


def free_kib(folder: Path) -> int:
    """What an ordinary user may still write to the disk of `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize >> 10


def host_identity() -> tuple[str, str]:
    """This machine's name, and the id of its current boot: after a reboot no process of a sandbox
    is left."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot_id = ""
    return socket.gethostname(), boot_id


@contextlib.contextmanager
def reserve_ports(num_nodes: int) -> Iterator[tuple[Ports, int]]:
    """Free ports for one sandbox and the number of their block, held against other sandboxes until
    left.

    A block is claimed by binding abstract Unix sockets, which exist once per machine, for every
    user, and vanish with this process; when the claim ends the daemons hold the ports themselves.
    Raises EnvironmentFault when no block is free.
    """
    units = -(-(num_nodes + 2) // _UNIT)
    blocks = len(_PORTS) // _UNIT
    start = os.getpid() % blocks
    for offset in range(blocks):
        unit = (start + offset) % blocks
        if unit + units > blocks:
            continue
        with contextlib.ExitStack() as held:
            first = _PORTS.start + unit * _UNIT
            if not all(_claim_unit(held, unit + index) for index in range(units)):
                continue
            if not all(_is_free(port) for port in range(first, first + num_nodes + 2)):
                continue
            yield Ports(slurmctld=first, slurmdbd=first + 1, slurmd_first=first + 2), unit
            return
    raise EnvironmentFault(
        f"no {num_nodes + 2} free TCP ports in a row between {_PORTS.start} and {_PORTS.stop}",
        hint="hpctrain sandbox down ends sandboxes that are no longer needed",
    )


def _claim_unit(held: contextlib.ExitStack, unit: int) -> bool:
    claim = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    try:
        claim.bind(f"\0hpctrain-sandbox-ports-{unit}")
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
