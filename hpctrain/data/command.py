"""What `hpctrain tokenize` does, from a request to a dataset: prepare, scan, run the way that fits
this place, report."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.config.site import Site, load_site
from hpctrain.data import run
from hpctrain.data.limits import ArrayShape, limits_of, shape_array
from hpctrain.data.merge import clean_up, remove_leftovers
from hpctrain.data.plan import Plan
from hpctrain.data.prepare import Prepared, Request, prepare, scan, write_plan
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.jobs import queued

SMALL_BYTES = 1 << 30  # read in a minute by the workers themselves, so no scan before


@dataclass(frozen=True)
class How:
    """Where and how to run. `engine` is auto, array, local or mpi; `scan` is sample, full or
    none."""

    engine: str = "auto"
    processes: int | None = None
    site: str | None = None
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    time_s: int | None = None
    wait: bool = True
    dry_run: bool = False
    keep_shards: bool = False
    scan: str = "sample"


@dataclass(frozen=True)
class Outcome:
    """`status`: done, unchanged (it was there), queued, planned (dry run). `manifest` describes the
    dataset when it is there."""

    status: str
    plan: Plan
    engine: str
    notes: tuple[Problem, ...]
    done_before: int
    manifest: dict[str, Any] | None = None
    job_ids: tuple[str, ...] = ()
    shape: ArrayShape | None = None


def tokenize(
    request: Request,
    how: How,
    say: Callable[[str], None],
    tell: Callable[[Problem], None],
    watch: run.Watch,
) -> Outcome:
    """Make the dataset, or what is missing of it. `tell` gets notes as they arise, `watch` the
    progress.

    Raises UsageError, EnvironmentFault, Refused, or the errors of the tasks.
    """
    engine = how.engine
    if engine == "auto":
        engine = "array" if slurm.have("sbatch") else "local"
    prepared = prepare(request)
    for note in prepared.notes:
        tell(note)
    plan = prepared.plan
    outcome = Outcome("planned", plan, engine, prepared.notes, prepared.done)
    if prepared.finished is not None:
        if not how.dry_run:
            _remove_rest(plan, how.keep_shards)
        return replace(outcome, status="unchanged", manifest=prepared.finished)
    cluster = None
    if engine == "array":
        cluster = _cluster(plan, request, how, prepared)
        outcome = replace(outcome, shape=cluster.shape)
        for note in run.describe_shape(cluster.shape):
            tell(note)
    if how.scan == "full" or (how.scan == "sample" and _deserves_scan(prepared, engine)):
        _scan(plan, how)
    if how.dry_run:
        return outcome
    path = write_plan(plan)
    if cluster is None:
        processes = how.processes or min(request.tasks, len(os.sched_getaffinity(0)))
        manifest = run.run_here(plan, processes, request.force, how.keep_shards, watch)
        return replace(outcome, status="done", manifest=manifest)
    ids = run.submit(plan, path, cluster, request.force, how.keep_shards, say)
    outcome = replace(outcome, status="queued", job_ids=tuple(ids))
    return replace(outcome, status="done", manifest=run.wait(plan, watch)) if how.wait else outcome


def _remove_rest(plan: Plan, keep_shards: bool) -> None:
    """What is left of the making of a dataset that is there already."""
    remove_leftovers(plan)
    if not keep_shards and os.path.isdir(plan.work_dir):
        clean_up(plan)


def _scan(plan: Plan, how: How) -> None:
    scan(plan, 0 if how.scan == "full" else 64 << 20)


def tokenize_mpi(
    request: Request,
    how: How,
    communicator: Any,
    say: Callable[[str], None],
    tell: Callable[[Problem], None],
) -> Outcome | None:
    """The same on the ranks of an MPI communicator, which all call it; rank 0 gets the outcome, the
    others None."""
    is_first = communicator.Get_rank() == 0
    prepared: Prepared | Exception | None = _prepared(request, how) if is_first else None
    prepared = communicator.bcast(prepared, root=0)
    if isinstance(prepared, Exception):
        if is_first:
            raise prepared
        return None
    assert prepared is not None
    if is_first:
        for note in prepared.notes:
            tell(note)
        say(f"{communicator.Get_size()} ranks")
    outcome = Outcome("planned", prepared.plan, "mpi", prepared.notes, prepared.done)
    if prepared.finished is not None:
        outcome = replace(outcome, status="unchanged", manifest=prepared.finished)
    elif not how.dry_run:
        manifest = run.run_mpi(prepared.plan, communicator, request.force, how.keep_shards)
        outcome = replace(outcome, status="done", manifest=manifest)
    return outcome if is_first else None


def _prepared(request: Request, how: How) -> Prepared | Exception:
    """What rank 0 prepares, or why it cannot: every rank must leave, or the others wait for
    ever."""
    try:
        prepared = prepare(request)
        if prepared.finished is None and not how.dry_run:
            if how.scan != "none":
                _scan(prepared.plan, how)
            write_plan(prepared.plan)
    except Exception as error:
        return error
    return prepared


def _cluster(plan: Plan, request: Request, how: How, prepared: Prepared) -> run.Cluster:
    site = load_site(how.site) if how.site else None
    limits = limits_of(site, how.partition)
    _check_account(site, how.account)
    limited = limits.partition and limits.max_submitted is not None
    num_queued = len(queued(f"--partition={limits.partition}")) if limited else 0
    todo = len(plan.shards) - prepared.done
    megabytes = sum(source.weight for source in plan.inputs) / 1e6 * todo / len(plan.shards)
    shape = shape_array(limits, request.tasks, max(1, todo), megabytes, num_queued, how.time_s)
    python = None
    if how.container:
        if site is None:
            raise UsageError("--container needs --site, whose profile says how containers run")
        folders = [os.path.dirname(plan.prefix), os.path.dirname(plan.model_path)]
        folders += sorted({os.path.dirname(source.path) for source in plan.inputs})
        folders.append(os.path.dirname(run.own_folder(plan, "python")))
        python = run.container_python(site, os.path.abspath(how.container), folders)
    return run.Cluster(limits.partition, how.account, limits.qos, python, shape)


def _check_account(site: Site | None, account: str | None) -> None:
    if site is None:
        return
    rule = site.values["account"]
    if rule["required"] and not account:
        raise UsageError(
            f"site `{site.name}` needs an account",
            where="--account",
            hint=f"for example --account {rule['example']}" if rule["example"] else "",
        )
    if account and rule["pattern"] and not re.fullmatch(rule["pattern"], account):
        raise UsageError(
            f"`{account}` is not an account of `{site.name}`",
            where="--account",
            hint=(
                f"for example {rule['example']}"
                if rule["example"]
                else f"it must match {rule['pattern']}"
            ),
        )


def _deserves_scan(prepared: Prepared, engine: str) -> bool:
    total = sum(source.weight for source in prepared.plan.inputs)
    return prepared.done == 0 and (engine != "local" or total > SMALL_BYTES)
