"""Starts, recognizes and ends the processes of one sandbox, and never anybody else's.

A process is ours when its environment or its working directory says so: every daemon is started
with `HPCTRAIN_SANDBOX_PROCESS=<state directory>` in its environment and `<run directory>/here` as
working directory, and every task of a job gets the same variable. slurmstepd overwrites its
environment block with its title, so the working directory is the mark that stays. A process id
alone is never trusted: it is read together with the process's start time, and checked again just
before a signal (a recycled id is somebody else's process).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.base.errors import EnvironmentFault

MARK = "HPCTRAIN_SANDBOX_PROCESS"
PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One running process: its id with its start time in clock ticks since boot (proc(5), stat
    field 22)."""

    pid: int
    start_ticks: int
    parent: int
    name: str

    @property
    def is_alive(self) -> bool:
        found = read(self.pid)
        return found is not None and found.start_ticks == self.start_ticks


def read(pid: int) -> Process | None:
    """The process with this id, None when there is none or it is a zombie."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The name is in parentheses and may itself hold blanks and parentheses.
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()
    if fields[0] in ("Z", "X"):
        return None
    return Process(pid, int(fields[19]), int(fields[1]), name)


def start(
    role: str,
    argv: Sequence[str],
    *,
    state: str,
    run: str,
    environ: Mapping[str, str],
    log: Path,
    folder: str = "",
) -> None:
    """Start a daemon in a session of its own, marked as this sandbox's; its output is appended to
    `log`.

    `setsid --fork` makes it init's child at once (we never have a zombie to wait for), and the
    shell notes the id of the very process that becomes the daemon in `<run>/<role>.pid`; `of_role`
    reads it.
    """
    note = 'echo $$ >"$0.new" && mv "$0.new" "$0" && exec "$@"'
    pid_file = os.path.join(run, f"{role}.pid")
    command = ["setsid", "--fork", "/bin/sh", "-c", note, pid_file, *argv]
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(pid_file)
        with open(log, "ab") as stream:
            subprocess.run(
                command,
                cwd=os.path.join(run, "here", folder),
                env={**environ, MARK: state},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                check=True,
            )
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentFault(f"cannot start {role}: {error}", where=str(log)) from error
    deadline = time.monotonic() + 30
    while not os.path.exists(pid_file):
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"{role} was not started within 30 s", where=str(log), hint="is the disk full?"
            )
        time.sleep(0.002)


def of_role(role: str, *, state: str, run: str) -> Process | None:
    """The live daemon that was started as `role`, None when it ended; an id that is now another
    process is not it."""
    try:
        pid = int(Path(run, f"{role}.pid").read_text())
    except (OSError, ValueError):
        return None
    process = read(pid)
    return (
        process
        if process is not None and _is_marked(pid, state, os.path.join(run, "here"))
        else None
    )


def of_sandbox(state: str, run: str) -> list[Process]:
    """Every live process of the sandbox: the marked ones and all their descendants, without
    ourselves."""
    everything = {process.pid: process for process in _all()}
    here = os.path.join(run, "here")
    ours = {pid for pid in everything if _is_marked(pid, state, here)}
    children: dict[int, list[int]] = {}
    for process in everything.values():
        children.setdefault(process.parent, []).append(process.pid)
    queue = list(ours)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child not in ours:
                ours.add(child)
                queue.append(child)
    return [everything[pid] for pid in sorted(ours - _own_family(everything))]


def out_of_sight(state: str, run: str) -> str:
    """Why processes of the sandbox cannot be told or ended from here though some are running, ""
    when none is hidden.

    In another user namespace their environment and working directory may not be read, in another
    PID namespace they are not there at all; but the socket of their munged lies in a file system,
    and answers whoever may open it.
    """
    for path in sorted(Path(run).glob("*.pid")):
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            if state.encode() in (PROC / str(pid) / "cmdline").read_bytes() and not _may_look(pid):
                return (
                    f"{path.name[:-4]} (process {pid}) runs in another user namespace, and may not"
                    " be looked at from this one"
                )
    if of_role("munged", state=state, run=run):
        return ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.path.join(run, "munge.socket"))
        except OSError:
            return ""
    return (
        "its munged answers and is not among the processes here: it runs in another PID namespace"
    )


def _may_look(pid: int) -> bool:
    try:
        os.readlink(PROC / str(pid) / "cwd")
    except PermissionError:
        return False
    except OSError:
        return True  # it has just ended
    return True


def of_node(node: str, state: str, run: str) -> list[Process]:
    """Everything that runs on one simulated node: its slurmd, the slurmstepds it started, and all
    their tasks."""
    everything = of_sandbox(state, run)
    children: dict[int, list[Process]] = {}
    for process in everything:
        children.setdefault(process.parent, []).append(process)
    queue = [
        process
        for process in everything
        if _is_on(process.pid, node, os.path.join(run, "here", node))
    ]
    found = {process.pid: process for process in queue}
    while queue:
        for child in children.get(queue.pop().pid, ()):
            if child.pid not in found:
                found[child.pid] = child
                queue.append(child)
    return list(found.values())


def steps_of_node(node: str, state: str, run: str) -> list[Process]:
    """What runs on a simulated node beside its slurmd: the slurmstepds, which leave slurmd's family
    at once, and their tasks."""
    slurmd = of_role(f"slurmd-{node}", state=state, run=run)
    found = of_node(node, state, run)
    if slurmd is None:
        return found
    # Above slurmd there is the bubblewrap of its view, if it has one; below it what it has just
    # started.
    return [
        process
        for process in found
        if slurmd.pid not in (process.pid, process.parent) and process.pid != slurmd.parent
    ]


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL at once, as a node that loses power."""
    left = [process for process in processes if _signal(process, signal.SIGKILL)]
    _wait(left, 5.0)


