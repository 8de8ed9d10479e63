"""The starts of a run's jobs, from the ledger, the guard's records and Slurm."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from hpctrain.runs.records import LOG_JOB, RunRecords, parse_time
from hpctrain.slurm.jobs import Answer


@dataclass(frozen=True)
class Start:
    """One start of a job: a link, or the same link again after a requeue. Times: UTC seconds since 1970."""

    link: int | None
    job_id: str
    restart: int
    state: str
    start_s: float | None
    end_s: float | None
    elapsed_s: float | None
    source: str


def starts_of(run: RunRecords, answer: Answer, now_s: float) -> list[Start]:
    """Every start of every job of the run: Slurm's account of it, else what links.jsonl and the order of starts tell."""
    links = {str(r.get("job_id")): r.get("link") for r in (*run.ledger, *run.links) if isinstance(r.get("link"), int)}
    out = []
    for job_id in run.job_ids():
        records = [*answer.earlier.get(job_id, []), *([answer.jobs[job_id]] if job_id in answer.jobs else [])]
        known = [
            record
            for record in records
            if record.elapsed_s is not None or record.start_s is not None and not record.pending
        ]
        if known and any(record.elapsed_s is not None for record in known):
            for restart, job in enumerate(known):
                elapsed = now_s - job.start_s if job.running and job.start_s is not None else job.elapsed_s
                out.append(
                    Start(links.get(job_id), job_id, restart, job.state, job.start_s, job.end_s, elapsed, "sacct")
                )
            continue
        out += _starts_on_record(run, job_id, links.get(job_id), answer, now_s)
    return out


def _starts_on_record(run: RunRecords, job_id: str, link: int | None, answer: Answer, now_s: float) -> list[Start]:
    out: list[Start] = []
    mine = [record for record in run.links if str(record.get("job_id")) == job_id]
    for record in mine:
        time_s = parse_time(record.get("time"))
        if record.get("event") == "begin":
            out.append(Start(link, job_id, int(record.get("restart") or 0), "began", time_s, None, None, "links.jsonl"))
        elif record.get("event") == "end" and out and time_s is not None and out[-1].start_s is not None:
            state = f"exit code {record.get('exit_code')}"
            out[-1] = replace(out[-1], end_s=time_s, elapsed_s=time_s - out[-1].start_s, state=state)
    job = answer.jobs.get(job_id)
    if out and out[-1].elapsed_s is None and job is not None and out[-1].start_s is not None:
        if job.running:
            out[-1] = replace(out[-1], elapsed_s=now_s - out[-1].start_s, state=job.state, source="squeue")
        elif job.end_s is not None:
            out[-1] = replace(
                out[-1], end_s=job.end_s, elapsed_s=job.end_s - out[-1].start_s, state=job.state, source="squeue"
            )
    if out and out[-1].elapsed_s is None and out[-1].start_s is not None:
        written = _last_written(run, job_id)
        if written is not None and written >= out[-1].start_s:
            # Neither Slurm nor the job itself told the end; the log was written until then.
            out[-1] = replace(out[-1], end_s=written, elapsed_s=written - out[-1].start_s, source="log")
    # A start that never wrote its end lasted at most until the next one of the same job.
    for index, start in enumerate(out[:-1]):
        following = out[index + 1].start_s
        if start.elapsed_s is None and start.start_s is not None and following is not None:
            out[index] = replace(start, end_s=following, elapsed_s=following - start.start_s, state="ended by Slurm")
    return out


def _last_written(run: RunRecords, job_id: str) -> float | None:
    for path in run.logs:
        match = LOG_JOB.search(path)
        if match and match[1] == job_id:
            try:
                return os.stat(path).st_mtime
            except OSError:
                return None
    return None
