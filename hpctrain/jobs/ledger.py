"""Submits links and writes the ledger: a line before each sbatch and one after, so that a rerun
neither loses nor doubles one.

Each job carries a tag of its own in `--comment`. When a crash or a lost connection falls between
the two lines, the next run looks for the tag, in the queue, in accounting and among the links that
have begun, before it submits again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.base import terminal
from hpctrain.base.errors import EnvironmentFault, Problem, Refused
from hpctrain.runs.records import SUBMISSION, word_in_tags
from hpctrain.runtime import history
from hpctrain.runtime.files import append_record, open_state, read_records
from hpctrain.runtime.link import now
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.jobs import ended_by_comment, of_user

MAIN, SIDE = "link", "side"
LOCK_WAIT_S = 5.0  # an sbatch of a submitter that was killed takes a moment to end


@dataclass(frozen=True)
class Submission:
    """One job to submit: the link it is (or serves), its script with arguments, and the job it
    waits for."""

    link: int
    kind: str  # MAIN, or SIDE for a job that follows a link
    script: str
    arguments: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """What ledger.jsonl says. Keys are (link, kind)."""

    records: tuple[dict[str, Any], ...]

    def submitted(self) -> dict[tuple[int, str], str]:
        """Job ids by what they are, cancelled ones included."""
        return {
            _key(record): str(record["job_id"])
            for record in self.records
            if record.get("event") == "submitted"
        }

    def open(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Submissions of which it is not known whether Slurm got them."""
        newest = {_key(r): r for r in self.records if r.get("event") in SUBMISSION}
        return {key: r for key, r in newest.items() if r["event"] == "submitting"}

    def cancelled(self) -> set[str]:
        """Ids of the jobs that were cancelled."""
        return {
            str(record.get("job_id"))
            for record in self.records
            if record.get("event") == "cancelled"
        }

    def links(self) -> set[int]:
        """The numbers of the links that Slurm has got, or may have."""
        return {link for link, kind in (*self.submitted(), *self.open()) if kind == MAIN}


def read_ledger(run_dir: str) -> Ledger:
    """The ledger of a run directory, torn lines left out."""
    known = [
        r
        for r in read_records(os.path.join(run_dir, "ledger.jsonl"))
        if isinstance(r.get("link"), int)
    ]
    return Ledger(tuple(known))


@contextlib.contextmanager
def only_one(run_dir: str) -> Iterator[None]:
    """Hold the run's submission lock; the kernel lets it go when this process and every sbatch that
    it started have ended, however they end.

    Raises Refused when another hpctrain submits for this run for longer than LOCK_WAIT_S.
    """
    path = os.path.join(run_dir, ".submit.lock")
    with os.fdopen(open_state(path, os.O_RDWR | os.O_CREAT), "a") as file:
        os.set_inheritable(file.fileno(), True)
        begun = time.monotonic()
        try:
            while not _locked(file.fileno()) and time.monotonic() - begun < LOCK_WAIT_S:
                time.sleep(0.1)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise Refused(
                    f"another hpctrain is submitting jobs of `{run_dir}` now",
                    hint="wait for it to end",
                ) from error
            terminal.info(
                "note: this file system has no locks; do not run two `hpctrain chain` for one run"
                " at once"
            )
        yield


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def submit_all(
    run_dir: str, wanted: Sequence[Submission], after: str | None = None
) -> dict[tuple[int, str], str]:
    """Submit what the ledger does not have yet, in order, each link after the one before it;
    returns all job ids by key.

    The first link waits for the job `after`, another run's, where that is given. A job that has
    ended is waited for by nobody: Slurm may have forgotten it. Call it within `only_one`. Raises
    EnvironmentFault when Slurm refuses, and Unsure when its answer was lost; what was submitted
    until then is on record, and calling again goes on from there.
    """
    path = os.path.join(run_dir, "ledger.jsonl")
    ledger = read_ledger(run_dir)
    uid = word_in_tags(ledger.records) or secrets.token_hex(6)
    ids = {**ledger.submitted(), **_recover(run_dir, ledger)}
    live = {job.job_id for job in of_user() if job.live} if ids or after else set()
    previous = after
    last_start = history.last_start(read_records(os.path.join(run_dir, "links.jsonl")))
    for item in wanted:
        key = (item.link, item.kind)
        if key not in ids:
            depends_on = previous if item.kind == MAIN else ids[item.link, MAIN]
            depends_on = depends_on if depends_on in live else None
            tag = f"hpctrain:{uid}:{item.link}:{item.kind}:{secrets.token_hex(4)}"
            record: dict[str, Any] = {
                "event": "submitting",
                "link": item.link,
                "job_id": None,
                "depends_on": depends_on,
                "time": now(),
                "kind": item.kind,
                "tag": tag,
                "last_start": last_start,
            }
            _append(path, record)
            options = [f"--comment={tag}", *item.options]
            if depends_on:
                options.append(f"--dependency=afterany:{depends_on}")
            try:
                ids[key] = _submit(item, options)
            except slurm.Unsure:
                raise
            except EnvironmentFault:
                _append(path, {**record, "event": "refused", "time": now()})
                raise
            live.add(ids[key])
            _append(path, {**record, "event": "submitted", "job_id": ids[key], "time": now()})
        if item.kind == MAIN:
            previous = ids[key] if ids[key] in live else previous
    return ids


