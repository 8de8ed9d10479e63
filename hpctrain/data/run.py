"""Runs a prepared tokenization: in this process, in local processes, as a Slurm array, or on MPI
ranks. The shards are the same."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpctrain.base import units
from hpctrain.base.errors import EnvironmentFault, HpctrainError, Problem, Refused, need
from hpctrain.base.paths import cache_home
from hpctrain.config.container import bind_list, container_argv
from hpctrain.config.trust import require_trust, trusted
from hpctrain.data import tasks
from hpctrain.data.limits import ArrayShape
from hpctrain.data.merge import up_to_date
from hpctrain.data.plan import Plan
from hpctrain.data.worker import finished
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.jobs import queued

if TYPE_CHECKING:
    from hpctrain.config.site import Site

MEM_GIB = 2
# in memory, of the longest line: its text, SentencePiece's work on it, its ids (27 measured)
LINE_COPIES = 30
_SAFE_PATH = re.compile(r"[A-Za-z0-9_./+=@:,-]+")

Say = Callable[[str], None]
Watch = Callable[[int, int, int], None]  # (shards done, bytes read, documents)


@dataclass(frozen=True)
class Cluster:
    """Where and as whom the array runs. `python` is the command that starts Python in a task (it
    may enter a container)."""

    partition: str | None
    account: str | None
    qos: str | None
    python: str | None
    shape: ArrayShape
    extra: tuple[tuple[str, str], ...] = ()


def mem_gib(plan: Plan) -> int:
    """The memory a task asks for: enough for the longest line that the plan accepts."""
    return max(MEM_GIB, -(-plan.options.max_line_mib * LINE_COPIES // 1024))


def pending(plan: Plan) -> list[int]:
    """The shards that are not done."""
    return [shard.index for shard in plan.shards if finished(plan, shard) is None]


def run_here(
    plan: Plan, processes: int, force: bool, keep_shards: bool, watch: Watch
) -> dict[str, Any]:
    """Do what is missing with `processes` local processes, merge, and give the dataset's manifest.
    Raises the tasks' errors."""
    tasks.forget_failures(plan)
    todo = pending(plan)
    done = len(plan.shards) - len(todo)
    if processes > 1 and len(todo) > 1:
        _local_processes(plan, todo, min(processes, len(todo)), watch)
    elif todo:
        tasks.run_shards(plan, todo, lambda num_bytes, documents: watch(done, num_bytes, documents))
    _raise_failures(plan)
    return _finish(plan, force, keep_shards)


def run_mpi(plan: Plan, communicator: Any, force: bool, keep_shards: bool) -> dict[str, Any] | None:
    """Do what is missing on all ranks of `communicator`; rank 0 merges and gives the manifest, the
    others None."""
    rank, size = communicator.Get_rank(), communicator.Get_size()
    todo = None
    if rank == 0:
        tasks.forget_failures(plan)
        todo = pending(plan)
    todo = communicator.bcast(todo, root=0)
    tasks.run_shards(plan, todo[rank::size])
    communicator.Barrier()
    if rank:
        return None
    _raise_failures(plan)
    return _finish(plan, force, keep_shards)


