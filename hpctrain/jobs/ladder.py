"""Sanity rungs before the whole run: 1 -> 2 -> 8 GPUs, each with its own output, the next only when
triage says GREEN.

A rung keeps the global batch by gradient accumulation and takes the toggles that the recipe
declares for one GPU or more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.base.errors import Problem, UsageError
from hpctrain.base.units import format_time, parse_time_s
from hpctrain.jobs.ledger import record_waived
from hpctrain.plan.load import Loaded, load_plan
from hpctrain.plan.make import Plan
from hpctrain.plan.render import plan_json
from hpctrain.plan.run_dir import run_files, write_run_dir
from hpctrain.recipes.memory import runs_out
from hpctrain.runs import cost
from hpctrain.runs.records import list_logs
from hpctrain.slurm import commands as slurm
from hpctrain.triage.judge import Diagnosis
from hpctrain.triage.rules import GREEN, RED
from hpctrain.triage.thresholds import Thresholds


@dataclass(frozen=True)
class Rung:
    """One rung: the run as loaded with `changes` (dotted key -> value), and its job's bill at most.

    `step_time_s` is what a step of the whole run is said to take, scaled to the rung; None if
    unsaid. `left_out`: why rungs below this one are not climbed.
    """

    num_gpus: int
    changes: Mapping[str, Any]
    loaded: Loaded
    bill: cost.Bill
    step_time_s: float | None = None
    left_out: tuple[Problem, ...] = ()

    @property
    def run_dir(self) -> str:
        return self.loaded.plan.run_dir


@dataclass(frozen=True)
class Result:
    """What became of a rung; `diagnosis` is None for one that was not reached."""

    rung: Rung
    job_id: str
    diagnosis: Diagnosis | None
    passed: bool
    why: str


# Of each rung, unless told otherwise. Where the time of a step is known: what the steps take and a
# quarter more, and ten minutes to start.
STEPS, TIME_S = 150, 1800
_SPARE, _START_S = 1.25, 600
_MOST_TIMES = 1000


def plan_rungs(
    path: str,
    assignments: Sequence[str],
    numbers: Sequence[int],
    steps: int | None = None,
    time: str | None = None,
) -> list[Rung]:
    """Every rung, planned; raises UsageError with the problems of all of them when one cannot be.

    Each ladder has folders of its own: one that climbed before left checkpoints, from which a rung
    would only go on.
    """
    full = load_plan(path, assignments).plan
    for again in range(1, _MOST_TIMES):
        rungs = _plan_once(path, assignments, full, numbers, steps or STEPS, time, again)
        if not any(_climbed(rung) for rung in rungs):
            break
    return rungs


def _climbed(rung: Rung) -> bool:
    """Whether a job of an earlier ladder wrote in the rung's folders."""
    folder = rung.changes.get("checkpoint.dir")
    return bool(list_logs(rung.run_dir)) or bool(
        folder and os.path.isdir(folder) and os.listdir(folder)
    )


def _plan_once(
    path: str,
    assignments: Sequence[str],
    full: Plan,
    numbers: Sequence[int],
    steps: int,
    time: str | None,
    again: int,
) -> list[Rung]:
    rungs: list[Rung] = []
    problems: list[Problem] = []
    left_out: list[Problem] = []
    for number in numbers:
        try:
            step_s = _step_time_s(full, number)
            changes = changes_for(
                full, number, steps, _time(full, number, steps, step_s, time), again
            )
            words = [
                *assignments,
                *(f"{key}={json.dumps(value)}" for key, value in changes.items()),
            ]
            loaded = load_plan(path, words)
        except UsageError as error:
            problems += error.problems
            continue
        wrong = loaded.plan.errors
        if wrong and all(map(runs_out, wrong)):  # a rung that only shows what is known
            name = f"the rung of {number} GPU{'s' if number > 1 else ''} is left out: "
            left_out += [replace(one, what=name + one.what, level="warning") for one in wrong]
            continue
        problems += wrong
        job = cost.full_job(plan_json(loaded.plan, loaded.inputs))
        assert job is not None  # a plan that was just made tells its cost
        bill = job.times(1, f"rung of {number} GPU{'s' if number > 1 else ''}", job.note)
        rungs.append(Rung(number, changes, loaded, bill, step_s, tuple(left_out)))
        left_out = []
    if problems or not rungs:
        raise UsageError(list(dict.fromkeys(problems or left_out)))
    return rungs


