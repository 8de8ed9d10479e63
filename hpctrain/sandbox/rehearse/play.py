"""Plays one rehearsal: builds the scene, starts the sandbox, queues the chain, plays the faults,
and reports what happened."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.base.files import sha256_of
from hpctrain.jobs.pipeline.stages import Pipeline
from hpctrain.plan.load import Loaded
from hpctrain.plan.make import Plan
from hpctrain.plan.run_dir import run_files
from hpctrain.runtime import sidecar
from hpctrain.runtime.files import read_records
from hpctrain.sandbox.from_site import node_shape
from hpctrain.sandbox.rehearse import checks, scene, stage
from hpctrain.sandbox.rehearse.queued import Queued, queue, queue_pipeline
from hpctrain.sandbox.rehearse.records import Attempt, Pipe, Slots
from hpctrain.sandbox.rehearse.scene import Scene, start_step
from hpctrain.sandbox.rehearse.watch import Refusal, Watch, refusal_problem, watch_all

FAULTS = ("timeout", "node_fail", "kill_mid_save")
LINK_S = 4.0  # how long a whole link takes here unless --speed says so


@dataclass(frozen=True)
class Request:
    """What to rehearse. `accounts` exist in the sandbox; `job_script` replaces the rendered one;
    `speed` 0 chooses it.

    `limits_only`: submit and see what is refused; nothing is started, so any number of nodes takes
    seconds.
    """

    num_jobs: int = 1
    faults: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()
    accounting: bool = True
    job_script: bytes | None = None
    speed: float = 0.0
    limits_only: bool = False
    keep: bool = False
    directory: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a rehearsal told of one run. `attempts` in the order of their start, `links` and
    `states` as Slurm and the guard have them. `stage` is its name in a pipeline, "" for a run
    alone."""

    problems: tuple[Problem, ...]
    scene: Scene
    attempts: tuple[Attempt, ...]
    links: tuple[dict[str, Any], ...]
    jobs: Mapping[int, str]
    side: Mapping[int, str]
    states: Mapping[str, str]
    waited_s: Mapping[str, float]
    scenario: Mapping[str, Any]
    refused: str
    seconds: Mapping[str, float]
    script_sha256: str
    kept: str
    stage: str = ""

    @property
    def ok(self) -> bool:
        return not any(problem.level == "error" for problem in self.problems)


@dataclass(frozen=True)
class Part:
    """One run of a rehearsal: alone, or a stage of a pipeline."""

    stage: str
    loaded: Loaded
    request: Request
    scene: Scene
    files: Mapping[str, bytes]
    scenario: Mapping[str, Any]
    exports: tuple[str, ...]

    @property
    def plan(self) -> Plan:
        return self.loaded.plan

    @property
    def needed(self) -> list[str]:
        """What every task must see."""
        handed = self.plan.spec.handed
        model = [handed.model] if handed and handed.model else []
        return [
            item.path
            for item in self.scene.made
            if item.kind != "secrets" and item.path != self.plan.spec.container
        ] + model


def rehearse(
    loaded: Loaded,
    request: Request,
    environ: Mapping[str, str],
    progress: Callable[[str, int, int], None],
) -> Outcome:
    """Play one run and take everything down again. Raises EnvironmentFault where this machine
    cannot, Refused when it may not."""
    parts = _parts([("", loaded, request)], loaded.plan.run_dir, environ)
    (outcome,) = _play(parts, loaded.plan.run_dir, None, environ, progress)
    return outcome


def rehearse_pipeline(
    pipeline: Pipeline,
    requests: Mapping[str, Request],
    environ: Mapping[str, str],
    progress: Callable[[str, int, int], None],
) -> list[Outcome]:
    """The same with all stages of a pipeline: all their links are queued at once, each stage behind
    the one it is from, and its first link gets what that one's jobs made. `requests` are by stage
    and differ in nothing but their faults.
    """
    wanted = [
        (planned.stage.name, planned.loaded, requests[planned.stage.name])
        for planned in pipeline.stages
    ]
    return _play(
        _parts(wanted, pipeline.folder, environ), pipeline.folder, pipeline, environ, progress
    )


def _parts(
    wanted: Sequence[tuple[str, Loaded, Request]], folder: str, environ: Mapping[str, str]
) -> list[Part]:
    user = environ.get("USER") or environ.get("LOGNAME") or "user"
    scenes = scene.plan_scenes([loaded.plan for _, loaded, _ in wanted], folder, user)
    parts = []
    for (stage_name, loaded, request), shown in zip(wanted, scenes):
        files = dict(run_files(loaded))
        exports = checks.exported(files["job.sbatch"].decode("utf-8", "replace"))
        if request.job_script is not None:
            files["job.sbatch"] = request.job_script
        parts.append(
            Part(
                stage_name,
                loaded,
                request,
                shown,
                files,
                make_scenario(loaded.plan, request),
                exports,
            )
        )
    return parts


