"""How many array tasks a site lets one user submit, and how many may run: pure arithmetic on the
profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpctrain.base.errors import Refused, UsageError

if TYPE_CHECKING:
    from hpctrain.config.site import Site

SECONDS_PER_MB = 1.0  # per task; the slowest encoder measured does 2.4 MB a CPU-second
STARTUP_S = 300


@dataclass(frozen=True)
class ArrayLimits:
    """What a partition allows; None where the profile sets no limit. `counts_as_jobs`: every array
    task is a job."""

    partition: str | None = None
    max_submitted: int | None = None
    max_running: int | None = None
    max_array_size: int = 1001
    counts_as_jobs: bool = False
    max_time_s: int | None = None
    where: str = ""
    qos: str | None = None


@dataclass(frozen=True)
class ArrayShape:
    """An array of `num_tasks`, of which `parallel` may run at once, each for `time_s` at most;
    `notes` say what was decided."""

    num_tasks: int
    parallel: int
    time_s: int
    notes: tuple[str, ...]


def limits_of(site: Site | None, partition: str | None) -> ArrayLimits:
    """The limits of `partition` at `site`; without one, the site's CPU partition (GPU partitions
    bill GPUs for CPU work).

    Raises UsageError when the site has no such partition.
    """
    if site is None:
        return ArrayLimits(partition)
    name = partition or site.values["tools"]["cpu_partition"]
    found = site.partition(name) if name else None
    if name and found is None:
        raise UsageError(
            f"site `{site.name}` has no partition `{name}`",
            where="--partition",
            hint="known: " + ", ".join(site.partitions),
        )
    slurm = site.values["slurm"]
    return ArrayLimits(
        partition=found.slurm_name if found else name,
        qos=found.qos if found else None,
        max_submitted=found.max_submitted if found else None,
        max_running=found.max_running if found else None,
        max_array_size=slurm["max_array_size"],
        counts_as_jobs=slurm["array_counts_as_jobs"],
        max_time_s=found.max_time_s if found else None,
        where=(
            site.document.where("partitions", name, "max_submitted")
            if found and site.partitions
            else ""
        ),
    )


def shape_array(
    limits: ArrayLimits,
    num_tasks: int,
    num_shards: int,
    megabytes: float,
    queued: int,
    time_s: int | None = None,
) -> ArrayShape:
    """The array for `num_shards` shards of `megabytes` in all, when `queued` of the user's jobs are
    in that partition.

    One slot is kept for the merge. Fewer tasks do several shards each: the result is the same.
    Raises Refused when no task can be submitted now.
    """
    notes = []
    tasks = min(num_tasks, num_shards)
    allowed = limits.max_array_size
    why = f"MaxArraySize {limits.max_array_size}"
    if limits.max_submitted is not None:
        slots = limits.max_submitted - queued - 1
        if slots < 1:
            raise Refused(
                f"{queued} of your jobs are queued in `{limits.partition}`, which allows"
                f" {limits.max_submitted}",
                where=limits.where,
                why="a tokenization needs at least two: one task and the merge",
                hint="wait, or use --partition or --local",
            )
        if limits.counts_as_jobs and slots < allowed:
            allowed = slots
            why = (
                f"`{limits.partition}` allows {limits.max_submitted} submitted jobs, every array"
                f" task is one, {queued} are queued"
            )
    if tasks > allowed:
        notes.append(f"{allowed} array tasks for {num_shards} shards: {why}")
        tasks = allowed
    parallel = tasks
    if limits.max_running is not None and limits.counts_as_jobs and parallel > limits.max_running:
        parallel = limits.max_running
        notes.append(f"{parallel} run at once: the most `{limits.partition}` allows")
    if time_s is None:
        # Shards are of equal size, so the largest task is the one with one shard more.
        share = -(-num_shards // tasks) / num_shards
        time_s = int(STARTUP_S + SECONDS_PER_MB * megabytes * share)
        time_s = max(1800, -(-time_s // 1800) * 1800)
    if limits.max_time_s is not None and time_s > limits.max_time_s:
        notes.append(
            "the time is cut to the partition's limit; a task that runs out of it is queued again,"
            " and goes on"
        )
        time_s = limits.max_time_s
    return ArrayShape(tasks, parallel, time_s, tuple(notes))
