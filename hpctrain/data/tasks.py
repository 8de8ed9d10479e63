"""What runs in an array task, a local process or an MPI rank: some shards of a plan, or the merge.

A task reads the plan's own file, so that it never sees another plan; what it did is in the shards'
manifests, not in its result.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from hpctrain.base import files
from hpctrain.base.errors import HpctrainError, Problem, need
from hpctrain.data.merge import clean_up, merge_shards
from hpctrain.data.plan import Plan, from_json
from hpctrain.data.worker import run_shard, shard_files


class _Task:
    """A callable for submitit. Called again after a time limit or a requeue, it goes on."""

    def checkpoint(self) -> Any:
        """submitit's question when the time is up: the same task again (what is done is
        skipped)."""
        return need("submitit.helpers", "all").DelayedSubmission(self)


class ShardTask(_Task):
    """Do these shards, in order."""

    def __init__(self, plan_path: str, shards: Sequence[int]):
        self.plan_path, self.shards = plan_path, tuple(shards)

    def __call__(self) -> int:
        return run_shards(load_plan(self.plan_path), self.shards)


class MergeTask(_Task):
    """Merge all shards."""

    def __init__(self, plan_path: str, force: bool, keep_shards: bool):
        self.plan_path, self.force, self.keep_shards = plan_path, force, keep_shards

    def __call__(self) -> int:
        return merge(load_plan(self.plan_path), self.force, self.keep_shards) is None


def load_plan(path: str) -> Plan:
    """The plan in that file; it must be there and whole."""
    data = files.read_json(path)
    if data is None:
        raise HpctrainError("the plan cannot be read", where=path)
    plan = from_json(data)
    if plan.key != data["key"]:
        raise HpctrainError("the plan was changed after it was written", where=path)
    return plan


def run_shards(
    plan: Plan, shards: Sequence[int], report: Callable[[int, int], None] | None = None
) -> int:
    """Do `shards` in order; the number that failed (0 or 1, as the first failure of any task stops
    all of them).

    A failure is written next to the shard, for the command that started the tasks to show.
    """
    before = [0, 0]  # bytes and documents of the shards already done
    for index in shards:
        if failures(plan):
            return 1
        progress = _ProgressFile(plan, index)

        def tell(num_bytes: int, documents: int, progress: _ProgressFile = progress) -> None:
            progress(num_bytes, documents)
            if report:
                report(before[0] + num_bytes, before[1] + documents)

        try:
            manifest = run_shard(plan, plan.shards[index], tell)
        except HpctrainError as error:
            write_failure(plan, index, error)
            return 1
        finally:
            progress.close()
        before[0] += manifest["input_bytes"]
        before[1] += manifest["documents"]
    return 0


def merge(plan: Plan, force: bool, keep_shards: bool) -> dict[str, Any] | None:
    """Merge, then remove the shards; None when it failed, with the failure written for the waiting
    command."""
    try:
        manifest = merge_shards(plan, force)
    except HpctrainError as error:
        write_failure(plan, -1, error)
        return None
    if not keep_shards:
        clean_up(plan)
    return manifest


def write_failure(plan: Plan, index: int, error: HpctrainError) -> None:
    """Keep the problems of a failed task where `failures` finds them; a full disk must not hide the
    first error."""
    data = {
        "exit_code": error.exit_code,
        "problems": [problem.as_json() for problem in error.problems],
    }
    with contextlib.suppress(HpctrainError):
        files.write_json(_failure_path(plan, index), data)


def failures(plan: Plan) -> list[tuple[int, Problem]]:
    """(exit code, problem) of every failed task of this plan, by shard."""
    found = []
    for path in _failure_files(plan):
        data = files.read_json(path) or {}
        found += [
            (data.get("exit_code", 1), Problem(**problem)) for problem in data.get("problems", ())
        ]
    return found


def forget_failures(plan: Plan) -> None:
    """A new run starts without the failures of the last one."""
    for path in _failure_files(plan):
        files.remove(path)


def _failure_files(plan: Plan) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(plan.work_dir), f"{plan.key}*.failed.json")))


def progress(plan: Plan) -> tuple[int, int, int]:
    """(shards done, bytes of input read, documents) so far, from manifests and progress files."""
    done = num_bytes = documents = 0
    for shard in plan.shards:
        paths = shard_files(plan, shard)
        manifest = files.read_json(paths.manifest)
        if manifest:
            done += 1
            num_bytes += manifest["input_bytes"]
            documents += manifest["documents"]
            continue
        now = files.read_json(_progress_path(plan, shard.index)) or {}
        num_bytes += now.get("bytes", 0)
        documents += now.get("documents", 0)
    return done, num_bytes, documents


class _ProgressFile:
    """A few numbers a few times a minute; no fsync, as nothing depends on them."""

    EVERY_S = 2.0

    def __init__(self, plan: Plan, index: int):
        self._path = _progress_path(plan, index)
        self._next = time.monotonic() + self.EVERY_S

    def __call__(self, num_bytes: int, documents: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.EVERY_S
        temp = f"{self._path}.{os.getpid()}"
        with contextlib.suppress(OSError):
            with open(temp, "w") as file:
                file.write(f'{{"bytes": {num_bytes}, "documents": {documents}}}')
            os.replace(temp, self._path)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def _progress_path(plan: Plan, index: int) -> str:
    return os.path.join(plan.work_dir, f"{plan.key}-{index:05d}.progress")


def _failure_path(plan: Plan, index: int) -> str:
    name = f"{index:05d}" if index >= 0 else "merge"
    return os.path.join(plan.work_dir, f"{plan.key}-{name}.failed.json")