def _play(
    parts: Sequence[Part],
    folder: str,
    pipeline: Pipeline | None,
    environ: Mapping[str, str],
    progress: Callable[[str, int, int], None],
) -> list[Outcome]:
    plans, request, shown = [part.plan for part in parts], parts[0].request, parts[0].scene
    clock, seconds = time.monotonic(), {}
    with (
        stage.place_of(folder, request.directory, environ, request.keep) as place,
        stage.enough_space(place, max(plan.spec.num_nodes for plan in plans), request.accounting),
    ):
        secret = ""
        stage.make_pipes(place)
        for number, part in enumerate(parts):
            secret = scene.build(part.scene, str(place.files), part.plan, part.files, secret)
            stage.install(place, number, part.plan, part.scenario, part.needed)
        before = listing(str(place.files))
        mounts = [(str(place.files / source), target) for source, target in shown.mounts]
        accounts = request.accounts or tuple(
            dict.fromkeys(plan.spec.account for plan in plans if plan.spec.account)
        )
        shape = stage.shape_of(plans, mounts, request.accounting, accounts, not request.limits_only)
        queued = [Queued() for _ in parts]
        pipe, slots = Pipe(str(place.shims), _ready), Slots(str(place.shims))
        try:
            record = stage.start(place, shape, environ, progress)
            stage.connect(place, plans)
            seconds["sandbox"] = time.monotonic() - clock
            login = stage.Login(record, place, shown.home, environ)
            queued = (
                queue_pipeline(login, pipeline)
                if pipeline
                else [queue(login, plans[0], request.num_jobs)]
            )
            watches = [
                Watch(login, part.plan, part.scenario, found.jobs, found.side, progress)
                for part, found in zip(parts, queued)
            ]
            watch_all(
                watches,
                login,
                pipe,
                slots,
                any(found.refused for found in queued) or request.limits_only,
            )
            seconds["jobs"] = time.monotonic() - clock - seconds["sandbox"]
        finally:
            pipe.close()
            slots.close()
            for plan, found in zip(plans, queued):
                stage.sweep(plan, [*found.jobs.values(), *found.side.values()])
        looked = time.monotonic()
        written = _written(before, listing(str(place.files)), shown, plans, folder)
        was_stopped = any(found.refused for found in queued) or any(
            watch.problems for watch in watches
        )
        outcomes: list[Outcome] = []
        for part, found, watch in zip(parts, queued, watches):
            has_ended = not was_stopped and all(outcome.ok for outcome in outcomes)
            outcomes.append(
                _outcome(part, found, watch, place, pipe, accounts, secret, written, has_ended)
            )
            written = []
        seconds["checks"] = time.monotonic() - looked
    seconds["all"] = time.monotonic() - clock
    kept = str(place.base) if request.keep else ""
    return [replace(outcome, seconds=seconds, kept=kept) for outcome in outcomes]


def _outcome(
    part: Part,
    found: Queued,
    watch: Watch,
    place: stage.Place,
    pipe: Pipe,
    accounts: Sequence[str],
    secret: str,
    written: Sequence[Problem],
    has_ended: bool,
) -> Outcome:
    """What is to be told of one run. Where it was not left to its own end (not `has_ended`) that
    end tells nothing."""
    plan, shown = part.plan, part.scene
    run_dir = shown.real_path(str(place.files), plan.run_dir) or ""
    links = tuple(read_records(os.path.join(run_dir, "links.jsonl")))
    own = {*found.jobs.values(), *found.side.values()}
    attempts = tuple(
        sorted(
            (a for a in pipe.attempts.values() if a.job_id in own),
            key=lambda attempt: attempt.begun,
        )
    )
    is_known = any("unseen" in task for attempt in attempts for task in attempt.tasks)
    problems = [
        *_refused(found.refused, accounts, plan, part.files["job.sbatch"]),
        *watch.problems,
        *_steps(plan, attempts, [target for _, target in shown.mounts], part.exports),
        *(
            _ends(plan, part.request, watch, attempts, links, run_dir, is_known)
            if has_ended and not part.request.limits_only
            else []
        ),
        *_side(found.side, watch.states(), run_dir),
        *written,
        *_secret(secret, run_dir),
    ]
    if part.stage:
        problems = [
            replace(problem, what=f"stage `{part.stage}`: {problem.what}") for problem in problems
        ]
    sha256 = sha256_of(os.path.join(run_dir, "job.sbatch"))
    return Outcome(
        tuple(dict.fromkeys(problems)),
        shown,
        attempts,
        links,
        found.jobs,
        found.side,
        watch.states(),
        watch.waited_s,
        part.scenario,
        found.refused,
        {},
        sha256,
        "",
        part.stage,
    )


