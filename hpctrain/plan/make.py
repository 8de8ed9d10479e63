"""RunSpec x Site x Recipe -> Plan: every decided value with its reason. Pure: same input, same
plan.

`make_plan` never stops at the first problem; the plan it returns holds all of them, and is
renderable only without errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.config import billing
from hpctrain.config.decision import Decision
from hpctrain.config.document import Document, merge
from hpctrain.config.recipe import Recipe, check_recipe_options
from hpctrain.config.run import RunSpec
from hpctrain.config.site import NodeType, Partition, Site
from hpctrain.plan.job import (
    Directive,
    decide_container,
    decide_directives,
    decide_env,
    decide_preflight,
    decide_signal,
    decide_srun,
)
from hpctrain.plan.limits import (
    check_cadence,
    check_checkpoint,
    check_limits,
    check_storage,
    decide_cost,
)
from hpctrain.plan.notes import Notes
from hpctrain.plan.shape import decide_memory_gib, decide_shape, pick_partition, wants_whole_nodes
from hpctrain.recipes.contract import Context, EnvVar, Resolved, resolve


@dataclass(frozen=True)
class Plan:
    """Everything that was decided about a run; `render` turns it into text and adds nothing."""

    spec: RunSpec
    site: Site
    recipe: Recipe
    resolved: Resolved
    run_dir: str
    partition: Partition
    node_type: NodeType
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    directives: tuple[Directive, ...]
    srun_options: tuple[Directive, ...]
    container: tuple[str, ...]
    env: tuple[EnvVar, ...]
    signal: Mapping[str, Any]
    preflight: Mapping[str, Any] | None
    cost: billing.Cost
    decisions: tuple[Decision, ...]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> list[Problem]:
        """The problems that keep the plan from being rendered."""
        return [problem for problem in self.problems if problem.level == "error"]

    def guard(self) -> dict[str, Any]:
        """What the runtime guard reads from plan.json: see `hpctrain/runtime/link.py`."""
        facts, handed = self.resolved.guard, self.spec.handed
        out: dict[str, Any] = {
            "schema_version": 1,
            "run": self.spec.name,
            "layout": facts.layout,
            "checkpoint_dir": self.spec.checkpoint_dir,
            "start": None if handed else self.spec.checkpoint_start,
            "tensor_parallel": facts.tensor_parallel,
            "pipeline_parallel": facts.pipeline_parallel,
            "data_parallel": facts.data_parallel,
            "zero_stage": facts.zero_stage,
            "target": facts.target,
            "give_up_after": self.spec.give_up_after,
            "after_each": self.spec.after_each,
            "quarantine": facts.quarantine,
            "counter": facts.counter,
            "retention": facts.retention,
            "watch": self.spec.watch,
            **({"notify": self.spec.notify} if self.spec.notify else {}),
            **({"exported": True} if facts.exported else {}),
            **({"expert_parallel": facts.expert_parallel} if facts.expert_parallel else {}),
            **({"own_layout": dict(facts.own_layout)} if facts.own_layout else {}),
            **({"any_ranks": 1} if facts.any_ranks else {}),
        }
        if facts.start_needs:
            out["start_needs"] = list(facts.start_needs)
        out.update(
            {
                key: value
                for key, value in (
                    ("start_takes", facts.start_takes),
                    ("start_counts", facts.start_counts),
                    ("scratch_from", facts.scratch_from),
                )
                if value
            }
        )
        if facts.start_folder and not handed:
            out["start"], out["start_as"] = None, facts.start_as
            out["from"] = {
                "stage": "",
                "run_dir": facts.start_folder,
                "hand_over": "folder",
                "checkpoint": facts.start_checkpoint,
                "model": None,
            }
        if handed:
            out["start_as"] = handed.way
            out["from"] = {
                "stage": handed.stage,
                "run_dir": handed.run_dir,
                "hand_over": handed.hand_over,
                "checkpoint": handed.checkpoint,
                "model": handed.model,
            }
            if handed.hand_over == "model":
                out["start"] = self.spec.checkpoint_start
        return out


def make_plan(
    spec: RunSpec,
    site: Site,
    recipe: Recipe,
    run_dir: str,
    read: Mapping[str, tuple[Document, ...]] | None = None,
    problems: Sequence[Problem] = (),
) -> Plan:
    """Decide everything about the run. `problems` are those already found; the plan holds them and
    its own."""
    notes = Notes(spec, site, recipe)
    notes.problems += problems
    partition, node = pick_partition(notes)
    gpus, tasks, cpus = decide_shape(notes, node)
    options, option_problems = check_recipe_options(recipe, spec.document)
    config = replace(spec.document.section("config"), data=spec.config, name=spec.source)
    defaults = replace(recipe.document.section("config"), data=recipe.values["config"])
    resolved = Resolved()
    if not option_problems:
        context = Context(
            spec,
            site,
            recipe,
            options,
            merge([defaults, config]),
            read or {},
            run_dir,
            node,
            spec.num_nodes,
            gpus,
            tasks,
        )
        resolved = resolve(context)
    notes.problems += [*option_problems, *resolved.problems]
    check_checkpoint(notes)
    check_storage(notes, node)
    whole = bool(partition.whole_nodes or wants_whole_nodes(notes, partition, node, gpus))
    memory_gib = decide_memory_gib(notes, node, gpus, cpus * tasks, whole)
    signal = decide_signal(notes, recipe, resolved)
    directives = decide_directives(
        notes, partition, node, run_dir, gpus, tasks, cpus, memory_gib, whole, signal
    )
    srun_options = decide_srun(notes, node, tasks, cpus, whole)
    container = decide_container(notes, resolved, run_dir)
    env = decide_env(notes, resolved)
    preflight = decide_preflight(notes, directives, options, gpus, tasks)
    check_limits(notes, partition)
    cost = decide_cost(notes, partition, node, gpus, tasks * cpus, memory_gib, whole)
    check_cadence(notes, resolved, signal, gpus)
    return Plan(
        spec,
        site,
        recipe,
        resolved,
        run_dir,
        partition,
        node,
        gpus,
        tasks,
        cpus,
        directives,
        srun_options,
        container,
        env,
        signal,
        preflight,
        cost,
        (*notes.decisions, *resolved.decisions),
        tuple(notes.sorted_problems()),
    )