def _step_time_s(full: Plan, num_gpus: int) -> float | None:
    """How long a step takes on so many GPUs, by what one of the whole run is said to take.

    The global batch stays the same, so that fewer GPUs take longer in proportion.
    """
    whole = full.spec.num_nodes * full.gpus_per_node
    if not full.spec.step_time_s or not full.recipe.values["ladder"]["accumulation"] or not whole:
        return None
    return full.spec.step_time_s * whole / num_gpus


def _time(full: Plan, num_gpus: int, steps: int, step_s: float | None, asked: str | None) -> str:
    """The time limit of a rung. Raises UsageError where its steps do not fit in."""
    if step_s is None:
        return asked or format_time(TIME_S)
    work_s = steps * step_s
    enough_s = max(math.ceil((_SPARE * work_s + _START_S) / 300) * 300, TIME_S)
    most_s = parse_time_s(asked) if asked else full.partition.max_time_s
    if most_s and (work_s if asked else enough_s) > most_s:
        count = max(int(most_s / _SPARE / step_s), 1)
        more = "" if asked is None else f"--time {format_time(enough_s)}, or "
        took, given = format_time(int(work_s)), format_time(most_s)
        raise UsageError(
            f"{steps} steps on {num_gpus} GPUs take about {took}, and a rung has {given}",
            why=(
                f"a step of {full.spec.step_time_s:g} s on all GPUs takes {step_s:,.0f} s there,"
                " with the same batch"
            ),
            hint=f"{more}--steps {count}, or larger rungs",
        )
    return asked or format_time(enough_s)


def changes_for(full: Plan, num_gpus: int, steps: int, time: str, again: int = 1) -> dict[str, Any]:
    """What a rung changes in the run: shape, name, output, steps, batch and the recipe's toggles;
    `again` counts ladders.

    Raises UsageError when the global batch cannot be kept with whole accumulation steps.
    """
    nodes, per_node = shape_of_rung(num_gpus, full.node_type.gpus)
    rules = full.recipe.values["ladder"]
    if not rules["steps"]:
        raise UsageError(
            f"recipe `{full.recipe.name}` does not say which key holds the number of steps, so a"
            " rung cannot be short",
            why=f"no `ladder: {{steps: …}}` in {full.recipe.document.name}",
        )
    tag = f"ladder-{num_gpus}gpu" + (f"-{again}" if again > 1 else "")
    changes: dict[str, Any] = {
        "name": f"{full.spec.name}-{tag}",
        "nodes": nodes,
        "gpus_per_node": per_node,
        "time": time,
        "chain.jobs": 1,
    }
    if full.spec.checkpoint_dir:
        # A folder of its own: rungs that share one would resume each other's checkpoints.
        changes["checkpoint.dir"] = f"{full.spec.checkpoint_dir.rstrip('/')}-{tag}"
    if full.spec.tasks_per_node and full.recipe.tasks == "per_gpu":
        changes["tasks_per_node"] = per_node
    changes.update({key: steps for key in rules["steps"]})
    step_s = _step_time_s(full, num_gpus)
    if step_s is not None:
        changes["estimate.step_time_s"] = round(step_s, 3)
    changes.update(kept_batch(full, num_gpus))
    changes.update(rules["one_gpu"] if num_gpus == 1 else rules["more_gpus"])
    return changes