def end(processes: Iterable[Process], run: str, *, grace_s: float = 3.0) -> list[Process]:
    """End daemons at once and tasks with SIGTERM, then SIGKILL after `grace_s`; returns those that
    survived even that.

    The daemons' files are deleted right after, so they need no time to put them in order; the tasks
    are the user's.
    """
    here = os.path.join(run, "here")
    daemons: list[Process] = []
    tasks: list[Process] = []
    for process in processes:
        (daemons if _is_below(process.pid, here) else tasks).append(process)
    left = [process for process in daemons if _signal(process, signal.SIGKILL)]
    left_tasks = _wait([process for process in tasks if _signal(process, signal.SIGTERM)], grace_s)
    for process in left_tasks:
        _signal(process, signal.SIGKILL)
    return _wait(left + left_tasks, 5.0)


def _wait(processes: list[Process], limit_s: float) -> list[Process]:
    deadline = time.monotonic() + limit_s
    while processes and time.monotonic() < deadline:
        processes = [process for process in processes if process.is_alive]
        if processes:
            time.sleep(0.02)
    return processes


def _signal(process: Process, number: int) -> bool:
    """Send a signal to exactly this process. With a pidfd (Linux 5.3, Python 3.9) there is no
    moment in between."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        descriptor = -1
    try:
        if not process.is_alive:
            return False
        if descriptor >= 0 and hasattr(signal, "pidfd_send_signal"):
            signal.pidfd_send_signal(descriptor, number)
        else:
            os.kill(process.pid, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _all() -> list[Process]:
    found = (read(int(entry)) for entry in os.listdir(PROC) if entry.isdigit())
    return [process for process in found if process is not None]


def _is_marked(pid: int, state: str, here: str) -> bool:
    folder = PROC / str(pid)
    try:
        if os.stat(folder).st_uid != os.geteuid() and os.geteuid() != 0:
            return False
        if f"{MARK}={state}".encode() in (folder / "environ").read_bytes().split(b"\0"):
            return True
    except OSError:
        pass
    return _is_below(pid, here)


def _is_below(pid: int, here: str) -> bool:
    """Whether a process works in `here` or below: only daemons do (also when the directory was
    deleted meanwhile)."""
    try:
        where = os.readlink(PROC / str(pid) / "cwd")
    except OSError:
        return False
    return where == here or where.startswith((here + "/", here + " (deleted)"))


def _is_on(pid: int, node: str, here: str) -> bool:
    folder = PROC / str(pid)
    try:
        if os.readlink(folder / "cwd") == here:
            return True
        return f"SLURMD_NODENAME={node}".encode() in (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _own_family(everything: Mapping[int, Process]) -> set[int]:
    """Ourselves and our ancestors: `sandbox down` typed inside a job must be able to finish."""
    family, pid = set(), os.getpid()
    while pid > 0 and pid not in family:
        family.add(pid)
        pid = everything[pid].parent if pid in everything else 0
    return family
