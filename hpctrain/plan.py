"""RunSpec x Site x Recipe -> Plan: every decided value with its reason. Pure: same input, same plan.

`make_plan` never stops at the first problem; the plan it returns holds all of them, and is renderable only without errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain import estimate, launchers
from hpctrain.errors import Problem
from hpctrain.recipe import Context, Decision, EnvVar, Recipe, Resolved, check_recipe_options, resolve
from hpctrain.sbatch_options import REPLACES, option_text
from hpctrain.schema import nearest
from hpctrain.shell import output_pattern
from hpctrain.site import NodeType, Partition, Site
from hpctrain.spec import RunSpec
from hpctrain.units import format_mem_gib, format_time, parse_mem_gib
from hpctrain.yamlio import Document, merge

# The batch shell needs this long to write down how a link ended; Slurm may send a signal up to 60 s early.
NOTICE_LEAD_S = 60


@dataclass(frozen=True)
class Directive:
    """One #SBATCH option; an empty value is a switch."""

    option: str
    value: str
    why: str = ""


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
    cost: estimate.Cost
    decisions: tuple[Decision, ...]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> list[Problem]:
        """The problems that keep the plan from being rendered."""
        return [problem for problem in self.problems if problem.level == "error"]

    def guard(self) -> dict[str, Any]:
        """What the runtime guard reads from plan.json: see `hpctrain/runtime/link.py`."""
        facts = self.resolved.guard
        return {
            "schema_version": 1,
            "run": self.spec.name,
            "layout": facts.layout,
            "checkpoint_dir": self.spec.checkpoint_dir,
            "start": self.spec.checkpoint_start,
            "tensor_parallel": facts.tensor_parallel,
            "pipeline_parallel": facts.pipeline_parallel,
            "data_parallel": facts.data_parallel,
            "zero_stage": facts.zero_stage,
            "target": facts.target,
            "give_up_after": self.spec.give_up_after,
            "after_each": self.spec.after_each,
            "quarantine": facts.quarantine,
            "counter": facts.counter,
        }


def make_plan(spec: RunSpec, site: Site, recipe: Recipe, run_dir: str,
              read: Mapping[str, tuple[Document, ...]] | None = None, problems: Sequence[Problem] = ()) -> Plan:  # fmt: skip
    """Decide everything about the run. `problems` are those already found; the plan holds them and its own."""
    decider = _Decider(spec, site, recipe)
    decider.problems += problems
    partition, node = decider.partition()
    gpus, tasks, cpus = decider.shape(node)
    options, option_problems = check_recipe_options(recipe, spec.document)
    config = Document(spec.config, *_config_origins(spec.document), spec.source)
    defaults = Document(recipe.values["config"], *_config_origins(recipe.document), recipe.document.name)
    resolved = Resolved()
    if not option_problems:
        context = Context(spec, site, recipe, options, merge([defaults, config]), read or {}, run_dir, node,
                          spec.num_nodes, gpus, tasks)  # fmt: skip
        resolved = resolve(context)
    decider.problems += [*option_problems, *resolved.problems]
    decider.checkpoint()
    whole = bool(partition.whole_nodes or decider.exclusive(partition, node, gpus))
    memory_gib = decider.memory_gib(node, gpus, cpus * tasks, whole)
    signal = decider.signal(recipe, resolved)
    directives = decider.directives(partition, node, run_dir, gpus, tasks, cpus, memory_gib, whole, signal)
    srun_options = decider.srun(node, tasks, cpus, whole)
    container = decider.container(resolved, run_dir)
    env = decider.env(resolved)
    decider.limits(partition)
    cost = decider.cost(partition, node, gpus, tasks * cpus, memory_gib, whole)
    decider.cadence(resolved, signal)
    return Plan(
        spec, site, recipe, resolved, run_dir, partition, node, gpus, tasks, cpus, directives, srun_options, container,
        env, signal, cost, (*decider.decisions, *resolved.decisions), tuple(decider.sorted_problems()),
    )  # fmt: skip