def kept_batch(full: Plan, num_gpus: int) -> dict[str, Any]:
    """What keeps the run's global batch on so many GPUs: more accumulation steps. Empty where the
    recipe names none.

    Raises UsageError when it cannot be kept with whole accumulation steps.
    """
    rules = full.recipe.values["ladder"]
    changes: dict[str, Any] = {}
    key, batch_key = rules["accumulation"], rules["global_batch"]
    whole = full.spec.num_nodes * full.gpus_per_node
    if key and whole:
        accumulation = decided(full, key)
        accumulation = accumulation if isinstance(accumulation, int) else 1
        if accumulation * whole % num_gpus:
            raise UsageError(
                f"the global batch of {whole} GPUs cannot be kept on {num_gpus}",
                why=(
                    f"{accumulation} accumulation steps x {whole} GPUs are no multiple of"
                    f" {num_gpus}"
                ),
                hint="choose rungs that divide the run's number of GPUs",
            )
        changes[key] = accumulation * whole // num_gpus
        batch = decided(full, batch_key) if batch_key else None
        if batch is not None:
            changes[batch_key] = batch
    return changes


def parse_rungs(text: str) -> list[int]:
    """`1,2,8` -> [1, 2, 8]. Raises UsageError for what is no rising list of GPU counts."""
    parts = [part.strip() for part in text.split(",")]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"`{text}` is not a ladder", hint="numbers of GPUs, such as 1,2,8")
    numbers = [int(part) for part in parts]
    if numbers != sorted(set(numbers)):
        raise UsageError(f"the rungs of `{text}` do not rise", hint="smallest first, each once")
    return numbers


def shape_of_rung(num_gpus: int, per_node: int) -> tuple[int, int]:
    """(nodes, GPUs a node) of a rung. Raises UsageError where it does not fill its nodes evenly."""
    if per_node < 1:
        raise UsageError(
            "this site's nodes have no GPUs to climb with", hint="a ladder needs a GPU partition"
        )
    if num_gpus <= per_node:
        return 1, num_gpus
    if num_gpus % per_node:
        raise UsageError(
            f"{num_gpus} GPUs do not fill nodes of {per_node}",
            hint=f"use multiples of {per_node} above one node",
        )
    return num_gpus // per_node, per_node


def total(rungs: Sequence[Rung]) -> cost.Bill:
    """What all rungs cost at most."""
    bills = [rung.bill for rung in rungs]
    return cost.total(bills, bills[0], "the ladder", "at most: the first rung that fails ends it")


def purpose(rungs: Sequence[Rung], rung: Rung) -> tuple[str, str]:
    """(name, what it validates) of a rung, as the guides have it: data on one GPU, sharding on the
    first few, then all."""
    if rung.num_gpus == 1:
        return "sanity", "data loading, falling loss, no NaN"
    if rung is next(other for other in rungs if other.num_gpus > 1):
        return "distributed", "sharding, collectives, gradients in step"
    return "full", "speed and memory at scale"


def toggles(rung: Rung) -> dict[str, Any]:
    """What the recipe switches on this rung, beside its shape, its steps and its output."""
    rules = rung.loaded.plan.recipe.values["ladder"]
    return dict(rules["one_gpu"] if rung.num_gpus == 1 else rules["more_gpus"])


def decided(plan: Plan, dotted: str) -> Any:
    """A value as the plan decided it, else as the run says it; None when neither does."""
    for decision in reversed(plan.decisions):
        if decision.name == dotted:
            return decision.value
    value: Any = {"config": plan.spec.config, "recipe_options": plan.spec.recipe_options}
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def climb(
    rungs: Sequence[Rung],
    say: Callable[[str], None],
    force: bool = False,
    thresholds: Thresholds | None = None,
    waived: Sequence[Problem] = (),
) -> list[Result]:
    """Submit rung by rung, wait, triage; stop at the first that is not good enough to climb on.
    The ledger of each keeps the errors of `check` that were `waived`."""
    results: list[Result] = []
    for index, rung in enumerate(rungs):
        if results and not results[-1].passed:
            results.append(Result(rung, "", None, False, "not reached"))
            continue
        write_run_dir(rung.run_dir, run_files(rung.loaded), force)
        record_waived(rung.run_dir, waived)
        say(f"rung of {rung.num_gpus} GPUs: submitting {rung.run_dir}")
        script = os.path.join(rung.run_dir, "job.sbatch")
        job_id, code = slurm.submitted(
            ["--wait", "--parsable", script], script, timeout_s=7 * 86400
        )
        results.append(_judge(rung, job_id, code, index + 1 == len(rungs), thresholds))
        say(f"rung of {rung.num_gpus} GPUs: {results[-1].why}")
    return results