def make_scenario(plan: Plan, request: Request) -> dict[str, Any]:
    """The stand-in's orders: the run's cadence, and how fast time goes. Pure."""
    cadence, facts = plan.resolved.cadence, plan.resolved.guard
    iterations = cadence.iterations or facts.target or 100
    found = start_step(plan)
    if found is not None:
        iterations = max((facts.target or 2 * found) - found, 1)
    # the start's number, where the framework counts on from it
    offset = max((facts.target or iterations) - iterations, 0)
    known = plan.spec.step_time_s
    step_time_s = known or max(plan.spec.time_s / 2 / iterations, 1e-3)
    link_s = min(iterations * step_time_s, plan.spec.time_s)
    speed = request.speed or max(link_s / LINK_S, 1.0)
    save_time_s = plan.spec.save_time_s or 0.0
    return {
        "faults": list(request.faults),
        "target": offset + iterations,
        "iterations": iterations,
        "offset": offset,
        "counts_on": facts.counter == "greatest_folder" or offset > 0,
        "save_every": cadence.save_every,
        "layout": facts.layout,
        **({"own": dict(facts.own_layout)} if facts.own_layout else {}),
        "ranks": scene.ranks_of(plan),
        "time_s": plan.spec.time_s,
        "step_time_s": step_time_s,
        "step_time_known": known is not None,
        "save_time_s": save_time_s,
        "iteration_s": step_time_s / speed,
        "save_s": min(save_time_s / speed, 2.0),
        "speed": speed,
        "signal": plan.signal["name"],
        "lead_s": plan.signal["lead_s"],
        "saves_on_signal": bool(cadence.saves_on_signal and plan.signal["forward"]),
        "python": plan.resolved.argv[0],
        "model": plan.resolved.model,
    }


def listing(root: str) -> dict[str, tuple[int, int]]:
    """{path below `root`: (size, time of change)} of every file; links are not followed."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found[os.path.relpath(path, root)] = (status.st_size, status.st_mtime_ns)
    return found


def expectation(plan: Plan, file_systems: Sequence[str] = ()) -> checks.Expected:
    """The plan's step as the checks need it."""
    bind = next((option.value for option in plan.srun_options if option.option == "cpu-bind"), "")
    kind, _, values = bind.partition(":")
    reserved = (
        node_shape(plan.node_type).reserved_cores
        if plan.node_type.usable_cores < plan.node_type.cores
        else ()
    )
    return checks.Expected(
        plan.spec.num_nodes,
        plan.tasks_per_node,
        plan.gpus_per_node,
        plan.cpus_per_task,
        plan.node_type.gpu_vendor,
        checks.bind_masks(kind, values),
        bool(plan.recipe.values["rehearse"].get("all_gpus")),
        plan.resolved.workdir or plan.run_dir,
        reserved,
        tuple(file_systems),
    )


def _ready(attempt: Attempt) -> None:
    Path(attempt.tasks[0]["folder"], f"ready.{attempt.job_id}.{attempt.restart}").touch()


def _refused(words: str, accounts: Sequence[str], plan: Plan, script: bytes) -> list[Problem]:
    return (
        [refusal_problem(Refusal(words, plan, accounts, script.decode("utf-8", "replace")))]
        if words
        else []
    )


def _steps(
    plan: Plan, attempts: Sequence[Attempt], file_systems: Sequence[str], exports: tuple[str, ...]
) -> list[Problem]:
    """What the tasks of every start saw; the same problem of several starts is one."""
    # its own srun takes the place of the exports
    own_srun = bool(plan.resolved.tasks_argv)
    expected = replace(expectation(plan, file_systems), exports=() if own_srun else exports)
    found: list[Problem] = []
    for attempt in attempts:
        if attempt.tasks:
            found += checks.find_problems(attempt.tasks, expected)
    return list(dict.fromkeys(found))


