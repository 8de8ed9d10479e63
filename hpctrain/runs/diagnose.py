"""What to triage: a run's logs with what Slurm and the run directory know of them, or any log
files."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.runs import daemons
from hpctrain.runs.live import ask
from hpctrain.runs.records import RunRecords, by_hand, find_one, list_logs, read_run
from hpctrain.runs.starts import Start, starts_of
from hpctrain.slurm.jobs import Answer
from hpctrain.triage.attempt import Attempt
from hpctrain.triage.engine import Engine
from hpctrain.triage.judge import Diagnosis, in_order, judge
from hpctrain.triage.read import Follower, follow, read_logs
from hpctrain.triage.rules import RED, Circumstances
from hpctrain.triage.thresholds import Thresholds


@dataclass
class Subject:
    """The logs to judge and what is known beside them. `run` is None for bare log files."""

    paths: list[str]
    thresholds: Thresholds
    run: RunRecords | None = None
    slurm: Answer = field(default_factory=lambda: Answer({}, {}))
    engine: Engine = field(init=False)
    unreadable: list[str] = field(default_factory=list)
    happenings: list[daemons.Happening] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = Engine(self.thresholds, self.run.tasks_per_node if self.run else None)

    def diagnose(self, on_progress: Callable[[int, int, str], None] | None = None) -> Diagnosis:
        """Read all logs to their ends and judge. `on_progress` is told (bytes read, of how many,
        the failure seen first)."""
        total, done = sum(map(_size, self.paths)), 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            if on_progress:
                on_progress(done, max(total, done), self._first_failure())

        read_logs(
            self.engine, self.paths, on_bytes, unreadable=self.unreadable if self.run else None
        )
        return self.judge()

    def _first_failure(self) -> str:
        """The first failure of the start that is being read, as far as its log was read."""
        last = self.engine.attempts[-1] if self.engine.attempts else None
        events = [kept[0] for kept in last.events.values() if kept] if last else []
        events = [event for event in events if not event.weak and last and not last.survived(event)]
        if not events:
            return ""
        first = min(events, key=lambda event: event.order)
        who = f", node {first.node}" if first.node else ""
        if first.rank is not None:
            who = f", rank {first.rank}"
        return f"{first.failure} at {os.path.basename(first.place.file)}:{first.place.number}{who}"

    @property
    def unseen(self) -> list[str]:
        """What could not be asked or read."""
        forgotten = (
            self.slurm.forgotten(self.run.job_ids(), self.run.ended_jobs()) if self.run else []
        )
        return [
            *(self.run.unseen if self.run else ()),
            *self.slurm.unseen,
            *forgotten,
            *self.unreadable,
        ]

    def judge(self) -> Diagnosis:
        """Judge what was read so far, with what is known now."""
        attempts = in_order(self.engine.attempts)
        known = starts_of(self.run, self.slurm, time.time()) if self.run else []
        starts = {(start.job_id, start.restart): start for start in known}
        for attempt in attempts:
            self._complete(attempt, starts.get((attempt.job_id or "", attempt.restart)))
        around = (
            self._circumstances(attempts[-1])
            if attempts
            else Circumstances(running=self._anything_runs())
        )
        diagnosis = judge(self.engine, around, self.run.recipe if self.run else None)
        return dataclasses.replace(
            diagnosis, remarks=(*diagnosis.remarks, *self._beside_the_logs(attempts))
        )

    def ask_slurm(self) -> None:
        """Ask squeue, sacct and scontrol of the run's jobs and nodes, each once."""
        assert self.run is not None
        (self.run,), self.slurm = ask([self.run])
        starts = self._starts()
        nodes = dict.fromkeys(node for start in starts for node in start.nodes)
        if starts:
            self.happenings, unseen = daemons.ask(list(nodes))
            self.slurm = dataclasses.replace(self.slurm, unseen=(*self.slurm.unseen, *unseen))

    def _starts(self) -> list[Start]:
        """Each start of the run's jobs that trained, oldest first."""
        assert self.run is not None
        began = [start for start in starts_of(self.run, self.slurm, time.time()) if start.trained]
        out = sorted(began, key=lambda start: start.start_s or 0.0)
        for index, start in enumerate(out[:-1]):
            if start.end_s is None:  # the next link waits for the one before it
                out[index] = dataclasses.replace(start, end_s=out[index + 1].start_s)
        return out

    def _beside_the_logs(self, attempts: Sequence[Attempt]) -> list[str]:
        """What Slurm and the records tell and no log does."""
        if self.run is None:
            return []
        out = [
            f"job {job_id} is none that `hpctrain chain` queued: job.sbatch was submitted by hand"
            for job_id in by_hand(self.run)
        ]
        told = {attempt.job_id for attempt in attempts}
        cancelled = {
            str(record.get("job_id"))
            for record in self.run.ledger
            if record.get("event") == "cancelled"
        }
        for job_id, state in self.slurm.jobs.items():
            silent = (
                job_id not in told
                and job_id not in cancelled
                and not (state.running or state.pending)
            )
            if silent and state.state != "COMPLETED":
                out.append(f"job {job_id} ended without a log; Slurm says {state.state}")
        if self.happenings:
            out += daemons.remarks(self.happenings, self._starts(), time.time())
        return out

    def _complete(self, attempt: Attempt, start: Start | None) -> None:
        """Give an attempt what its log does not say: link, mode, nodes, exit code, and how Slurm
        ended it."""
        if start is None:
            return
        attempt.link = start.link if attempt.link is None else attempt.link
        attempt.mode = attempt.mode or start.mode
        attempt.nodes = attempt.nodes or list(start.nodes)
        if attempt.exit_code is None and start.recorded:
            attempt.exit_code = start.exit_code
        if start.by_slurm and start.ended:
            attempt.slurm_state, attempt.slurm_signal = start.state, start.signal

    def _anything_runs(self) -> bool | None:
        if not self.slurm.jobs:
            return None
        return any(job.running or job.pending for job in self.slurm.jobs.values())

    def _circumstances(self, last: Attempt) -> Circumstances:
        state = self.slurm.jobs.get(last.job_id or "")
        reader = self.engine.logs.get(last.file)
        modified = reader.modified_s if reader else None
        if state is None:
            return Circumstances(running=None)
        if state.running and last.exit_code is None:
            silent = max(time.time() - modified, 0.0) if modified is not None else None
            return Circumstances(running=True, silent_s=silent)
        return Circumstances(
            running=False, ended_s=state.end_s if _same_clock(last, state.end_s) else None
        )


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _same_clock(attempt: Attempt, end_s: float | None) -> bool:
    """Whether the log's times can be set against Slurm's, which are UTC; logs may be in local time,
    which only shows at hours' distance."""
    if end_s is None or attempt.last_step_time_s is None:
        return False
    return 0 <= end_s - attempt.last_step_time_s