class _Decider:
    """Collects decisions and problems while the plan is made; one method per question."""

    def __init__(self, spec: RunSpec, site: Site, recipe: Recipe) -> None:
        self.spec, self.site, self.recipe = spec, site, recipe
        self.decisions: list[Decision] = []
        self.problems: list[Problem] = []

    def decide(self, name: str, value: Any, reason: str, *path: Any, site: bool = False) -> Any:
        document = self.site.document if site else self.spec.document
        self.decisions.append(Decision(name, value, reason, document.where(*path) if path else ""))
        return value

    def error(self, what: str, *path: Any, why: str = "", hint: str = "", level: str = "error") -> None:
        self.problems.append(Problem(what, self.spec.where(*path), why, hint, level))

    def sorted_problems(self) -> list[Problem]:
        """By place, each only once."""

        def key(problem: Problem) -> tuple[Any, ...]:
            parts = problem.where.rsplit(":", 2)
            numbers = [int(part) if part.isdigit() else 0 for part in parts[1:]]
            return (problem.level != "error", parts[0], *numbers)

        return sorted(dict.fromkeys(self.problems), key=key)

    # -- where and with what shape ---------------------------------------------------------------------------------

    def partition(self) -> tuple[Partition, NodeType]:
        spec, site = self.spec, self.site
        if spec.partition:
            found = site.partition(spec.partition)
            if not found:
                self.error(
                    f"site `{site.name}` has no partition `{spec.partition}`", "partition",
                    why=f"partitions are set in {site.document.where('partitions')}", hint=nearest(spec.partition, site.partitions),
                )  # fmt: skip
                found = Partition(spec.partition, self._any_node())
            self.decide("partition", found.name, "as the run says", "partition")
            return found, found.node_type
        fitting = self._fitting()
        if not fitting:
            if not site.partitions:
                default = site.partition("")
                assert default
                self.decide(
                    "partition", "", "the site's default partition, since neither the run nor the profile names one"
                )
                return default, default.node_type
            self.error(
                f"no partition of `{site.name}` fits {spec.num_nodes} nodes for {format_time(spec.time_s)}", "nodes",
                why="\n".join(self._limit_line(partition) for partition in site.partitions.values()),
                hint="ask for fewer nodes or less time, or name a `partition:`",
            )  # fmt: skip
            return Partition("", self._any_node()), self._any_node()
        found = fitting[0]
        others = f"; {', '.join(p.name for p in fitting[1:])} would fit too" if len(fitting) > 1 else ""
        reason = f"the smallest that fits {spec.num_nodes} nodes for {format_time(spec.time_s)}{others}"
        self.decide("partition", found.name, reason, "partitions", found.name, site=True)
        return found, found.node_type

    def _any_node(self) -> NodeType:
        nodes = list(self.site.node_types.values())
        return next((node for node in nodes if node.gpus and self.recipe.values["needs_gpus"]), nodes[0])

    def _fitting(self) -> list[Partition]:
        wants_gpus = self.recipe.values["needs_gpus"] or bool(self.spec.gpus_per_node)
        has_gpus = any(p.node_type.gpus for p in self.site.partitions.values())
        found = [
            partition
            for partition in self.site.partitions.values()
            if not partition.debug
            and (not has_gpus or bool(partition.node_type.gpus) == wants_gpus)
            and self.spec.num_nodes <= (partition.max_nodes or self.spec.num_nodes)
            and self.spec.num_nodes >= (partition.min_nodes or 1)
            and self.spec.time_s <= (partition.max_time_s or self.spec.time_s)
        ]
        # Shorter partitions drain faster; among equals the one made for small jobs.
        return sorted(found, key=lambda p: (p.max_nodes or 10**9, p.max_time_s or 10**9, p.name))

    def _limit_line(self, partition: Partition) -> str:
        time = format_time(partition.max_time_s) if partition.max_time_s else "any time"
        nodes = f"{partition.max_nodes} nodes" if partition.max_nodes else "any number of nodes"
        kind = f"{partition.node_type.gpus} GPUs a node" if partition.node_type.gpus else "CPU only"
        return f"{partition.name}: up to {nodes}, {time}, {kind}{', debug' if partition.debug else ''}"

    def shape(self, node: NodeType) -> tuple[int, int, int]:
        spec = self.spec
        gpus = node.gpus if spec.gpus_per_node is None else spec.gpus_per_node
        if self.site.values["slurm"]["gpu_request"] == "none" and spec.gpus_per_node is None:
            gpus = 0
        if gpus > node.gpus:
            self.error(
                f"`gpus_per_node: {gpus}` is more than a `{node.name}` node has ({node.gpus})",
                "gpus_per_node", why=f"set in {self.site.document.where('node_types', node.name, 'gpus')}",
            )  # fmt: skip
        if spec.gpus_per_node is None:
            self.decide(
                "gpus_per_node", gpus, f"all of a `{node.name}` node", "node_types", node.name, "gpus", site=True
            )
        else:
            self.decide("gpus_per_node", gpus, "as the run says", "gpus_per_node")
        tasks = self._tasks(node, gpus)
        cpus = self._cpus(node, gpus, tasks)
        if tasks * cpus > node.usable_cores:
            where = (
                node.name,
                "usable_cores" if ("node_types", node.name, "usable_cores") in self.site.document.origins else "cores",
            )
            key = ("sbatch", "cpus-per-task") if "cpus-per-task" in spec.sbatch else ("tasks_per_node",)
            self.error(
                f"{tasks} tasks x {cpus} cpus = {tasks * cpus} cores a node, and a `{node.name}` node has {node.usable_cores} usable ones",
                *key,
                why=f"set in {self.site.document.where('node_types', *where)}"
                + (
                    f" ({node.cores - node.usable_cores} of {node.cores} cores are reserved)"
                    if node.usable_cores < node.cores
                    else ""
                ),
                hint=f"at most `cpus-per-task: {max(node.usable_cores // tasks, 1)}` with {tasks} tasks a node",
            )
        return gpus, tasks, cpus

    def _tasks(self, node: NodeType, gpus: int) -> int:
        spec, mode = self.spec, self.recipe.tasks
        override = spec.sbatch.get("ntasks-per-node")
        if override is not None and not _positive(override):
            self.error(f"`ntasks-per-node: {override}` is not a number of tasks", "sbatch", "ntasks-per-node")
            override = None
        wanted = spec.tasks_per_node or (int(override) if override else None)
        key = ("tasks_per_node",) if spec.tasks_per_node else ("sbatch", "ntasks-per-node")
        if mode == "per_node":
            if wanted and wanted != 1:
                self.error(
                    f"recipe `{self.recipe.name}` starts one task a node, which starts the others",
                    *key,
                    hint="delete it",
                )
            self.decide("tasks_per_node", 1, f"recipe `{self.recipe.name}` has one launcher a node")
            return 1
        if mode == "per_gpu" and gpus and wanted and wanted != gpus:
            self.error(
                f"{wanted} tasks a node with {gpus} GPUs: recipe `{self.recipe.name}` needs one task per GPU", *key,
                hint=f"delete it, or set `gpus_per_node: {wanted}`",
            )  # fmt: skip
        if wanted:
            return int(self.decide("tasks_per_node", wanted, "as the run says", *key))
        if gpus:
            return int(self.decide("tasks_per_node", gpus, "one task per GPU"))
        tasks = node.tasks_per_node or 1
        return int(self.decide("tasks_per_node", tasks, f"no GPUs; `{node.name}` nodes take {tasks}"))

    def _cpus(self, node: NodeType, gpus: int, tasks: int) -> int:
        override = self.spec.sbatch.get("cpus-per-task")
        if override is not None:
            if not _positive(override):
                self.error(f"`cpus-per-task: {override}` is not a number of cpus", "sbatch", "cpus-per-task")
                return 1
            return int(self.decide("cpus_per_task", int(override), "as the run says", "sbatch", "cpus-per-task"))
        share = node.usable_cores * gpus // node.gpus if gpus and node.gpus else node.usable_cores
        cpus = max(share // tasks, 1)
        return int(self.decide("cpus_per_task", cpus, f"{share} usable cores shared by {tasks} tasks",
                               "node_types", node.name, "usable_cores", site=True))  # fmt: skip

    def exclusive(self, partition: Partition, node: NodeType, gpus: int) -> bool:
        asked = self.spec.sbatch.get("exclusive", self.site.values["slurm"]["always"].get("exclusive"))
        if asked is not None:
            return asked not in (False, "false")
        return bool(node.gpus) and gpus == node.gpus and not partition.whole_nodes

    def memory_gib(self, node: NodeType, gpus: int, cores: int, whole: bool) -> float:
        share = 1.0
        if not whole:
            share = gpus / node.gpus if gpus and node.gpus else min(cores / node.usable_cores, 1.0)
        text = self.spec.sbatch.get("mem")
        if text is not None and str(text) != "0":
            try:
                asked = parse_mem_gib(text)
            except ValueError as error:
                self.error(f"`sbatch.mem`: {error}", "sbatch", "mem")
                return node.memory_gib
            if asked > node.memory_gib:
                self.error(
                    f"`mem: {text}` is more than a `{node.name}` node gives ({node.memory_gib:g} GiB)", "sbatch", "mem",
                    why=f"set in {self.site.document.where('node_types', node.name, 'memory_gib')}",
                )  # fmt: skip
            return asked
        return node.memory_gib if whole or str(text) == "0" else max(round(node.memory_gib * share, 3), 0.01)

    def signal(self, recipe: Recipe, resolved: Resolved) -> dict[str, Any]:
        declared = recipe.values["signal"]
        forward = bool(declared["name"]) and resolved.cadence.saves_on_signal
        lead = declared["lead_s"] if forward else NOTICE_LEAD_S
        name = declared["name"] if forward else "USR1"
        override = self.spec.sbatch.get("signal")
        path: tuple[str, ...] = ()
        reason = (
            f"the step saves on SIG{name}; {lead} s before the limit"
            if forward
            else "tells the batch script, which notes the time limit; the step handles no signal"
        )
        if override is not None:
            match = re.fullmatch(r"(?:B:)?(?:SIG)?([A-Z0-9]+)(?:@(\d{1,5}))?", str(override))
            path = ("sbatch", "signal")
            if not match or match[1] not in ("USR1", "USR2", "TERM", "INT", "HUP") or int(match[2] or 60) > 65535:
                self.error(f"`signal: {override}` is not [B:]SIGNAL[@seconds] with USR1, USR2, TERM, INT or HUP", *path,
                           hint="for example B:USR1@300")  # fmt: skip
            else:
                name, lead, reason = match[1], int(match[2] or 60), "as the run says"
        if lead >= self.spec.time_s:
            self.error(
                f"the signal would come {lead} s before the end of a job of {self.spec.time_s} s", *(path or ("time",)),
                why="Slurm sends it at once then", hint="ask for more time, or set `sbatch: {signal: B:USR1@…}`",
            )  # fmt: skip
        self.decide("signal", f"B:{name}@{lead}", reason, *path)
        return {"name": name, "lead_s": lead, "forward": forward}

    def checkpoint(self) -> None:
        spec = self.spec
        if spec.checkpoint_start and not spec.checkpoint_dir:
            self.error("`checkpoint.start` without `checkpoint.dir`: there is no folder to save to", "checkpoint",
                       hint="set `checkpoint: {start: …, dir: …}`")  # fmt: skip
        if spec.checkpoint_dir:
            self.decide("checkpoint.dir", spec.checkpoint_dir, "as the run says", "checkpoint", "dir")
            if spec.checkpoint_start:
                self.decide("checkpoint.start", spec.checkpoint_start, "as the run says", "checkpoint", "start")
                if (spec.checkpoint_start + "/").startswith(spec.checkpoint_dir + "/"):
                    self.error(
                        "`checkpoint.start` lies inside `checkpoint.dir`", "checkpoint", "start",
                        why="the new run would save beside the checkpoint it starts from, and could overwrite it",
                        hint="give the run a new, empty `checkpoint.dir`",
                    )  # fmt: skip
            if spec.checkpoint_dir == spec.base_dir:
                self.error(
                    "`checkpoint.dir` is the folder of run.yaml itself",
                    "checkpoint",
                    "dir",
                    hint="name a folder of its own",
                )

    # -- the job ---------------------------------------------------------------------------------------------------

    def directives(self, partition: Partition, node: NodeType, run_dir: str, gpus: int, tasks: int, cpus: int,
                   memory_gib: float, whole: bool, signal: Mapping[str, Any]) -> tuple[Directive, ...]:  # fmt: skip
        spec, slurm = self.spec, self.site.values["slurm"]
        out: dict[str, Directive] = {}

        def add(option: str, value: Any, why: str = "") -> None:
            text = option_text(option, value)
            if text is not None:
                out[option] = Directive(option, text, why)

        add("job-name", spec.name)
        self._account(add)
        if partition.name:
            add("partition", partition.name)
        add("qos", partition.qos)
        add("nodes", spec.num_nodes)
        add("ntasks-per-node", tasks)
        add("cpus-per-task", cpus)
        if gpus:
            typed = f"{node.gpu_type}:{gpus}" if node.gpu_type and slurm["gpu_request"] == "gres" else str(gpus)
            if slurm["gpu_request"] == "gpus-per-node":
                add("gpus-per-node", typed)
            elif slurm["gpu_request"] == "gres":
                add("gres", f"gpu:{typed}")
        add(
            "mem", format_mem_gib(memory_gib), "explicit, so that nodes with leaked memory are avoided" if whole else ""
        )
        if whole and not partition.whole_nodes:
            add("exclusive", True, "whole nodes, which CPU masks and RCCL/NCCL need")
        add("time", format_time(spec.time_s))
        add("hint", slurm["hint"], "one hardware thread a core")
        add("constraint", slurm["constraint"])
        add("signal", f"B:{signal['name']}@{signal['lead_s']}", "to the batch script, which passes it on where the step saves on it"
            if signal["forward"] else "to the batch script, which notes that the time limit came")  # fmt: skip
        if spec.sbatch.get("no-requeue") is True or not slurm["requeue"]:
            add("no-requeue", True, "a failed node ends the job; the next link of the chain goes on")
        else:
            add("requeue", True, "a failed node puts the job back into the queue; it then resumes")
        add("open-mode", "append", "a requeue must not truncate the log")
        add("chdir", run_dir)
        add("output", f"{output_pattern(run_dir)}/logs/{output_pattern(spec.name)}-%j.out")
        for option, value in slurm["always"].items():
            add(option, value, "the site's rule")
            self.decide(f"sbatch.{option}", value, "the site's rule", "slurm", "always", option, site=True)
        for option, value in spec.sbatch.items():
            if option in ("signal", "no-requeue"):
                continue
            if option_text(option, value) is None:
                out.pop(option, None)
            else:
                add(option, value)
            verb = "replaces the plan's" if option in REPLACES else "as the run says"
            self.decide(f"sbatch.{option}", value, verb, "sbatch", option)
        if "mem-per-cpu" in spec.sbatch or "mem-per-gpu" in spec.sbatch:
            out.pop("mem", None)
        return tuple(out.values())

    def _account(self, add: Any) -> None:
        spec, rules = self.spec, self.site.values["account"]
        if not spec.account:
            if rules["required"]:
                self.error(
                    f"site `{self.site.name}` needs an account", why=f"set in {self.site.document.where('account')}",
                    hint=f"set `account: {rules['example'] or '…'}` in run.yaml or in your config",
                )  # fmt: skip
            return
        if rules["pattern"] and not re.fullmatch(rules["pattern"], spec.account):
            self.error(
                f"`account: {spec.account}` is not an account of `{self.site.name}`", "account",
                why=f"accounts look like {rules['example'] or rules['pattern']}, set in {self.site.document.where('account', 'pattern')}",
            )  # fmt: skip
        self.decide("account", spec.account, "as the run says", "account")
        add("account", spec.account)

    def srun(self, node: NodeType, tasks: int, cpus: int, whole: bool) -> tuple[Directive, ...]:
        rules, out = self.site.values["slurm"]["srun"], []
        if rules["kill_on_bad_exit"]:
            out.append(Directive("kill-on-bad-exit", "1", "a crashed rank ends the step instead of leaving it hanging"))
        if rules["wait_s"]:
            out.append(
                Directive("wait", str(rules["wait_s"]), "the rest is ended so many seconds after the first task left")
            )
        bind = launchers.cpu_bind(node, tasks, cpus, whole)
        if bind:
            # A mask and --cpus-per-task on the same srun contradict each other (LUMI course, "Process and thread binding").
            out.append(Directive("cpu-bind", bind[0], bind[1]))
            self.decide("srun.cpu-bind", bind[0], bind[1], "node_types", node.name, "cpu_bind", cpus, site=True)
        for option in rules["extra"]:
            name, _, value = option[2:].partition("=")
            out.append(Directive(name, value, "the site's rule"))
        return tuple(out)

    def container(self, resolved: Resolved, run_dir: str) -> tuple[str, ...]:
        spec, site = self.spec, self.site
        if not spec.container:
            if spec.container_binds:
                self.error(
                    "`container_binds` without a `container`", "container_binds", hint="set `container:` or delete it"
                )
            return ()
        if site.values["container"]["runtime"] == "none":
            self.error(
                f"site `{site.name}` runs no containers", "container",
                why=f"container.runtime is none in {site.document.where('container', 'runtime')}", hint="delete `container:`",
            )  # fmt: skip
            return ()
        if ":" in spec.container or "," in spec.container:
            self.error("a container image path cannot hold `:` or `,`", "container")
        needed = [("run directory", run_dir)]
        if spec.checkpoint_dir:
            needed.append(("checkpoint folder", spec.checkpoint_dir))
        if spec.checkpoint_start:
            needed.append(("start checkpoint", launchers.parent_folder(spec.checkpoint_start)))
        needed += [("data", launchers.parent_folder(path)) for paths in spec.data.values() for path in paths]
        needed += [(what, path) for what, path, _ in resolved.paths]
        for what, path in needed:
            if ":" in path or "," in path:
                self.error(f"the {what} `{path}` cannot be bound into a container: its path holds `:` or `,`")
        binds, decisions = launchers.bind_list(site, spec.container_binds, needed)
        self.decisions += decisions
        self.decide("container", spec.container, f"run with {site.values['container']['runtime']}", "container")
        return tuple(launchers.container_argv(site, spec.container, binds))

    def env(self, resolved: Resolved) -> tuple[EnvVar, ...]:
        out: dict[str, EnvVar] = {}
        for name, fields in self.site.values["env"].items():
            value, path = fields["value"], ("env", name, "value")
            for least, scaled in sorted(fields["from_nodes"].items(), key=lambda item: int(item[0])):
                if self.spec.num_nodes >= int(least):
                    value, path = scaled, ("env", name, "from_nodes")
            out[name] = EnvVar(name, value, fields["why"])
            self.decide(f"env.{name}", value, fields["why"], *path, site=True)
        for name, fields in self.recipe.values["env"].items():
            out[name] = EnvVar(name, fields["value"], fields["why"])
            self.decisions.append(
                Decision(f"env.{name}", fields["value"], fields["why"], self.recipe.document.where("env", name))
            )
        for variable in resolved.env:
            out[variable.name] = variable
            self.decisions.append(
                Decision(f"env.{variable.name}", variable.value, variable.why, f"recipe {self.recipe.name}")
            )
        for name, value in self.spec.env.items():
            why = "from run.yaml" + (
                f", instead of {out[name].value}" if name in out and out[name].value != value else ""
            )
            out[name] = EnvVar(name, value, why)
            self.decide(f"env.{name}", value, why, "env", name)
        for name in self.site.values["node_dirs"]:
            if name in self.spec.env:
                self.error(f"`env.{name}` is a folder the site makes on every node", "env", name, level="warning",
                           why=f"set in {self.site.document.where('node_dirs', name)}; the site's wins",
                           hint="delete it")  # fmt: skip
        return tuple(out.values())

    # -- limits and cost -------------------------------------------------------------------------------------------

    def limits(self, partition: Partition) -> None:
        spec, site = self.spec, self.site
        fitting = [p.name for p in self._fitting()]
        others = f"partitions that fit: {', '.join(fitting)}" if fitting else ""

        def over(what: str, limit: str, key: str, field: str, hint: str) -> None:
            self.error(
                f"{what} than partition `{partition.name}` allows ({limit})", key,
                why=f"limit set in {site.document.where('partitions', partition.name, field)}",
                hint="; ".join(filter(None, [hint, others])),
            )  # fmt: skip

        if partition.max_time_s and spec.time_s > partition.max_time_s:
            links = -(-spec.time_s // partition.max_time_s)
            over(f"`time: {spec.document.get('time', default=format_time(spec.time_s))}` is longer", format_time(partition.max_time_s), "time", "max_time",
                 f"set `time: {format_time(partition.max_time_s)}` and `chain: {{jobs: {links}}}`")  # fmt: skip
        if partition.max_nodes and spec.num_nodes > partition.max_nodes:
            over(f"`nodes: {spec.num_nodes}` is more", str(partition.max_nodes), "nodes", "max_nodes", "")
        if partition.min_nodes and spec.num_nodes < partition.min_nodes:
            over(f"`nodes: {spec.num_nodes}` is less", f"at least {partition.min_nodes}", "nodes", "min_nodes", "")
        if partition.max_submitted and spec.num_links > partition.max_submitted:
            over(f"a chain of {spec.num_links} jobs is more", f"{partition.max_submitted} submitted jobs a user", "chain",
                 "max_submitted", f"queue at most {partition.max_submitted}, then `hpctrain chain --extend`")  # fmt: skip
        if partition.debug:
            self.error(f"partition `{partition.name}` is for short tests", "partition", level="note",
                       why=f"{self._limit_line(partition)}")  # fmt: skip

    def cost(
        self, partition: Partition, node: NodeType, gpus: int, cores: int, memory_gib: float, whole: bool
    ) -> estimate.Cost:
        if whole:
            cores, memory_gib, gpus = node.usable_cores, node.memory_gib, node.gpus
        result = estimate.cost(partition, self.spec.num_nodes, cores, memory_gib, gpus, self.spec.time_s)
        if result.billed is not None:
            self.decide("cost.job", f"{result.billed:,.1f} {result.unit}s", result.formula,
                        "partitions", partition.name, "billing", site=True)  # fmt: skip
            if self.spec.num_links > 1:
                total = result.billed * self.spec.num_links
                self.decide(
                    "cost.chain",
                    f"{total:,.1f} {result.unit}s",
                    f"at most, for {self.spec.num_links} jobs",
                    "chain",
                    "jobs",
                )
        return result

    def cadence(self, resolved: Resolved, signal: Mapping[str, Any]) -> None:
        spec, cadence = self.spec, resolved.cadence
        if not spec.step_time_s or not cadence.iterations:
            return
        saves = cadence.saves_on_signal and signal["forward"]
        work_s = cadence.iterations * spec.step_time_s
        if (
            cadence.save_every
            and not saves
            and cadence.save_every * spec.step_time_s > spec.time_s
            and work_s > spec.time_s
        ):
            self.error(
                f"a checkpoint every {cadence.save_every} iterations of {spec.step_time_s:g} s never comes within "
                f"`time: {format_time(spec.time_s)}`", "time",
                why=f"the first would be saved after {format_time(int(cadence.save_every * spec.step_time_s))}, so no link makes progress",
                hint=f"save every {max(int(spec.time_s / spec.step_time_s / 4), 1)} iterations or so",
            )  # fmt: skip
            return
        links = estimate.links_needed(cadence.iterations, spec.step_time_s, cadence.save_every, spec.time_s,
                                      signal["lead_s"] if saves else 0, saves)  # fmt: skip
        if links:
            self.decide(
                "chain.links_needed",
                links,
                f"{cadence.iterations} iterations x {spec.step_time_s:g} s",
                "estimate",
                "step_time_s",
            )
            if links > spec.num_links:
                self.error(f"{links} links are needed, and `chain.jobs` queues {spec.num_links}", "chain", level="note",
                           hint=f"`hpctrain chain --jobs {links}`")  # fmt: skip
        if cadence.save_every:
            lost = cadence.save_every * spec.step_time_s
            self.decide(
                "chain.lost_work",
                format_time(max(int(lost), 1)),
                "most work lost when a node fails: one checkpoint interval",
            )
            mttf = estimate.mean_time_to_failure_s(spec.num_nodes)
            best = estimate.young_daly_s(spec.save_time_s or 120, mttf)
            self.decide("checkpoint.best_interval", format_time(int(best)),
                        f"Young-Daly: sqrt(2 x {spec.save_time_s or 120:g} s save x {mttf / 3600:.0f} h between failures)")  # fmt: skip


def _config_origins(document: Document) -> tuple[dict[Any, Any], dict[Any, Any]]:
    def inside(origins: Mapping[Any, Any]) -> dict[Any, Any]:
        return {path[1:]: origin for path, origin in origins.items() if path[:1] == ("config",)}

    return inside(document.origins), inside(document.key_origins)


def _positive(value: Any) -> bool:
    return not isinstance(value, bool) and str(value).isdigit() and int(value) > 0