def _ends(
    plan: Plan,
    request: Request,
    watch: Watch,
    attempts: Sequence[Attempt],
    links: Sequence[Mapping[str, Any]],
    run_dir: str,
    is_known: bool,
) -> list[Problem]:
    """`is_known`: the tasks have told why. Jobs that ended otherwise than the faults explain, and
    runs that did not reach their target."""
    found: list[Problem] = []
    states = watch.states()
    started = [attempt for attempt in attempts if attempt.ready]
    gave_up = {
        str(record.get("job_id")): record.get("reason")
        for record in links
        if record.get("mode") == "gave_up"
    }
    played = {attempt.job_id: fault for attempt, fault in zip(started, request.faults)}
    for number, left in enumerate(request.faults[len(started) :], start=len(started) + 1):
        if left and not found:
            found.append(
                Problem(
                    f"fault {number} (`{left}`) was not played: the step was started {len(started)}"
                    " times",
                    level="note",
                    hint="queue more links with --jobs",
                )
            )
    for link, job_id in watch.jobs.items():
        state = states.get(job_id, "")
        fault = played.get(job_id)
        if job_id in gave_up:
            found.append(
                Problem(
                    f"link {link} gives up: {gave_up[job_id]}",
                    why=f"so job {job_id} trains nothing, and ends the links after it",
                )
            )
            continue
        natural = state == "TIMEOUT" and any(
            a.job_id == job_id and a.last("limit") for a in attempts
        )
        explained = (
            natural
            or (fault == "kill_mid_save" and state == "FAILED")
            or (fault == "timeout" and state == "TIMEOUT")
        )
        if state in ("COMPLETED", "CANCELLED", "") or explained or (is_known and state == "FAILED"):
            continue
        if state in ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"):
            found.append(
                Problem(
                    f"link {link} (job {job_id}) ended as {state}",
                    why=tail(os.path.join(run_dir, "logs"), job_id) or "its log is empty",
                    hint="the lines above are the end of its log",
                )
            )
    target = plan.resolved.guard.target
    ends = [record.get("iteration") or 0 for record in links if record.get("event") == "end"]
    if (
        target
        and watch.jobs
        and not is_known
        and not any(p.level == "error" for p in found)
        and max(ends, default=0) < target
    ):
        level = (
            "note"
            if any(state == "TIMEOUT" for state in states.values()) or request.faults
            else "error"
        )
        found.append(
            Problem(
                f"the run came to iteration {max(ends, default=0)} of {target} in {len(watch.jobs)}"
                " links",
                hint="queue more links: `hpctrain rehearse --jobs N`",
                level=level,
            )
        )
    return found


def _side(side: Mapping[int, str], states: Mapping[str, str], run_dir: str) -> list[Problem]:
    """Side jobs that failed; they never stop the chain."""
    return [
        Problem(
            f"the side job after link {link} (job {job_id}) ended as {states[job_id]}",
            level="warning",
            why=tail(os.path.join(run_dir, "logs"), job_id) or "its log is empty",
            hint=(
                "what it runs is not replaced: where that needs the site, look at these lines for"
                " other mistakes"
            ),
        )
        for link, job_id in side.items()
        if states.get(job_id, "") not in ("COMPLETED", "CANCELLED", "")
    ]


def tail(folder: str, job_id: str, num_lines: int = 8) -> str:
    """The last lines of a job's log, and before them the first ones that speak of an error: often
    it is the cause."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(f"-{job_id}.out")]
        with open(os.path.join(folder, names[0]), "rb") as stream:
            stream.seek(max(os.fstat(stream.fileno()).st_size - (1 << 20), 0))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except (OSError, IndexError):
        return ""
    lines = [
        line
        for line in lines
        if "CPU binding" not in line and "lacks support for cpu binding" not in line
    ]
    first = [line for line in lines[:-num_lines] if "error" in line.lower()][:3]
    return "\n".join(line[:300] for line in [*first, *lines[-num_lines:]])


def _written(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    shown: Scene,
    plans: Sequence[Plan],
    folder: str,
) -> list[Problem]:
    """Files that the jobs made or changed outside the checkpoint folders, the run directories (in
    `folder`) and their models."""
    targets = dict(shown.mounts)
    allowed = [folder]
    for plan in plans:
        known = (
            plan.spec.checkpoint_dir,
            plan.spec.checkpoint_dir and sidecar.beside(plan.spec.checkpoint_dir),
            plan.run_dir,
            plan.resolved.model,
            *(path for _, path in plan.resolved.binds),
        )
        allowed += [path for path in known if path]
    wrong = []
    for name, facts in after.items():
        if before.get(name) == facts:
            continue
        source, _, rest = name.partition("/")
        path = os.path.join(targets[source], rest)
        if not any(path.startswith(folder.rstrip("/") + "/") for folder in allowed):
            wrong.append(path)
    wrong.sort()
    return [
        Problem(
            f"the job wrote `{path}`",
            why="it lies neither in the checkpoint folder nor in the run directory",
            level="warning",
        )
        for path in wrong[:5]
    ]


def _secret(secret: str, run_dir: str) -> list[Problem]:
    found = []
    for folder, _, names in os.walk(run_dir):
        for name in names:
            with open(os.path.join(folder, name), "rb") as stream:
                if secret.encode() in stream.read():
                    found.append(os.path.relpath(os.path.join(folder, name), run_dir))
    return [
        Problem(
            f"a value of the secrets file stands in `{name}` of the run directory",
            hint="print no environment in the job",
        )
        for name in sorted(found)
    ]


__all__ = ["FAULTS", "Outcome", "Request", "rehearse", "rehearse_pipeline"]
