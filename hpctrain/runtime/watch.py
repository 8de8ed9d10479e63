"""Ends the step of a running link after its next checkpoint, once the file STOP is there: what a
person asked for is true for programs too that know nothing of it."""

import os
import signal
import subprocess
import time
from typing import Any, Callable, List, Mapping, Optional

from .settings import Settings, read_settings
from .survey import Survey

Say = Callable[[str], None]
# Between TERM and KILL, when a step has nothing to save any more.
GRACE_S = 30.0


def watch(run_dir: str, every_s: float = 20.0) -> Optional[str]:
    """Wait for STOP, and then for a checkpoint that is newer than what was there and was complete
    at the look before too; its name.

    None at once for a program whose checkpoints are not known, and once the target is reached: such
    a step goes on to its own end.
    """
    settings = read_settings(run_dir)
    if settings.layout == "none":
        return None
    while not os.path.lexists(os.path.join(run_dir, "STOP")):
        time.sleep(every_s)
    before = last = _newest(settings)
    while True:
        time.sleep(every_s)
        newest = _newest(settings)
        if newest is not None and last is not None and before not in (newest, last):
            reached = settings.target is not None and (newest.number or 0) >= settings.target
            return None if reached else str(newest.name)
        last = newest


def _newest(settings: Settings) -> Any:
    try:
        return Survey(settings).newest_complete()
    except OSError:
        return None  # a file system that does not answer now proves nothing


def end_step(
    run_dir: str, pid: int, patience_s: float, every_s: float, environ: Mapping[str, str], say: Say
) -> bool:
    """`watch`, and then end the step that process `pid` of the batch script started: TERM, and KILL
    after GRACE_S. True when it was ended.

    A step that saves on its signal gets `patience_s` seconds to leave by itself.
    """
    decided: List[str] = []
    # The job script ends this watcher with TERM; from the decision on that is a success.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0 if decided else 1))
    name = watch(run_dir, every_s)
    if name is None or _gone_within(pid, patience_s):
        return False
    decided.append(name)
    say("STOP is there and `{}` is complete: the step ends now".format(name))
    job_id = environ.get("SLURM_JOB_ID", "")
    if not _signal_steps(job_id, ["--signal=TERM"]):
        os.kill(pid, signal.SIGTERM)
    if not _gone_within(pid, GRACE_S):
        say("it is still there after {:g} s, and is killed".format(GRACE_S))
        _signal_steps(job_id, ["--signal=KILL"])
        _gone_within(pid, GRACE_S)
    return True


def _signal_steps(job_id: str, words: List[str]) -> bool:
    """Signal the job's numbered steps: srun itself would kill its tasks at once on TERM."""
    ask = ["squeue", "--noheader", "--steps", "--jobs=" + job_id, "--format=%i"]
    steps = [name for name in _output(ask).split() if name.rpartition(".")[2].isdigit()]
    return bool(steps) and _run(["scancel", *words, *steps]) is not None


def _output(argv: List[str]) -> str:
    found = _run(argv)
    return "" if found is None else found


def _run(argv: List[str]) -> Optional[str]:
    """What a command says, None where it fails."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        done = subprocess.run(argv, timeout=60, **pipes)  # type: ignore[call-overload]
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else str(done.stdout.decode("utf-8", "replace"))


def _gone_within(pid: int, limit_s: float) -> bool:
    """Whether the process ends within so many seconds, as far as /proc tells: one that waits for
    its parent to look has ended."""
    until = time.monotonic() + limit_s
    while True:
        try:
            with open("/proc/{}/stat".format(pid), encoding="utf-8", errors="replace") as file:
                state = file.read().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return True
        if state == "Z":
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.2)