def _submit(item: Submission, options: Sequence[str]) -> str:
    """The id of the submitted job. Raises with what calling again does in each case."""
    try:
        return slurm.submit(item.script, item.arguments, options)
    except slurm.Unsure as error:
        hint = (
            "run the same command again: it looks for the job, and submits it only if it is not"
            " there"
        )
        raise slurm.Unsure(replace(error.problems[0], hint=hint)) from error
    except EnvironmentFault as error:
        why = (
            f"link {item.link}: those before it stay queued, and the same command goes on from"
            " there"
        )
        first = error.problems[0]
        raise EnvironmentFault(replace(first, why=why if item.link > 1 else first.why)) from error


def _recover(run_dir: str, ledger: Ledger) -> dict[tuple[int, str], str]:
    """Jobs that Slurm has and the ledger does not, because the last run was cut off in between;
    puts them on record."""
    unsure = ledger.open()
    if not unsure:
        return {}
    queued = {job.comment: job.job_id for job in of_user()}
    begun = {
        r.get("link"): str(r.get("job_id"))
        for r in read_records(os.path.join(run_dir, "links.jsonl"))
        if r.get("event") == "begin"
    }
    known = set(ledger.submitted().values())
    found = {}
    for key, record in unsure.items():
        tag = str(record.get("tag"))
        job_id = queued.get(tag) or next(iter(ended_by_comment(tag)), None)
        if job_id is None and key[1] == MAIN and begun.get(key[0]) not in (None, "", *known):
            job_id = begun[key[0]]
        if job_id:
            terminal.info(
                f"link {key[0]} was submitted before as job {job_id}, though its record was cut off"
            )
            _append(
                os.path.join(run_dir, "ledger.jsonl"),
                {**record, "event": "submitted", "job_id": job_id, "time": now()},
            )
            found[key] = job_id
    return found


def record_cancelled(run_dir: str, ids: Sequence[str]) -> None:
    """Note in the ledger that these jobs were cancelled."""
    by_id = {job_id: key for key, job_id in read_ledger(run_dir).submitted().items()}
    for job_id in ids:
        link, kind = by_id.get(job_id, (0, MAIN))
        _append(
            os.path.join(run_dir, "ledger.jsonl"),
            {
                "event": "cancelled",
                "link": link,
                "job_id": job_id,
                "depends_on": None,
                "time": now(),
                "kind": kind,
                "reason": "`hpctrain cancel`",
            },
        )


def record_waived(run_dir: str, errors: Sequence[Problem]) -> None:
    """Note in the ledger that the run was rendered or queued in spite of these errors of
    `check`."""
    if errors:
        what = [f"{problem.where}: {problem.what}".removeprefix(": ") for problem in errors]
        path = os.path.join(run_dir, "ledger.jsonl")
        _append(path, {"event": "unchecked", "problems": what, "time": now()})


def _key(record: dict[str, Any]) -> tuple[int, str]:
    return int(record["link"]), str(record.get("kind", MAIN))


def _append(path: str, record: dict[str, Any]) -> None:
    try:
        append_record(path, record)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot write `{path}`: {error.strerror}", hint="nothing more was submitted"
        ) from error