def open_target(target: Sequence[str], thresholds: Thresholds | None = None) -> Subject:
    """The logs that the words name. Raises UsageError when they name nothing."""
    thresholds = thresholds or Thresholds()
    if target and all(
        os.path.isfile(path) and not path.endswith((".yaml", ".yml")) for path in target
    ):
        return Subject(list(target), thresholds, run=_run_of_logs(target), slurm=Answer({}, {}))
    if len(target) > 1:
        missing = [path for path in target if not os.path.isfile(path)]
        raise UsageError(
            f"`{missing[0]}` is not a log file", hint="name one run, or log files only"
        )
    run = read_run(find_one(target[0] if target else None))
    subject = Subject(list(run.logs), thresholds, run)
    subject.ask_slurm()
    return subject


def _run_of_logs(paths: Sequence[str]) -> RunRecords | None:
    """The run that the log files belong to, when they lie in one run directory's logs folder."""
    folders = {os.path.dirname(os.path.dirname(os.path.abspath(path))) for path in paths}
    folder = folders.pop() if len(folders) == 1 else ""
    if folder and os.path.isfile(os.path.join(folder, "plan.json")):
        try:
            return read_run(folder)
        except EnvironmentFault:
            return None
    return None


def watch(subject: Subject, say: Callable[[str], None], every_s: float = 5.0) -> Diagnosis:
    """Follow the logs, say each change of the verdict, and return when a rule is RED or no job is
    left."""
    run = subject.run

    def paths() -> list[str]:
        return list_logs(run.run_dir) if run else subject.paths

    follower = Follower(subject.engine, paths)
    before = ""
    diagnosis = subject.judge()
    asked = 0.0
    for _ in follow(follower, every_s):
        if run and time.monotonic() - asked > 30:
            subject.run = read_run(run.run_dir)
            subject.ask_slurm()
            asked = time.monotonic()
        diagnosis = subject.judge()
        words = f"{diagnosis.verdict}: {diagnosis.summary}"
        if words != before:
            say(words)
            before = words
        if diagnosis.verdict == RED and (diagnosis.cause is None or not subject._anything_runs()):
            break
        if run and subject.slurm.jobs and not subject._anything_runs():
            break
    return diagnosis