def submit(
    plan: Plan, plan_path: str, cluster: Cluster, force: bool, keep_shards: bool, say: Say
) -> list[str]:
    """Queue an array for what is missing, and the merge after it; the job ids.

    Raises Refused while jobs of the same work are still queued, EnvironmentFault when Slurm does
    not take the jobs.
    """
    active = queued(f"--name={job_name(plan)}")
    if active:
        raise Refused(
            f"{len(active)} jobs are already at work on this",
            hint=f"squeue --name={job_name(plan)}",
        )
    tasks.forget_failures(plan)
    todo = pending(plan)
    executor = _executor(plan, cluster)
    parameters = _parameters(plan, cluster)
    ids: list[str] = []
    with _scrubbed_environment():
        try:
            if todo:
                count = min(cluster.shape.num_tasks, len(todo))
                executor.update_parameters(**parameters)
                with executor.batch():
                    jobs = [
                        executor.submit(tasks.ShardTask(plan_path, todo[index::count]))
                        for index in range(count)
                    ]
                ids.append(str(jobs[0].job_id).split("_")[0])
                say(f"queued {count} tasks for {len(todo)} shards: job {ids[0]}")
                # afterany, as afterok would never start once a task failed; the merge itself says
                # what is missing.
                parameters["slurm_additional_parameters"] = {
                    **dict(cluster.extra),
                    "dependency": f"afterany:{ids[0]}",
                }
            executor.update_parameters(**parameters)
            job = executor.submit(tasks.MergeTask(plan_path, force, keep_shards))
        except Exception as error:
            if type(error).__name__ not in _SUBMITIT_ERRORS:
                raise
            raise _not_taken(str(error), ids) from None
    ids.append(str(job.job_id))
    say(f"queued the merge after it: job {ids[-1]}")
    return ids


_SUBMITIT_ERRORS = ("FailedJobError", "FailedSubmissionError", "CalledProcessError")


