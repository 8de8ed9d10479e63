"""Stands beside the step of a running link: ends it after its next checkpoint, once the file STOP
is there, for programs too that know nothing of it; ends it when it is stuck, after the stacks of
all ranks were kept; and says, or does, what the run asks for when its figures are no numbers.

It is a process of its own: if it dies the step does not.
"""

import os
import signal
import subprocess
import time
from typing import Any, Callable, List, Mapping, Optional

from . import notify
from .files import append_record
from .progress import BAD_IN_A_ROW, Progress, State
from .settings import Settings, read_settings
from .survey import Survey

Say = Callable[[str], None]
# Between TERM and KILL, when a step has nothing to save any more.
GRACE_S = 30.0
# A shorter silence is none: until then collectives time out by themselves (torch: 10 minutes, Gloo
# 30).
FLOOR_S = 1800.0
_FIRST_BEAT_S, _BEAT_S = 60.0, 3600.0
_STACKS_LIMIT_S = 150

# On each node of the job: where each Python process of its steps stands, and what the GPUs say.
_STACKS = """
echo "== $(hostname) $(date -u +%FT%TZ)"
dmesg 2>/dev/null | grep -iE 'xid|amdgpu.*(fault|ras)' | tail -n 20
nvidia-smi --query-gpu=index,utilization.gpu,memory.used,ecc.errors.uncorrected.volatile.total \
  --format=csv,noheader 2>/dev/null
scontrol listpids "$SLURM_JOB_ID" 2>/dev/null | while read -r pid job step rest; do
  case $step in *[!0-9]* | '') continue ;; esac
  case $(cat "/proc/$pid/comm" 2>/dev/null) in *python* | pt_* | ray*) ;; *) continue ;; esac
  rank=$(tr '\\0' '\\n' <"/proc/$pid/environ" 2>/dev/null | sed -n 's/^SLURM_PROCID=//p')
  echo "-- rank ${rank:-?}, process $pid, waits in $(cat "/proc/$pid/wchan" 2>/dev/null)"
  if command -v py-spy >/dev/null; then timeout 20 py-spy dump --pid "$pid" 2>&1
  elif command -v gdb >/dev/null; then
    timeout 40 gdb -p "$pid" -batch -ex 'thread apply all bt' 2>/dev/null
  fi
done
"""


class Stuck(Exception):
    """The step is to be ended now; why."""


