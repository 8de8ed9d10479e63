"""Watches the queued jobs of a rehearsal, plays the faults when rank 0 has come to them, and knows
when all is over."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, Problem
from hpctrain.base.units import expand_nodes, format_time
from hpctrain.plan.make import Plan
from hpctrain.sandbox.rehearse.records import Attempt, Pipe, Slots, expected_tasks, release
from hpctrain.sandbox.rehearse.stage import Login
from hpctrain.slurm.jobs import LIVE_STATES

# Reasons for which a job of a rehearsal may rightly wait for a while.
_PATIENT = {
    "None",
    "Dependency",
    "Resources",
    "Priority",
    "BeginTime",
    "QOSMaxJobsPerUserLimit",
    "AssocMaxJobsLimit",
    "Prolog",
    "JobHeldUser",
}
HURRY_S = 5  # the scheduler looks at the queue every two seconds
SIDE_S = 60  # what a side job runs is the user's own, in real time


@dataclass(frozen=True)
class Refusal:
    """Slurm's words, and what they are to be read against."""

    words: str
    plan: Plan
    accounts: Sequence[str]
    script: str


def watch_all(
    watches: Sequence[Watch], login: Login, pipe: Pipe, slots: Slots, only_cancel: bool = False
) -> None:
    """Until no job of any run is left, or all were cancelled because something went wrong (or
    `only_cancel` says so)."""
    jobs = [job_id for watch in watches for job_id in watch.all_jobs]
    if not jobs:
        return
    if only_cancel:
        login.slurm("scancel", *jobs)
    pause_s = 0.2 if max(watch.plan.spec.num_nodes for watch in watches) <= 16 else 1.0
    answered = time.monotonic()
    while True:
        found = login.queue()
        now = time.monotonic()
        answered = now if found else answered
        if now - answered > 120:
            raise EnvironmentFault(
                "the sandbox's controller does not answer any more",
                where=str(login.place.state / "log"),
                hint="is the disk full, or the memory?",
            )
        live = [job_id for watch in watches for job_id in watch.look(found, now)]
        if not live:
            return
        with pipe.lock:
            attempts = list(pipe.attempts.values())
        slots.give(sum(len(attempt.tasks) for attempt in attempts))
        for watch in watches:
            watch.act(
                [attempt for attempt in attempts if attempt.job_id in watch.all_jobs], found, now
            )
        if any(watch.problems for watch in watches):
            login.slurm("scancel", *live)
        time.sleep(pause_s)


