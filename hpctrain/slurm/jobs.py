"""The state of jobs as squeue and sacct tell it: one call of each for any number of jobs, times in UTC.

The parsers are pure and take whatever Slurm prints; what they do not understand they leave out.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hpctrain.base.errors import EnvironmentFault
from hpctrain.base.units import expand_nodes
from hpctrain.slurm import commands as slurm

# man squeue, JOB STATE CODES: what can still change by itself.
PENDING_STATES = frozenset(
    {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "RESV_DEL_HOLD"}
)
RUNNING_STATES = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})
_SEPARATOR = "\x1f"
_SQUEUE = ("%i", "%T", "%r", "%S", "%V", "%N", "%D", "%e", "%Z", "%j")
_SACCT = (
    "JobIDRaw",
    "JobID",
    "State",
    "ExitCode",
    "Submit",
    "Start",
    "End",
    "ElapsedRaw",
    "NodeList",
    "NNodes",
    "WorkDir",
    "JobName",
)


@dataclass(frozen=True)
class JobState:
    """One job (or one earlier start of it) as Slurm tells it. Times: UTC seconds since 1970; for a pending job `start_s` is expected."""

    job_id: str
    state: str
    source: str
    reason: str = ""
    exit_code: int | None = None
    signal: int | None = None
    submit_s: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    elapsed_s: int | None = None
    nodes: tuple[str, ...] = ()
    num_nodes: int | None = None
    work_dir: str = ""
    name: str = ""

    @property
    def pending(self) -> bool:
        return self.state in PENDING_STATES

    @property
    def running(self) -> bool:
        return self.state in RUNNING_STATES


@dataclass(frozen=True)
class Answer:
    """The newest state of each job, the earlier starts of requeued ones, and what could not be asked."""

    jobs: dict[str, JobState]
    earlier: dict[str, list[JobState]]
    unseen: tuple[str, ...] = ()
    complete: bool = False  # squeue and sacct both answered

    def forgotten(self, job_ids: Iterable[str], ended: Iterable[str] = ()) -> list[str]:
        """What to say of jobs that neither squeue nor sacct knows; not of those whose end is recorded elsewhere (`ended`)."""
        known = {*self.jobs, *ended}
        lost = [job_id for job_id in job_ids if job_id not in known] if self.complete else []
        if not lost:
            return []
        which = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        return [
            f"Slurm knows nothing (any more) of job{'s' if len(lost) > 1 else ''} {which}: how they ended is not seen"
        ]


def query(job_ids: Sequence[str]) -> Answer:
    """Ask squeue and then sacct about the jobs, once each. What is missing or does not answer is told in `unseen`."""
    jobs: dict[str, JobState] = {}
    earlier: dict[str, list[JobState]] = {}
    if not job_ids:
        return Answer(jobs, earlier)
    unseen: list[str] = []
    listed = ",".join(job_ids)
    try:
        for job in parse_squeue(
            _ask(["squeue", "--noheader", "--states=all", f"--jobs={listed}", f"--format={_SEPARATOR.join(_SQUEUE)}"])
        ):
            jobs[job.job_id] = job
    except EnvironmentFault as error:
        unseen.append(f"squeue: {error.problems[0].what}")
    try:
        found = parse_sacct(_ask(["sacct", "--noheader", "--parsable2", f"--delimiter={_SEPARATOR}", "--allocations",
                                  "--duplicates", f"--jobs={listed}", f"--format={','.join(_SACCT)}"]))  # fmt: skip
        for job_id, records in found.items():
            newest = records[-1]
            if job_id not in jobs:
                jobs[job_id] = newest
            else:
                jobs[job_id] = merge(jobs[job_id], newest)
            earlier[job_id] = records[:-1]
    except EnvironmentFault as error:
        unseen.append(f"sacct: {error.problems[0].what}")
    return Answer(jobs, earlier, tuple(unseen), not unseen)


def _ask(argv: list[str]) -> str:
    """Run it in UTC. Raises EnvironmentFault when it is missing, silent, or answers only with an error."""
    if not slurm.have(argv[0]):
        raise EnvironmentFault(f"there is no `{argv[0]}` here")
    # Both print local time without a zone; `env` gives them UTC, whatever the login node's zone is.
    done = slurm.run(["env", "TZ=UTC0", *argv], timeout_s=60)
    words = (done.stderr or "").strip()
    if done.returncode and not done.stdout.strip():
        if "Invalid job id" in words:
            return ""
        raise EnvironmentFault(words.splitlines()[-1] if words else f"exit code {done.returncode}")
    return done.stdout


def parse_squeue(text: str) -> list[JobState]:
    """The jobs in squeue's answer in our format; malformed lines are left out."""
    out = []
    for line in text.splitlines():
        fields = line.split(_SEPARATOR)
        if len(fields) != len(_SQUEUE) or not fields[0][:1].isdigit():
            continue
        job_id, state, reason, start, submit, nodes, num_nodes, end, work_dir, name = (
            field.strip() for field in fields
        )
        out.append(JobState(
            job_id, state, "squeue", "" if reason in ("None", "(null)") else reason, None, None, _time(submit), _time(start),
            _time(end), None, _nodes(nodes), _number(num_nodes), work_dir, name,
        ))  # fmt: skip
    return out


def parse_sacct(text: str) -> dict[str, list[JobState]]:
    """Every start of each job in sacct's answer, oldest first."""
    out: dict[str, list[JobState]] = {}
    for line in text.splitlines():
        fields = line.split(_SEPARATOR)
        if len(fields) != len(_SACCT) or not fields[0][:1].isdigit():
            continue
        _, job_id, state, code, submit, start, end, elapsed, nodes, num_nodes, work_dir, name = (
            field.strip() for field in fields
        )
        exit_code, _, signal = code.partition(":")
        out.setdefault(job_id, []).append(JobState(
            job_id, state.split(" ")[0], "sacct", "by " + state.split(" by ")[1] if " by " in state else "",
            _number(exit_code), _number(signal) or None, _time(submit), _time(start), _time(end), _number(elapsed), _nodes(nodes),
            _number(num_nodes), work_dir, name,
        ))  # fmt: skip
    for records in out.values():
        records.sort(key=lambda job: (job.submit_s or 0, job.start_s or float("inf")))
    return out


def merge(queue: JobState, accounting: JobState) -> JobState:
    """squeue knows the present, sacct the exit code and elapsed time; of a job that has ended sacct knows more."""
    if queue.pending or queue.running:
        same_start = accounting.start_s is None or queue.start_s is None or abs(accounting.start_s - queue.start_s) < 2
        return replace(queue, elapsed_s=accounting.elapsed_s if queue.running and same_start else None)
    return replace(
        accounting,
        nodes=accounting.nodes or queue.nodes,
        source="squeue+sacct",
        reason=queue.reason or accounting.reason,
    )


def work_dir_of(job_id: str) -> str | None:
    """The working directory Slurm knows for a job, which for ours is the run directory; None when nobody knows."""
    job = query([job_id]).jobs.get(job_id)
    return job.work_dir or None if job else None


def _time(text: str) -> float | None:
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=datetime.timezone.utc).timestamp()
    except ValueError:
        return None


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _nodes(text: str) -> tuple[str, ...]:
    if text in ("", "None assigned", "(null)", "n/a"):
        return ()
    try:
        return tuple(expand_nodes(text))
    except ValueError:
        return (text,)
