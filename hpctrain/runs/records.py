"""Finds run directories and reads what they hold, however little: a torn ledger or a missing
plan.json is no error here.

A run is named by its directory, by its run.yaml, by its name (looked for under ./runs and here) or
by a job id.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.config.fields import nearest
from hpctrain.runtime.files import MAX_RECORD_BYTES, read_limited, read_lines
from hpctrain.triage.records import job_of_log

_JOB_ID = re.compile(r"\d+(?:_\d+)?\Z")
MARKS = ("plan.json", "ledger.jsonl", "links.jsonl", "job.sbatch")
PIPELINE = "pipeline.json"
SUBMISSION = ("submitting", "submitted", "refused")  # what becomes of an sbatch in ledger.jsonl


@dataclass(frozen=True)
class RunRecords:
    """What a run directory tells by itself. `unseen` says what could not be read, `queued` which
    jobs squeue lists as this run's beside those on record (`runs.live`)."""

    run_dir: str
    name: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    ledger: tuple[Mapping[str, Any], ...] = ()
    links: tuple[Mapping[str, Any], ...] = ()
    logs: tuple[str, ...] = ()
    stop: bool = False
    unseen: tuple[str, ...] = ()
    queued: tuple[str, ...] = ()

    def section(self, name: str) -> Mapping[str, Any]:
        """`job`, `guard` or `cost` of plan.json, empty when it is not there."""
        value = self.plan.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def tasks_per_node(self) -> int | None:
        value = self.section("job").get("tasks_per_node")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def offset(self) -> int:
        """`offset_of` its plan."""
        return offset_of({"guard": self.section("guard"), "job": self.section("job")})

    @property
    def recipe(self) -> str | None:
        value = self.plan.get("recipe")
        return value if isinstance(value, str) else None

    @property
    def uid(self) -> str | None:
        """The run's own word in the tag of each job of ours, None before the first submission."""
        return word_in_tags(self.ledger)

    def ended_jobs(self) -> set[str]:
        """The jobs whose end, or whose cancelling, the run directory itself records."""
        records = (*self.ledger, *self.links)
        return {
            str(record.get("job_id"))
            for record in records
            if record.get("event") in ("end", "cancelled")
        }

    def job_ids(self) -> list[str]:
        """Every job id that the ledger, the links, the logs or squeue name, oldest first."""
        found: dict[str, None] = dict.fromkeys(self.queued)
        for record in (*self.ledger, *self.links):
            job_id = str(record.get("job_id") or "")
            if _JOB_ID.match(job_id):
                found[job_id] = None
        for path in self.logs:
            if logged := job_of_log(path):
                found[logged] = None
        return sorted(found, key=lambda job_id: tuple(map(int, job_id.split("_"))))


def offset_of(plan: Mapping[str, Any]) -> int:
    """What the numbers of checkpoints are ahead of the run's own iterations, by plan.json: the
    tilde fork counts on from its start's number."""
    target, own = plan["guard"].get("target"), plan["job"].get("iterations")
    if plan["guard"].get("counter") != "greatest_folder":
        return 0
    return max(target - own, 0) if isinstance(target, int) and isinstance(own, int) else 0


def word_in_tags(records: Iterable[Mapping[str, Any]]) -> str | None:
    """The run's own word in the tags of a ledger, `hpctrain:WORD:LINK:KIND:…`."""
    tags = (str(record.get("tag", "")).split(":") for record in records)
    return next((parts[1] for parts in tags if len(parts) >= 3), None)


def by_hand(run: RunRecords) -> list[str]:
    """The jobs that ran this run's script though nothing of ours queued them, where a ledger says
    what was queued."""
    queued = {
        str(record.get("job_id")) for record in run.ledger if record.get("event") == "submitted"
    }
    ran = dict.fromkeys(
        str(record.get("job_id")) for record in run.links if record.get("event") == "begin"
    )
    ran.update(dict.fromkeys((*filter(None, map(job_of_log, run.logs)), *run.queued)))
    return [job_id for job_id in ran if job_id not in queued] if queued else []


def is_run_dir(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, mark)) for mark in MARKS)