class Watch:
    """Everything about one run's jobs between their submission and their end. `problems` holds what
    kept them from running."""

    def __init__(
        self,
        login: Login,
        plan: Plan,
        scenario: Mapping[str, Any],
        jobs: Mapping[int, str],
        side: Mapping[int, str],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.login, self.plan, self.scenario, self.jobs = login, plan, scenario, dict(jobs)
        self.problems: list[Problem] = []
        self.waited_s: dict[str, float] = {}
        self._progress = progress
        self._submitted = time.monotonic()
        self._states: dict[str, str] = {}
        self._played: set[tuple[str, int]] = set()
        self._down: list[tuple[str, str]] = []
        self._stuck: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._hurried: dict[str, float] = {}
        self._side = set(side.values())
        num_tasks = plan.spec.num_nodes * plan.tasks_per_node
        self._start_limit_s = 120 + 0.3 * num_tasks
        self._patience_s = 15 + 0.5 * plan.spec.num_nodes

    @property
    def all_jobs(self) -> list[str]:
        return [*self.jobs.values(), *self._side]

    def states(self) -> dict[str, str]:
        """{job id: its last state}."""
        return dict(self._states)

    def look(self, found: Mapping[str, tuple[str, str]], now: float) -> list[str]:
        """Take note of the jobs' states; those that are not over."""
        live = []
        for job_id in self.all_jobs:
            state, reason = found.get(job_id, (self._states.get(job_id, "PENDING"), ""))
            self._states[job_id] = state
            if state == "PENDING":
                self._waits(job_id, reason, now)
                self._start_now(job_id, reason, now)
                self._running.pop(job_id, None)
            elif state == "RUNNING":
                self._stuck.pop(job_id, None)
                self._running.setdefault(job_id, now)
                self.waited_s.setdefault(job_id, now - self._submitted)
            if state in LIVE_STATES:
                live.append(job_id)
        return live

    def act(
        self, attempts: Sequence[Attempt], found: Mapping[str, tuple[str, str]], now: float
    ) -> None:
        """Play the faults whose moment has come, and bring back what they took."""
        for attempt in attempts:
            self._play(attempt, now)
        self._silence(attempts, now)
        self._bring_back(found)
        self._tell(attempts)

    def _waits(self, job_id: str, reason: str, now: float) -> None:
        """A job that waits for what will never come is an error; Slurm's reason is its message."""
        if reason in _PATIENT:
            self._stuck.pop(job_id, None)
            return
        since = self._stuck.setdefault(job_id, now)
        if now - since > self._patience_s:
            self.problems.append(
                Problem(
                    f"job {job_id} would wait for ever: {reason}",
                    why="Slurm accepted it and gives this reason for not starting it",
                    hint="`man squeue`, JOB REASON CODES, tells what it means",
                )
            )

    def _start_now(self, job_id: str, reason: str, now: float) -> None:
        """In compressed time nobody waits for a clock: not a requeued job for the end of its old
        credential (minutes, see `cred_expire` in sandbox/shape.py), nor one with `--begin` for its
        day."""
        if reason == "BeginTime" and now - self._hurried.get(job_id, -1e9) > HURRY_S:
            self._hurried[job_id] = now
            self.login.slurm("scontrol", "update", f"jobid={job_id}", "StartTime=now")

    def _play(self, attempt: Attempt, now: float) -> None:
        key = attempt.job_id, attempt.restart
        if key in self._played:
            return
        if not attempt.ready and now - attempt.begun > self._start_limit_s:
            self._played.add(key)
            wanted = expected_tasks(attempt.tasks[0]) if attempt.tasks else 0
            self.problems.append(
                Problem(
                    f"only {len(attempt.tasks)} of {wanted} tasks came within"
                    f" {self._start_limit_s:.0f} s",
                    why="the others of the step would wait for them",
                )
            )
        if (
            attempt.ready
            and not attempt.events
            and not any(_is_first(task) for task in attempt.tasks)
            and now - attempt.begun > 5
        ):
            self._played.add(key)
            self.login.slurm("scancel", attempt.job_id)
        if attempt.last("limit"):
            self._played.add(key)
            if self.scenario["saves_on_signal"]:
                # What Slurm itself does that long before the limit (sbatch --signal=B:…).
                self.login.slurm(
                    "scancel", "--batch", f"--signal={self.scenario['signal']}", attempt.job_id
                )
            else:
                # The limit in compressed time has come: a limit of no minutes makes Slurm end the
                # job as at any limit.
                self.login.slurm("scontrol", "update", f"jobid={attempt.job_id}", "TimeLimit=0")
        elif attempt.last("strike"):
            self._played.add(key)
            nodes = expand_nodes(attempt.tasks[-1].get("SLURMD_NODENAME", ""))
            self.login.fail_node(nodes[0])
            self._down.append((nodes[0], attempt.job_id))

    def _silence(self, attempts: Sequence[Attempt], now: float) -> None:
        """A running job of which nothing is heard: its step never started, or it is not the
        plan's."""
        for job_id, since in self._running.items():
            if job_id in self._side:
                if now - since > SIDE_S:
                    self.login.slurm("scancel", job_id)
                continue
            heard = [
                moment
                for attempt in attempts
                if attempt.job_id == job_id
                for moment in attempt.moments()
            ]
            if now - max([since, *heard]) > self._start_limit_s:
                what = "came no further" if heard else "started no task that reported"
                self.problems.append(
                    Problem(
                        f"job {job_id} {what} within {self._start_limit_s:.0f} s",
                        why="a rehearsal replaces the program that the plan names",
                        hint=(
                            "does job.sbatch run another one, or does something before the step"
                            " wait?"
                        ),
                    )
                )

    def _bring_back(self, found: Mapping[str, tuple[str, str]]) -> None:
        """A failed node returns once its job has left it: the sandbox has no spare ones."""
        for node, job_id in list(self._down):
            if found.get(job_id, ("",))[0] not in (
                "RUNNING",
                "COMPLETING",
            ) and self.login.return_node(node):
                self._down.remove((node, job_id))

    def _tell(self, attempts: Sequence[Attempt]) -> None:
        newest = max(attempts, key=lambda attempt: attempt.begun, default=None)
        if newest is None:
            return
        if newest.tasks and (newest.last("end") or newest.last("left")):
            release(newest.tasks[0]["folder"])
        total = self.plan.spec.num_nodes * self.plan.tasks_per_node
        if not newest.ready:
            self._progress("starting tasks", len(newest.tasks), total)
        else:
            events = [int(fields["number"]) for _, fields in newest.events if "number" in fields]
            done = max(events, default=0) - self.scenario["offset"]
            self._progress("iterations", max(done, 0), self.scenario["iterations"])


def refusal_problem(refusal: Refusal) -> Problem:
    """Slurm's own message with what is known about its cause."""
    words, plan = refusal.words, refusal.plan
    part, node, site = plan.partition, plan.node_type, plan.site
    gives = f"{node.usable_cores} cores, {node.memory_gib:g} GiB and {node.gpus} GPUs"
    size = _asked(refusal.script, "ntasks-per-node", "cpus-per-task", "mem", "gpus-per-node")
    known = ", ".join(site.partitions) or "any"
    only_here = "the sandbox has none of the site's own"
    hints = (
        (
            "Invalid account",
            f"accounts there: {', '.join(refusal.accounts) or 'none'}",
            "set `account:` to one of yours",
        ),
        (
            "Requested time limit is invalid",
            (
                f"partition `{part.name}` allows"
                f" {format_time(part.max_time_s) if part.max_time_s else 'any time'}, and"
                f" job.sbatch asks for {_asked(refusal.script, 'time')}"
            ),
            "between a minute and that; for a longer run queue a chain",
        ),
        (
            "MaxSubmitJobPerUser",
            f"partition `{part.name}` takes {part.max_submitted} submitted jobs a user",
            "queue fewer links, or another partition",
        ),
        (
            "AssocMaxSubmitJobLimit",
            "no account, an exhausted one, or too many jobs in the queue",
            "set `account:`",
        ),
        (
            "node configuration is not available",
            f"a `{node.name}` node gives jobs {gives}, and job.sbatch asks for {size}",
            f"at most {gives} a node",
        ),
        (
            "CPU count per node",
            f"a `{node.name}` node gives jobs {node.usable_cores} cores",
            f"at most {node.usable_cores} cores a node",
        ),
        (
            "Node count specification",
            f"partition `{part.name}` allows {part.max_nodes or 'any number of'} nodes",
            "ask for fewer `nodes:`",
        ),
        (
            "Invalid partition name",
            f"partitions of `{site.name}`: {known}",
            "set `partition:` to one of them, or leave it out",
        ),
        (
            "Invalid job array",
            f"the highest index is {site.values['slurm']['max_array_size'] - 1} (MaxArraySize)",
            "submit several smaller arrays",
        ),
        (
            "Invalid qos",
            f"the profile of `{site.name}` names no such QOS",
            "look at `sacctmgr show qos` there; leave it out, or add it to the profile",
        ),
        ("reservation is invalid", only_here, "rehearse without it: --set sbatch.reservation=null"),
        (
            "Invalid node name",
            "the sandbox's nodes have other names than the site's",
            "rehearse without them: --set sbatch.exclude=null, or nodelist",
        ),
        (
            "Invalid feature",
            (
                "the sandbox's nodes have only the name of their kind as a feature"
                f" ({', '.join(site.node_types)})"
            ),
            "rehearse without it: --set sbatch.constraint=null",
        ),
    )
    for mark, why, hint in hints:
        if mark in words:
            return Problem(words, why=why, hint=hint)
    return Problem(words)


def _asked(script: str, *options: str) -> str:
    """Those of the script's directives."""
    found = [
        f"--{name}={value}"
        for name, value in re.findall(r"(?m)^#SBATCH --([a-z-]+)=(\S+)", script)
        if name in options
    ]
    return " ".join(found) or "more"


def _is_first(task: Mapping[str, str]) -> bool:
    return task.get("RANK", task.get("SLURM_PROCID", "0")) == "0"