def _parameters(plan: Plan, cluster: Cluster) -> dict[str, Any]:
    """submitit's parameters of a task's job."""
    code = _staged_code(plan) if cluster.python else code_dir()
    parameters: dict[str, Any] = {
        "slurm_job_name": job_name(plan),
        "slurm_time": max(1, cluster.shape.time_s // 60),
        "slurm_partition": cluster.partition,
        "slurm_account": cluster.account,
        "slurm_qos": cluster.qos,
        "slurm_nodes": 1,
        "slurm_ntasks_per_node": 1,
        "slurm_cpus_per_task": 1,
        "slurm_mem": f"{mem_gib(plan)}G",
        "slurm_array_parallelism": cluster.shape.parallel,
        "slurm_setup": [f"export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}"],
        "slurm_stderr_to_stdout": True,
        "slurm_additional_parameters": dict(cluster.extra),
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    return {**given, "slurm_wckey": None}  # submitit's default names one that no site has


def _not_taken(words: str, ids: list[str]) -> EnvironmentFault:
    return EnvironmentFault(
        f"Slurm did not take the job: {(words.strip().splitlines() or [words])[-1]}",
        why=f"what is queued already goes on: {', '.join(ids)}" if ids else "",
        hint=(
            "see --partition, --account and --time; `AssocMaxSubmitJobLimit` means too many jobs or"
            " a wrong account"
        ),
    )


def wait(
    plan: Plan, watch: Watch, every_s: float = 5.0, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Until the jobs of this plan have left the queue; the dataset's manifest. Raises the tasks'
    errors, all at once."""
    while True:
        watch(*tasks.progress(plan))
        if not queued(f"--name={job_name(plan)}"):
            break
        sleep(every_s)
    watch(*tasks.progress(plan))
    _raise_failures(plan)
    manifest = up_to_date(plan)
    if manifest is None:
        left = pending(plan)
        raise HpctrainError(
            f"the jobs have ended, but {len(left)} of {len(plan.shards)} shards are not done:"
            f" {', '.join(map(str, left[:20]))}",
            where=own_folder(plan, "logs"),
            why="tasks were killed, ran out of time or memory, or their node failed",
            hint="run the same command again: only these are done",
        )
    return manifest


def job_name(plan: Plan) -> str:
    """The name of all Slurm jobs of this work."""
    return f"tok-{plan.key}"


def container_python(site: Site, image: str, needed: Sequence[str]) -> str:
    """The command that starts Python inside the site's container; raises EnvironmentFault when the
    site has no runtime."""
    if site.values["container"]["runtime"] == "none":
        raise EnvironmentFault(f"site `{site.name}` runs no containers", where="--container")
    binds, _ = bind_list(site, (), [("data", path) for path in needed])
    return shlex.join([*container_argv(site, image, binds), "python3"])


def _local_processes(plan: Plan, todo: Sequence[int], count: int, watch: Watch) -> None:
    submitit = need("submitit", "all")
    path = os.path.join(plan.work_dir, f"{plan.key}.plan.json")
    executor = submitit.AutoExecutor(folder=own_folder(plan, "logs"), cluster="local")
    executor.update_parameters(timeout_min=60 * 24 * 14, name=job_name(plan))
    jobs: list[Any] = []
    try:
        with _scrubbed_environment({"PYTHONPATH": _python_path()}):
            for index in range(count):
                jobs.append(executor.submit(tasks.ShardTask(path, todo[index::count])))
        shown = 0.0
        while not all(job.done() for job in jobs):
            time.sleep(0.03)
            if time.monotonic() - shown > 1:
                watch(*tasks.progress(plan))
                shown = time.monotonic()
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()
    _raise_failures(plan)
    left = pending(plan)
    # Another run of the same may have merged meanwhile, and removed the shards.
    if left and up_to_date(plan) is None:
        raise HpctrainError(
            f"{len(left)} of {len(plan.shards)} shards are not done: a local process ended early",
            where=own_folder(plan, "logs"),
            hint="run the same command again: only these are done",
        )


def _executor(plan: Plan, cluster: Cluster) -> Any:
    submitit = need("submitit", "all")
    options: dict[str, Any] = {"slurm_max_num_timeout": 100}
    if cluster.python:
        options["slurm_python"] = cluster.python
    with contextlib.redirect_stderr(sys.stderr):
        return submitit.AutoExecutor(folder=own_folder(plan, "logs"), cluster="slurm", **options)


def _finish(plan: Plan, force: bool, keep_shards: bool) -> dict[str, Any]:
    manifest = tasks.merge(plan, force, keep_shards)
    _raise_failures(plan)
    assert manifest is not None
    return manifest


def _raise_failures(plan: Plan) -> None:
    found = tasks.failures(plan)
    if found:
        error = HpctrainError([problem for _, problem in found])
        error.exit_code = max(code for code, _ in found)
        raise error


def own_folder(plan: Plan, name: str) -> str:
    """A folder for what tasks run or unpickle, which nobody else can enter: beside the shards,
    else in the home.

    Raises Refused where the home is not safe either. Slurm's file name patterns cannot carry every
    path, so odd ones get a plain place too.
    """
    folder = os.path.join(plan.work_dir, name)
    if not _SAFE_PATH.fullmatch(folder) or not trusted(folder):
        folder = os.path.join(cache_home(os.environ), f"tokenize-{plan.content_key}", name)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    require_trust(folder, "this folder for the tasks' code")
    os.chmod(folder, 0o700)
    return folder


def _staged_code(plan: Plan) -> str:
    """A folder with copies of the pure Python packages that a task needs, for containers: only
    numpy and sentencepiece (and the extra `fast`, if it is to be used) must be in the image. Our
    own site-packages hold libraries built for this machine.
    """
    target = own_folder(plan, "python")
    for name in ("hpctrain", "submitit", "cloudpickle", "typing_extensions"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        if spec.submodule_search_locations:
            source = os.path.dirname(spec.origin)
            ignored = shutil.ignore_patterns("__pycache__", "_shipped", "test_*")
            shutil.copytree(source, os.path.join(target, name), ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(spec.origin, target)
    return target


def code_dir() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _python_path() -> str:
    return os.pathsep.join(filter(None, [code_dir(), os.environ.get("PYTHONPATH", "")]))


@contextlib.contextmanager
def _scrubbed_environment(extra: dict[str, str] | None = None) -> Iterator[None]:
    """submitit hands our environment to sbatch and to local processes: take out what would override
    the job's own options."""
    saved = dict(os.environ)
    try:
        for name in slurm.leaking(os.environ):
            del os.environ[name]
        os.environ.update(extra or {})
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def describe_shape(shape: ArrayShape) -> list[Problem]:
    """The array's decisions as notes."""
    first = (
        f"{shape.num_tasks} tasks, {shape.parallel} at once, {units.format_time(shape.time_s)} each"
    )
    return [Problem(first, level="note"), *(Problem(note, level="note") for note in shape.notes)]
