"""Which jobs in the queue are a run's, however they were submitted: by record, tag, folder and
script."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from hpctrain.base.errors import EnvironmentFault
from hpctrain.runs.records import RunRecords
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.jobs import Answer, Job, in_queue, of_user, query


def ask(runs: Sequence[RunRecords]) -> tuple[list[RunRecords], Answer]:
    """What Slurm tells of all jobs of the runs, and the runs with those that only squeue shows."""
    ids = [job_id for run in runs for job_id in run.job_ids()]
    if not ids and not slurm.have("squeue"):
        return list(runs), Answer({}, {})
    try:
        queue = of_user()
    except EnvironmentFault as error:
        answer = query(ids)
        silent = f"squeue: {error.problems[0].what}"
        unseen = tuple(dict.fromkeys([silent, *answer.unseen]))
        return list(runs), replace(answer, unseen=unseen, complete=False)
    runs = [with_queued(run, queue) for run in runs]
    return runs, query(list(dict.fromkeys(i for run in runs for i in run.job_ids())), queue)


def with_queued(run: RunRecords, queue: Sequence[Job]) -> RunRecords:
    """The run with the live jobs of `queue` that are its own and on no record; pure."""
    known = set(run.job_ids())
    extra = [job.job_id for job in queue if job.live and job.job_id not in known and owns(run, job)]
    return replace(run, queued=tuple(extra)) if extra else run


def owns(run: RunRecords, job: Job) -> bool:
    """Whether a job that nothing on record names is the run's: by our tag, or as its folder's."""
    if run.uid and job.comment.startswith(f"hpctrain:{run.uid}:"):
        return True
    folders = {run.run_dir, os.path.realpath(run.run_dir)}
    scripts = {os.path.join(folder, "job.sbatch") for folder in folders}
    started = any(job.command == path or job.command.startswith(path + " ") for path in scripts)
    return started or (job.work_dir in folders and job.name == run.name)


def link_in_tag(job: Job) -> tuple[int | None, str]:
    """The link that a job of ours is or serves, and its kind, by its tag; (None, "") without
    one."""
    parts = job.comment.split(":")
    if len(parts) != 5 or parts[0] != "hpctrain" or not parts[2].isdigit():
        return None, ""
    return int(parts[2]), parts[3]


def live_jobs(run: RunRecords) -> list[Job]:
    """The run's jobs that wait, run or are ending now. Raises EnvironmentFault when Slurm does not
    answer: then nothing is known."""
    queue = of_user()
    listed = {job.job_id for job in queue}
    ids = set(run.job_ids())
    # What somebody else submitted for this run is not in this user's list.
    queue += in_queue(ids - listed - run.ended_jobs())
    return [job for job in queue if job.live and (job.job_id in ids or owns(run, job))]