class Eyes:
    """What is looked at beside STOP, at each look: the job's own output. `policy` is run.yaml's
    `watch`: tell, save_and_stop or hold."""

    def __init__(
        self, run_dir: str, policy: str, environ: Mapping[str, str], say: Say, log: str
    ) -> None:
        self._run_dir, self._policy, self._say = run_dir, policy, say
        self._environ = environ
        floor_s = float(environ.get("HPCTRAIN_HANG_S") or FLOOR_S)
        self._progress = Progress(log, floor_s, time.monotonic())
        self._next_beat_s = time.monotonic() + _FIRST_BEAT_S
        self._told = False

    def look(self) -> None:
        """Read on; raises Stuck when the step is to be ended."""
        state = self._progress.look(time.monotonic())
        if time.monotonic() >= self._next_beat_s and state.step:
            self._next_beat_s = time.monotonic() + _BEAT_S
            self._record("alive", "step {}{}".format(state.step, _pace(state)), tell=False)
        if state.limit_s is not None and state.silent_s > state.limit_s:
            reason = "no word for {:.0f} s at step {}{}".format(
                state.silent_s, state.step, _pace(state)
            )
            self._record("stuck", "{}; stacks: {}".format(reason, self._keep_stacks()))
            raise Stuck(reason)
        if state.num_bad >= BAD_IN_A_ROW and not self._told:
            self._told = True
            self._on_red("the loss or the gradient is not finite at step {}".format(state.step))

    def _on_red(self, reason: str) -> None:
        self._record("red", "{}; on_red is {}".format(reason, self._policy))
        if self._policy != "tell":
            with open(os.path.join(self._run_dir, "STOP"), "a"):
                pass
        if self._policy == "hold":
            raise Stuck(reason)

    def _record(self, what: str, reason: str, tell: bool = True) -> None:
        record = {
            "event": "watch",
            "link": int(self._environ.get("HPCTRAIN_LINK") or 0),
            "job_id": self._environ.get("SLURM_JOB_ID", ""),
            "mode": what,
            "reason": reason,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        append_record(os.path.join(self._run_dir, "links.jsonl"), record)
        if tell:
            self._say("{}: {}".format(what, reason))
            settings = read_settings(self._run_dir)
            notify.tell(settings.notify, settings.run, record, self._environ)

    def _keep_stacks(self) -> str:
        """Where each rank stands, in a file of the run directory; its path."""
        folder = os.path.join(self._run_dir, "stacks")
        path = os.path.join(folder, "{}.txt".format(self._environ.get("SLURM_JOB_ID", "job")))
        nodes = self._environ.get("SLURM_JOB_NUM_NODES") or "1"
        each = ["srun", "--overlap", "--ntasks=" + nodes, "--nodes=" + nodes, "--mem=0"]
        for argv in ([*each, "sh", "-c", _STACKS], ["sh", "-c", _STACKS]):
            told = _run(argv, _STACKS_LIMIT_S)
            if told:
                break
        os.makedirs(folder, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            file.write(told or "nobody answered\n")
        return path


def _pace(state: State) -> str:
    return "" if state.median_s is None else ", {:.3g} s each".format(state.median_s)


def watch(
    run_dir: str, every_s: float = 20.0, look: Optional[Callable[[], None]] = None
) -> Optional[str]:
    """Wait for STOP, and then for a checkpoint that is newer than what was there and was complete
    at the look before too; its name.

    None once the target is reached: such a step goes on to its own end. None at once for a program
    whose checkpoints are not known, without a `look`; that is called each time, and what it raises
    is raised.
    """
    settings = read_settings(run_dir)
    known = settings.layout != "none"
    if look is None and not known:
        return None
    look = look or (lambda: None)
    while not (known and os.path.lexists(os.path.join(run_dir, "STOP"))):
        time.sleep(every_s)
        look()
    before = last = _newest(settings)
    while True:
        time.sleep(every_s)
        look()
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
    try:
        name = watch(run_dir, every_s, _careful_look(run_dir, environ, say))
    except Stuck as stuck:
        say("the step ends now: {}".format(stuck))
        _end(pid, environ, say)
        return False
    if name is None or _gone_within(pid, patience_s):
        return False
    decided.append(name)
    say("STOP is there and `{}` is complete: the step ends now".format(name))
    _end(pid, environ, say)
    return True


def _careful_look(run_dir: str, environ: Mapping[str, str], say: Say) -> Callable[[], None]:
    """A look that can fail without consequence: after its first error it looks no more."""
    policy = read_settings(run_dir).watch
    log = os.path.realpath("/proc/self/fd/1")
    eyes = []
    if policy != "off" and os.path.isfile(log):
        eyes.append(Eyes(run_dir, policy, environ, say, log))

    def look() -> None:
        for one in list(eyes):
            try:
                one.look()
            except Stuck:
                raise
            except Exception as error:
                eyes.clear()
                say("warning: nobody watches the steps any more: {!r}".format(error))

    return look


def _end(pid: int, environ: Mapping[str, str], say: Say) -> None:
    job_id = environ.get("SLURM_JOB_ID", "")
    if not _signal_steps(job_id, ["--signal=TERM"]):
        os.kill(pid, signal.SIGTERM)
    if not _gone_within(pid, GRACE_S):
        say("it is still there after {:g} s, and is killed".format(GRACE_S))
        _signal_steps(job_id, ["--signal=KILL"])
        _gone_within(pid, GRACE_S)


def _signal_steps(job_id: str, words: List[str]) -> bool:
    """Signal the job's numbered steps: srun itself would kill its tasks at once on TERM."""
    ask = ["squeue", "--noheader", "--steps", "--jobs=" + job_id, "--format=%i"]
    steps = [name for name in _output(ask).split() if name.rpartition(".")[2].isdigit()]
    return bool(steps) and _run(["scancel", *words, *steps]) is not None


def _output(argv: List[str]) -> str:
    found = _run(argv)
    return "" if found is None else found


def _run(argv: List[str], limit_s: float = 60.0) -> Optional[str]:
    """What a command says, None where it fails."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        done = subprocess.run(argv, timeout=limit_s, **pipes)  # type: ignore[call-overload]
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
