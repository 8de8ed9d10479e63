"""The state of jobs as squeue and sacct tell it: one call of each for any number of jobs, times in
UTC.

The parsers are pure and take whatever Slurm prints; what they do not understand they leave out.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from hpctrain.base.errors import EnvironmentFault
from hpctrain.base.units import expand_nodes
from hpctrain.slurm import answers
from hpctrain.slurm import commands as slurm

# man squeue, JOB STATE CODES: what can still change by itself.
PENDING_STATES = frozenset(
    "PENDING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT CONFIGURING RESV_DEL_HOLD".split()
)
RUNNING_STATES = frozenset(
    "RUNNING COMPLETING SUSPENDED STOPPED SIGNALING STAGE_OUT RESIZING".split()
)
LIVE_STATES = PENDING_STATES | RUNNING_STATES
_SEPARATOR = "\x1f"
_SQUEUE = ("%i", "%T", "%r", "%S", "%V", "%N", "%D", "%e", "%Z", "%j", "%k", "%o")
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
    "Comment",
)
_SQUEUE_FORMAT = f"--format={_SEPARATOR.join(_SQUEUE)}"
_SACCT_FORMAT = (
    "--noheader",
    "--parsable2",
    f"--delimiter={_SEPARATOR}",
    "--allocations",
    f"--format={','.join(_SACCT)}",
)


@dataclass(frozen=True)
class Job:
    """One job, or one earlier start of it, as Slurm tells it.

    Times: UTC seconds since 1970; for a pending job `start_s` is expected. `reason` says why it
    waits; `comment` is where the tag of a job of ours stands.
    """

    job_id: str
    state: str
    source: str = "squeue"
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
    comment: str = ""
    command: str = ""  # its script with arguments; empty where it came through a pipe

    @property
    def pending(self) -> bool:
        return self.state in PENDING_STATES

    @property
    def running(self) -> bool:
        return self.state in RUNNING_STATES

    @property
    def live(self) -> bool:
        """Whether it waits, runs or is ending: it may still do something."""
        return self.state in LIVE_STATES

    @property
    def stuck(self) -> tuple[str, str]:
        """What keeps it waiting until a person acts, and the command that changes it; else
        empty."""
        return answers.stuck(self.job_id, self.state, self.reason) if self.pending else ("", "")

    @property
    def expected_start_s(self) -> float | None:
        """When Slurm expects a waiting job to start; of one put back it tells the start before."""
        to_come = self.pending and (self.start_s or 0) > (self.submit_s or 0)
        return self.start_s if to_come and not self.stuck[0] else None


@dataclass(frozen=True)
class Answer:
    """The newest state of each job, the earlier starts of requeued ones, and what could not be
    asked."""

    jobs: dict[str, Job]
    earlier: dict[str, list[Job]]
    unseen: tuple[str, ...] = ()
    complete: bool = False  # squeue and sacct both answered

    def forgotten(self, job_ids: Iterable[str], ended: Iterable[str] = ()) -> list[str]:
        """What to say of jobs that neither squeue nor sacct knows; not of those whose end is
        recorded elsewhere (`ended`)."""
        known = {*self.jobs, *ended}
        lost = [job_id for job_id in job_ids if job_id not in known] if self.complete else []
        if not lost:
            return []
        which = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        return [
            f"Slurm knows nothing (any more) of job{'s' if len(lost) > 1 else ''} {which}: how they"
            " ended is not seen"
        ]


def query(job_ids: Sequence[str], queue: Sequence[Job] | None = None) -> Answer:
    """Ask about the jobs: squeue for those that are not in `queue` (`of_user`'s answer), and sacct.
    What is missing or does not answer is told in `unseen`."""
    wanted = set(job_ids)
    jobs = {job.job_id: job for job in queue or () if job.job_id in wanted}
    earlier: dict[str, list[Job]] = {}
    if not job_ids:
        return Answer(jobs, earlier)
    unseen: list[str] = []
    try:
        jobs.update((job.job_id, job) for job in in_queue(wanted - set(jobs)))
    except EnvironmentFault as error:
        unseen.append(f"squeue: {error.problems[0].what}")
    listed = ",".join(job_ids)
    try:
        found = parse_sacct(_ask(["sacct", *_SACCT_FORMAT, "--duplicates", f"--jobs={listed}"]))
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


def in_queue(job_ids: Collection[str]) -> list[Job]:
    """Those of the jobs that slurmctld knows, whosever they are. Raises EnvironmentFault."""
    if not job_ids:
        return []
    listed = f"--jobs={','.join(sorted(job_ids))}"
    return parse_squeue(_ask(["squeue", "--noheader", "--states=all", listed, _SQUEUE_FORMAT]))


def of_user(ids: Iterable[str] = ()) -> list[Job]:
    """This user's jobs that slurmctld knows now, those that ended minutes ago included.

    Only those of `ids` where some are given; ids that it has forgotten are left out. Raises
    EnvironmentFault when Slurm does not answer.
    """
    wanted = set(ids)
    # One unknown id would make squeue fail for all, so the ids are picked out of the list here.
    return [job for job in _squeue("--states=all") if not wanted or job.job_id in wanted]


def queued(*options: str) -> list[Job]:
    """This user's waiting and running jobs, array tasks one by one; `options` of squeue choose.

    Raises EnvironmentFault when Slurm does not answer.
    """
    return _squeue("--array", *options)


def ended_by_comment(comment: str) -> list[str]:
    """Ids of this user's jobs of two weeks with that comment, by accounting; [] without one.

    Raises NoAnswer when there is accounting, and it does not answer.
    """
    since = ["--starttime=now-14days", f"--user={os.getuid()}"]
    try:
        answer = parse_sacct(_ask(["sacct", *_SACCT_FORMAT, *since]))
    except slurm.NoAnswer:
        raise
    except EnvironmentFault:
        return []
    jobs = [records[-1] for records in answer.values()]
    return [job.job_id for job in jobs if job.comment == comment and job.job_id.isdigit()]


def _squeue(*options: str) -> list[Job]:
    user = f"--user={os.getuid()}"
    done = slurm.ask_in_utc(["squeue", "--noheader", user, *options, _SQUEUE_FORMAT])
    if done.returncode != 0:
        raise EnvironmentFault(f"squeue failed: {slurm.said(done)}")
    return parse_squeue(done.stdout)


def _ask(argv: list[str]) -> str:
    """Raises EnvironmentFault when it is missing, silent, or answers only with an error."""
    done = slurm.ask_in_utc(argv)
    words = (done.stderr or "").strip()
    if done.returncode and not done.stdout.strip():
        if "Invalid job id" in words:
            return ""
        raise EnvironmentFault(words.splitlines()[-1] if words else f"exit code {done.returncode}")
    return done.stdout


def parse_squeue(text: str) -> list[Job]:
    """The jobs in squeue's answer in our format; malformed lines are left out."""
    out = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(_SEPARATOR)]
        if len(fields) != len(_SQUEUE) or not fields[0][:1].isdigit():
            continue
        job_id, state, reason, start, submit, nodes, num_nodes, end, *words = fields
        work_dir, name, comment, command = ("" if word == "(null)" else word for word in words)
        out.append(
            Job(
                job_id,
                state,
                "squeue",
                reason="" if reason in ("None", "(null)") else reason,
                submit_s=parse_time(submit),
                start_s=parse_time(start),
                end_s=parse_time(end),
                nodes=node_names(nodes),
                num_nodes=_number(num_nodes),
                work_dir=work_dir,
                name=name,
                comment=comment,
                command=command,
            )
        )
    return out


