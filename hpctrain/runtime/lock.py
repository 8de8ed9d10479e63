"""One link at a time: a lock in the checkpoint folder that outlives its holder's node, and yields when Slurm says it died."""

import errno
import json
import os
import re
import socket
import subprocess
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from .files import read_text, share_with_group, sync_folder, write_all, write_atomic
from .settings import GuardError

PREFIX = ".hpctrain-lock."
# A holder that runs is a mistake of somebody's; one that is ending, or a Slurm that does not answer, is waited for.
WAIT_S = {"alive": 60.0, "ending": 600.0, "unknown": 600.0}
ENDING_STATES = ("COMPLETING", "STAGE_OUT", "SIGNALING")
ALIVE_STATES = ("RUNNING", "SUSPENDED", "STOPPED", "CONFIGURING", "RESIZING")


class Holder(NamedTuple):
    """Who holds, or wants, the lock: a Slurm job and its restart count, or without Slurm a process group on a host."""

    job_id: str
    restart: int
    host: str
    pid: int
    run: str


def this_holder(run: str, environ: Mapping[str, str]) -> Holder:
    """The job this process runs in; outside Slurm the process group, which is the job script's."""
    restart = environ.get("SLURM_RESTART_COUNT", "0")
    job_id = environ.get("SLURM_JOB_ID", "")
    pid = 0 if job_id else os.getpgrp()
    return Holder(job_id, int(restart) if restart.isdigit() else 0, socket.gethostname(), pid, run)


def state_of(holder: Holder) -> str:
    """`alive`, `ending`, `dead` or `unknown`, as Slurm (or, for a plain process, this host) says."""
    if not holder.job_id:
        if holder.host != socket.gethostname():
            return "unknown"
        return "alive" if holder.pid > 0 and _group_runs(holder.pid) else "dead"
    try:
        done = subprocess.run(["scontrol", "show", "job", "-o", holder.job_id], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        gone = "Invalid job id" in done.stderr.decode("utf-8", "replace")
        return "dead" if gone else "unknown"
    return _job_state(said, holder.restart)


def _job_state(said: str, restart: int) -> str:
    states = []
    for line in said.splitlines():
        state = re.search(r"\bJobState=(\w+)", line)
        restarts = re.search(r"\bRestarts=(\d+)", line)
        if state and not (restarts and int(restarts.group(1)) > restart):
            states.append(state.group(1))  # a later restart means that the holder's is over
    if any(state in ALIVE_STATES for state in states):
        return "alive"
    return "ending" if any(state in ENDING_STATES for state in states) else "dead"


def _group_runs(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Lock:
    """Generations `.hpctrain-lock.N`: the greatest is in force, held by the job written in it or released.

    Taking it is making generation N+1, which the file system lets one process do; whoever then does not hold the
    greatest has lost. The greatest is never removed, so that a slow contender cannot make an old number anew.
    """

    def __init__(self, folder: str, me: Holder, ask: Callable[[Holder], str] = state_of,
                 say: Callable[[str], None] = lambda text: None, environ: Optional[Mapping[str, str]] = None) -> None:  # fmt: skip
        self.folder, self.me, self.ask, self.say = folder, me, ask, say
        limit = (environ or os.environ).get("HPCTRAIN_LOCK_WAIT_S", "")
        self.longest_s = float(limit) if re.match(r"\d+(\.\d+)?\Z", limit) else None

    def acquire(self) -> None:
        """Hold the lock when this returns. Raises GuardError when another link holds it, or may for all that is known."""
        begun, last = time.monotonic(), ""
        while True:
            number, holder = self._current()
            if holder is None or holder.job_id == self.me.job_id != "" or holder == self.me:
                if holder == self.me or self._take(number + 1):
                    return
                continue
            state = self.ask(holder)
            if state == "dead":
                if self._take(number + 1):
                    self.say("{} left its lock behind and has ended: taken over".format(_name(holder)))
                    return
                continue
            wait_s = WAIT_S[state] if self.longest_s is None else min(WAIT_S[state], self.longest_s)
            if time.monotonic() - begun >= wait_s:
                raise GuardError(self._refusal(number, holder, state))
            if state != last:
                self.say("waiting up to {:.0f} s for {}, which {}".format(wait_s, _name(holder), _SAID[state]))
                last = state
            time.sleep(min(5.0, max(wait_s / 10, 0.05)))

    def release(self) -> None:
        """Let the next link have it; does nothing when it is not ours any more."""
        number, holder = self._current()
        if holder == self.me:
            write_atomic(self._path(number), json.dumps({"released": True, "by": self.me._asdict()}) + "\n")

    def holder(self) -> Optional[Holder]:
        """Who holds the lock now, None when nobody does."""
        return self._current()[1]

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, "{}{:06d}".format(PREFIX, number))

    def _numbers(self) -> List[int]:
        found = []
        for name in os.listdir(self.folder):
            if name.startswith(PREFIX) and name[len(PREFIX) :].isdigit():
                found.append(int(name[len(PREFIX) :]))
        return found

    def _current(self) -> Tuple[int, Optional[Holder]]:
        number = max(self._numbers() + [0])
        if number == 0:
            return 0, None
        return number, _parse(read_text(self._path(number)))

    def _take(self, number: int) -> bool:
        """Make generation `number` with us in it; False when another was faster."""
        if not _create(self._path(number), json.dumps(self.me._asdict()) + "\n"):
            return False
        numbers = self._numbers()
        if max(numbers) != number:
            os.unlink(self._path(number))
            return False
        for old in numbers:
            if old < number:
                try:
                    os.unlink(self._path(old))
                except FileNotFoundError:
                    pass
        return True

    def _refusal(self, number: int, holder: Holder, state: str) -> str:
        hint = "if you are sure that it has ended, remove `{}`".format(self._path(number))
        return "{} {} and works in `{}`: two at once would corrupt its checkpoints; {}".format(
            _name(holder), _SAID[state], self.folder, hint)  # fmt: skip


_SAID = {"alive": "is running", "ending": "is ending", "unknown": "may still run (Slurm cannot tell)"}


def _name(holder: Holder) -> str:
    if holder.job_id:
        return "job {} of run `{}`".format(holder.job_id, holder.run)
    return "process group {} on {} of run `{}`".format(holder.pid, holder.host, holder.run)


def _parse(text: Optional[str]) -> Optional[Holder]:
    """The holder in a lock file; None for a released one, and for one that a crash left empty as it was made."""
    try:
        found: Dict[str, Any] = json.loads(text or "")
        if found.get("released"):
            return None
        return Holder(
            str(found["job_id"]), int(found["restart"]), str(found["host"]), int(found["pid"]), str(found["run"])
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _create(path: str, text: str) -> bool:
    """Make a file with its content in one step, False when the name is taken: written aside, then linked to its name."""
    folder = os.path.dirname(path)
    temp = os.path.join(folder, "{}new-{}-{}".format(PREFIX, socket.gethostname(), os.getpid()))
    try:
        os.unlink(temp)
    except FileNotFoundError:
        pass
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            write_all(fd, text.encode("utf-8", "backslashreplace"))
            share_with_group(fd, folder)
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(temp, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            return _create_without_links(path, text)
        sync_folder(folder)
        return True
    finally:
        os.unlink(temp)


def _create_without_links(path: str, text: str) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        write_all(fd, text.encode("utf-8", "backslashreplace"))
        os.fsync(fd)
    finally:
        os.close(fd)
    return True