# The questions that the guides ask of each rung's log, and the rules of triage that answer them.
CHECKS = (
    ("loss", ("loss_trend", "loss_rise")),
    ("finite", ("loss_finite",)),
    ("memory", ("gpu_memory", "host_memory")),
    ("gradients", ("gradients",)),
    ("steps", ("hang", "program", "communication")),
)


def checks(diagnosis: Diagnosis | None) -> dict[str, str]:
    """pass, fail or `not seen` for each of `CHECKS`."""
    found = {verdict.rule: verdict.verdict for verdict in diagnosis.verdicts} if diagnosis else {}
    out = {}
    for name, wanted in CHECKS:
        verdicts = {found[rule] for rule in wanted if rule in found}
        passed = "pass" if GREEN in verdicts else "not seen"
        out[name] = "fail" if RED in verdicts else passed
    return out


def log_path(rung: Rung, job_id: str) -> str:
    """Where the job of a rung writes."""
    return os.path.join(rung.run_dir, "logs", f"{rung.loaded.plan.spec.name}-{job_id}.out")


def _judge(rung: Rung, job_id: str, code: int, last: bool, thresholds: Thresholds | None) -> Result:
    from hpctrain.runs.diagnose import open_target

    log = log_path(rung, job_id)
    if not os.path.isfile(log):
        return Result(rung, job_id, None, False, f"job {job_id} left no log (exit code {code})")
    diagnosis = open_target([log], thresholds).diagnose()
    return Result(rung, job_id, diagnosis, *good_enough(diagnosis, code, last))


def good_enough(diagnosis: Diagnosis, code: int, last: bool) -> tuple[bool, str]:
    """Whether a rung that ended with `code` is good enough for the next one, and why.

    A rung that was cut by its time limit counts as long as enough steps were seen and no other rule
    objects: how long it runs is a guess. After the last rung nothing is scaled up.
    """
    seen, wanted = _steps_seen(diagnosis), diagnosis.thresholds.loss_steps
    cut = _only_cut(diagnosis)
    if cut and seen < wanted:
        return (
            False,
            f"the time limit came after {seen} steps; {wanted} are needed{_enough(diagnosis)}",
        )
    if diagnosis.verdict != GREEN and not cut:
        return False, f"{diagnosis.verdict}: {diagnosis.summary}"
    if code and not cut:
        return False, f"triage is GREEN, but the job ended with exit code {code}"
    if not diagnosis.progress.get("loss_drop_enough") and not last:
        drop = diagnosis.progress.get("loss_drop")
        what = "not seen over enough steps" if drop is None else f"only {100 * drop:.1f}%"
        hint = (
            "" if drop is None else "; a smaller one will do with --threshold loss_drop_to_scale=…"
        )
        return False, f"GREEN, but the loss drop is {what}: not safe to scale up{hint}"
    return True, f"GREEN for {seen} steps, until the time limit" if cut else "GREEN"


def _enough(diagnosis: Diagnosis) -> str:
    """The time limit that would have been enough, by the steps that were seen."""
    step_s = diagnosis.progress.get("step_time_s")
    if not step_s:
        return ""
    work_s = _SPARE * diagnosis.thresholds.loss_steps * step_s + _START_S
    return f": --time {format_time(math.ceil(work_s / 300) * 300)}"


def _only_cut(diagnosis: Diagnosis) -> bool:
    """Whether the time limit is all that triage objects to."""
    cause = diagnosis.cause
    red = {verdict.rule for verdict in diagnosis.verdicts if verdict.verdict == RED}
    return bool(cause and cause.event.failure == "time_limit" and red <= {"time_limit", "ending"})


def _steps_seen(diagnosis: Diagnosis) -> int:
    first = diagnosis.progress.get("first_iteration")
    last = diagnosis.progress.get("last_iteration")
    if isinstance(first, int) and isinstance(last, int):
        return max(last - first + 1, 0)
    return int(diagnosis.progress.get("step_lines") or 0)