def parse_sacct(text: str) -> dict[str, list[Job]]:
    """Every start of each job in sacct's answer, oldest first."""
    out: dict[str, list[Job]] = {}
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(_SEPARATOR)]
        if len(fields) != len(_SACCT) or not fields[0][:1].isdigit():
            continue
        _, job_id, state, code, submit, start, end, elapsed, nodes, num_nodes, *names = fields
        work_dir, name, comment = names
        exit_code, _, signal = code.partition(":")
        word, _, who = state.partition(" by ")
        out.setdefault(job_id, []).append(
            Job(
                job_id,
                word.split(" ")[0],
                "sacct",
                reason=f"by {who}" if who else "",
                exit_code=_number(exit_code),
                signal=_number(signal) or None,
                submit_s=parse_time(submit),
                start_s=parse_time(start),
                end_s=parse_time(end),
                elapsed_s=_number(elapsed),
                nodes=node_names(nodes),
                num_nodes=_number(num_nodes),
                work_dir=work_dir,
                name=name,
                comment=comment,
            )
        )
    for records in out.values():
        records.sort(key=lambda job: (job.submit_s or 0, job.start_s or float("inf")))
    return out


def merge(queue: Job, accounting: Job) -> Job:
    """squeue knows the present, sacct the exit code and elapsed time; of a job that has ended sacct
    knows more."""
    if queue.pending or queue.running:
        same_start = (
            accounting.start_s is None
            or queue.start_s is None
            or abs(accounting.start_s - queue.start_s) < 2
        )
        return replace(
            queue, elapsed_s=accounting.elapsed_s if queue.running and same_start else None
        )
    return replace(
        accounting,
        nodes=accounting.nodes or queue.nodes,
        source="squeue+sacct",
        reason=queue.reason or accounting.reason,
    )


def work_dir_of(job_id: str) -> str | None:
    """The working directory Slurm knows for a job, which for ours is the run directory; None when
    there is no such job. Raises EnvironmentFault where Slurm did not answer."""
    answer = query([job_id])
    job = answer.jobs.get(job_id)
    silent = [what for what in answer.unseen if what.startswith("squeue")]
    if job is None and silent and slurm.have("squeue"):
        raise EnvironmentFault(f"whose job {job_id} is, Slurm did not tell: {silent[0]}")
    return job.work_dir or None if job else None


def parse_time(text: object) -> float | None:
    """UTC seconds of `2026-11-21T01:52:08`, as Slurm writes it under TZ=UTC, or with a Z, as our
    records do; else None."""
    try:
        time = datetime.datetime.strptime(str(text).removesuffix("Z"), "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None
    return time.replace(tzinfo=datetime.timezone.utc).timestamp()


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def node_names(text: object) -> tuple[str, ...]:
    """The nodes in Slurm's compressed form; none where it names none, the text itself where it is
    no such form."""
    if not isinstance(text, str) or text in ("", "None assigned", "(null)", "n/a"):
        return ()
    try:
        return tuple(expand_nodes(text))
    except ValueError:
        return (text,)