def read_run(run_dir: str) -> RunRecords:
    """Everything readable in `run_dir`. Raises EnvironmentFault when it is no folder."""
    if not os.path.isdir(run_dir):
        raise EnvironmentFault(f"there is no run directory `{run_dir}`")
    unseen = []
    plan: Mapping[str, Any] = {}
    try:
        loaded = json.loads(read_limited(os.path.join(run_dir, "plan.json"), MAX_RECORD_BYTES))
        if isinstance(loaded, dict):
            plan = loaded
        else:
            unseen.append("plan.json is not an object")
    except (OSError, ValueError, RecursionError) as error:
        unseen.append(f"plan.json: {getattr(error, 'strerror', None) or 'not JSON'}")
    version = plan.get("schema_version", 1)
    if version != 1:
        newer = (
            ": a newer hpctrain wrote it, and may see more in it"
            if isinstance(version, int) and version > 1
            else ""
        )
        unseen.append(f"plan.json has schema_version {version!r}, and 1 is known here{newer}")
    records = {}
    for name in ("ledger.jsonl", "links.jsonl"):
        path = os.path.join(run_dir, name)
        try:
            found, torn = read_lines(path)
            records[name] = tuple(map(_usable, found))
            if torn:
                unseen.append(
                    f"{name}: {torn} torn or foreign {'line' if torn == 1 else 'lines'}, left out"
                )
        except (OSError, ValueError, RecursionError) as error:
            records[name] = ()
            unseen.append(f"{name}: {error}")
        if not records[name] and not os.path.exists(os.path.join(run_dir, name)):
            unseen.append(f"{name} is not there")
    unseen += _moved(run_dir)
    planned = plan.get("run")
    return RunRecords(
        os.path.abspath(run_dir),
        planned if isinstance(planned, str) else os.path.basename(os.path.abspath(run_dir)),
        plan,
        records["ledger.jsonl"],
        records["links.jsonl"],
        tuple(list_logs(run_dir)),
        os.path.lexists(os.path.join(run_dir, "STOP")),
        tuple(unseen),
    )


# What each field of a record is, whoever wrote it; job ids are also written as numbers.
_FIELDS: Mapping[str, type] = {
    "event": str,
    "link": int,
    "job_id": str,
    "depends_on": str,
    "restart": int,
    "mode": str,
    "checkpoint": str,
    "iteration": int,
    "exit_code": int,
    "nodes": str,
    "reason": str,
    "time": str,
}


def _usable(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with None for every known field that is of another type."""
    out = dict(record)
    for name, kind in _FIELDS.items():
        value = out.get(name)
        if kind is str and isinstance(value, int) and not isinstance(value, bool):
            out[name] = str(value)
        elif value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            out[name] = None
    return out


_RENDERED_FOR = re.compile(r"^export HPCTRAIN_RUN_DIR=(.+)$", re.MULTILINE)


def _moved(run_dir: str) -> list[str]:
    """Where the run directory's own job script works, when that is another folder than this one."""
    try:
        head = read_limited(os.path.join(run_dir, "job.sbatch"), 1 << 16)
        found = _RENDERED_FOR.search(head.decode("utf-8", "replace"))
        words = shlex.split(found[1]) if found else []
    except (OSError, ValueError):
        return []
    if len(words) != 1 or os.path.realpath(words[0]) == os.path.realpath(run_dir):
        return []
    return [
        f"this folder was moved or copied: its job.sbatch works in {words[0]}, and what jobs do"
        " there is not seen here"
    ]


def list_logs(run_dir: str) -> list[str]:
    """The log files of a run, oldest job first."""
    folder = os.path.join(run_dir, "logs")
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    except OSError:
        return []

    def order(name: str) -> tuple[int, str]:
        return (int(job_of_log(name) or 0), name)

    wanted = [name for name in names if name.endswith((".out", ".err", ".log", ".txt"))]
    return [os.path.join(folder, name) for name in sorted(wanted, key=order)]


def find_runs(target: str | None, base: str = ".") -> list[str]:
    """The run directories that `target` names: one, or all of those under `base` when it is None.

    Raises UsageError when nothing is found, with the nearest name.
    """
    if target is None:
        found = _runs_under(base)
        if not found:
            raise UsageError(
                "there are no runs here",
                hint="name a run directory, a run or a job id; `hpctrain render` makes one",
            )
        return found
    written = target.endswith((".yaml", ".yml"))
    if folder := find_pipeline(target, base):
        return stage_dirs(folder)
    if os.path.isfile(target) and written:
        return _beside(target)
    if os.path.isfile(target) and os.path.basename(target) in MARKS:
        return [os.path.abspath(os.path.dirname(target) or ".")]
    if os.path.isdir(target):
        inside = _runs_under(target)
        if inside or os.path.isdir(os.path.join(target, "logs")):
            return inside or [os.path.abspath(target)]
        raise UsageError(
            f"`{target}` is no run directory and holds none",
            hint="a run directory has a plan.json or a ledger.jsonl",
        )
    everything = _runs_under(base)
    named = [
        path
        for path in everything
        if os.path.basename(path) == target or read_run(path).name == target
    ]
    if named:
        return named[:1]
    if _JOB_ID.match(target):
        return [_run_of_job(target, everything)]
    if written:
        raise UsageError(
            f"there is no file `{target}`",
            hint="name a run.yaml, a run directory, a run or a job id",
        )
    names = [os.path.basename(path) for path in everything]
    raise UsageError(
        f"there is no run `{target}` here",
        hint=nearest(target, names) if names else "name its directory",
    )


def find_one(target: str | None, base: str = ".") -> str:
    """The one run directory that `target` names; of several (a pipeline's) the one whose logs grew
    last. Raises as `find_runs`."""
    return max(find_runs(target, base), key=last_change)


def last_change(run_dir: str) -> float:
    """When a run's newest log was written to; 0 when it has none. Seconds since 1970."""
    times = [0.0]
    for path in list_logs(run_dir) or [run_dir]:
        with contextlib.suppress(OSError):
            times.append(os.stat(path).st_mtime)
    return max(times)


def find_pipeline(target: str, base: str = ".") -> str | None:
    """The folder of the pipeline that `target` names (its folder, its pipeline.yaml or its name),
    None when it names none."""
    folders = [target, os.path.join(base, "runs", target)]
    if os.path.isfile(target):
        if os.path.basename(target) == PIPELINE:
            folders = [os.path.dirname(target)]
        elif target.endswith((".yaml", ".yml")):
            from hpctrain.config.document import load_yaml

            document = load_yaml(target)
            if not isinstance(document.get("stages"), dict):
                return None
            folders = [
                os.path.join(
                    os.path.dirname(os.path.abspath(target)), "runs", str(document.get("name"))
                )
            ]
    return next(
        (os.path.abspath(path) for path in folders if os.path.isfile(os.path.join(path, PIPELINE))),
        None,
    )


def read_pipeline_index(folder: str) -> dict[str, Any]:
    """pipeline.json of a pipeline's folder. Raises EnvironmentFault when it is damaged."""
    path = os.path.join(folder, PIPELINE)
    try:
        found = json.loads(read_limited(path, MAX_RECORD_BYTES))
        return {
            "pipeline": str(found["pipeline"]),
            "stages": [dict(stage) for stage in found["stages"]],
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EnvironmentFault(
            f"`{path}` cannot be read: {error}", hint="`hpctrain pipeline` writes it again"
        ) from error


def stage_dirs(folder: str) -> list[str]:
    """The run directories of a pipeline that are there, in the order of its stages."""
    found = [
        os.path.join(folder, str(stage["run_dir"]))
        for stage in read_pipeline_index(folder)["stages"]
    ]
    return [os.path.abspath(path) for path in found if is_run_dir(path)]


def _beside(run_yaml: str) -> list[str]:
    """The run directory that `hpctrain render` made from this run.yaml."""
    folder = os.path.dirname(os.path.abspath(run_yaml))
    if is_run_dir(folder):
        return [folder]
    from hpctrain.config.document import load_yaml

    document = load_yaml(run_yaml)
    name, verb = document.get("name"), "pipeline" if document.get("stages") else "render"
    path = os.path.join(folder, "runs", str(name))
    if not os.path.isdir(path):
        raise UsageError(
            f"`{run_yaml}` has no run directory yet",
            why=f"looked for {path}",
            hint=f"`hpctrain {verb}` makes it",
        )
    return [path]


def _runs_under(base: str) -> list[str]:
    if is_run_dir(base):
        return [os.path.abspath(base)]
    found = []
    for folder in (os.path.join(base, "runs"), base):
        try:
            names = sorted(
                entry.name
                for entry in os.scandir(folder)
                if entry.is_dir() and not entry.name.startswith(".")
            )
        except OSError:
            continue
        for path in (os.path.abspath(os.path.join(folder, name)) for name in names):
            if is_run_dir(path):
                found.append(path)
            elif os.path.isfile(os.path.join(path, PIPELINE)):
                found += stage_dirs(path)
    return list(dict.fromkeys(found))


def _run_of_job(job_id: str, run_dirs: Iterable[str]) -> str:
    for run_dir in run_dirs:
        if job_id in read_run(run_dir).job_ids():
            return run_dir
    from hpctrain.slurm.jobs import work_dir_of

    folder = work_dir_of(job_id)
    if folder and os.path.isdir(folder) and is_run_dir(folder):
        return folder
    raise UsageError(
        f"no run here submitted job {job_id}",
        why="looked in ./runs and asked Slurm for its working directory",
        hint="name the run directory, or the log file itself",
    )
