"""What the job script says: #SBATCH options, signal, srun options, container and environment.
Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.base.shell import one_expanding_word, output_pattern
from hpctrain.base.units import format_mem_gib, format_time
from hpctrain.config import container
from hpctrain.config.decision import Decision
from hpctrain.config.recipe import Recipe
from hpctrain.config.sbatch import REPLACES, option_text
from hpctrain.config.site import NodeType, Partition
from hpctrain.plan import launcher
from hpctrain.plan.notes import Notes
from hpctrain.recipes.contract import EnvVar, Resolved

# The batch shell needs this long to write down how a link ended; Slurm may send a signal up to 60 s
# early.
NOTICE_LEAD_S = 60


@dataclass(frozen=True)
class Directive:
    """One #SBATCH or srun option; an empty value is a switch."""

    option: str
    value: str
    why: str = ""


def decide_signal(notes: Notes, recipe: Recipe, resolved: Resolved) -> dict[str, Any]:
    declared = recipe.values["signal"]
    forward = bool(declared["name"]) and resolved.cadence.saves_on_signal
    lead = declared["lead_s"] if forward else NOTICE_LEAD_S
    name = declared["name"] if forward else "USR1"
    override = notes.spec.sbatch.get("signal")
    path: tuple[str, ...] = ()
    reason = (
        f"the step saves on SIG{name}; this long before the limit"
        if forward
        else "tells the batch script, which notes the time limit; the step handles no signal"
    )
    if override is not None:
        match = re.fullmatch(r"(?:B:)?(?:SIG)?([A-Z0-9]+)(?:@(\d{1,5}))?", str(override))
        path = ("sbatch", "signal")
        if (
            not match
            or match[1] not in ("USR1", "USR2", "TERM", "INT", "HUP")
            or int(match[2] or 60) > 65535
        ):
            notes.error(
                f"`signal: {override}` is not [B:]SIGNAL[@seconds] with USR1, USR2, TERM, INT"
                " or HUP",
                *path,
                hint="for example B:USR1@300",
            )
        else:
            name, lead, reason = match[1], int(match[2] or 60), "as the run says"
    if override is None and lead > notes.spec.time_s // 4:
        lead = max(notes.spec.time_s // 4, 1)
        reason += "; a quarter of this short job"
    if lead >= notes.spec.time_s:
        notes.error(
            f"the signal would come {lead} s before the end of a job of {notes.spec.time_s} s",
            *(path or ("time",)),
            why="Slurm sends it at once then",
            hint="ask for more time, or for less lead",
        )
    passed_by = _passed_by(notes, name, resolved.argv) if forward else None
    if passed_by:
        reason += f"; `{passed_by}` is started with it ignored, so that only the program takes it"
    notes.decide("signal", f"B:{name}@{lead}", reason, *path)
    return {"name": name, "lead_s": lead, "forward": forward, "passed_by": passed_by}


def _passed_by(notes: Notes, name: str, argv: Sequence[str]) -> str | None:
    """The launcher that must ignore the signal which is meant for the program; notes what cannot be
    helped from here."""
    found, shell = launcher.launcher(argv), launcher.shell_between(argv)
    if found and name in launcher.ENDING:
        notes.error(
            f"at SIG{name} `{found}` ends what it started, within seconds, saved or not",
            "sbatch",
            "signal",
            level="warning",
            hint="delete it: SIGUSR1 passes the launcher by and reaches the program",
        )
        return None
    if found and not launcher.traps(argv):
        return found
    if found:
        notes.error(
            f"SIG{name} ends `{found}` too, which stands between srun and the program",
            "recipe_options",
            level="warning",
            hint="take the `trap` out of the command: the launcher is then started with it ignored",
        )
    elif shell and not launcher.traps(argv):
        notes.error(
            f"SIG{name} also reaches the shell that runs `{shell.splitlines()[0][:60]}`, and"
            " ends it",
            "recipe_options",
            level="note" if shell in argv and len(shell.split()) == 1 else "warning",
            why="srun then ends the step, whatever the program under the shell is still saving",
            hint=f"start the program with `exec`, or say `trap : {name}` first",
        )
    return None


def decide_directives(
    notes: Notes,
    partition: Partition,
    node: NodeType,
    run_dir: str,
    gpus: int,
    tasks: int,
    cpus: int,
    memory_gib: float,
    whole: bool,
    signal: Mapping[str, Any],
) -> tuple[Directive, ...]:
    spec, slurm = notes.spec, notes.site.values["slurm"]
    out: dict[str, Directive] = {}

    def add(option: str, value: Any, why: str = "") -> None:
        text = option_text(option, value)
        if text is not None:
            out[option] = Directive(option, text, why)

    add("job-name", spec.name)
    _account(notes, add)
    if partition.name:
        add("partition", partition.slurm_name)
    add("qos", partition.qos)
    add("nodes", spec.num_nodes)
    add("ntasks-per-node", tasks)
    add("cpus-per-task", cpus)
    if gpus:
        typed = (
            f"{node.gpu_type}:{gpus}"
            if node.gpu_type and slurm["gpu_request"] == "gres"
            else str(gpus)
        )
        if slurm["gpu_request"] == "gpus-per-node":
            add("gpus-per-node", typed)
        elif slurm["gpu_request"] == "gres":
            add("gres", f"gpu:{typed}")
    if slurm["mem"]:
        why = "explicit, so that nodes with leaked memory are avoided" if whole else ""
        add("mem", format_mem_gib(memory_gib), why)
    if whole and not partition.whole_nodes:
        add("exclusive", True, "whole nodes, which CPU masks and RCCL/NCCL need")
    add("time", format_time(spec.time_s))
    add("hint", slurm["hint"], "one hardware thread a core")
    add("constraint", partition.constraint or slurm["constraint"])
    add(
        "signal",
        f"B:{signal['name']}@{signal['lead_s']}",
        (
            "to the batch script, which passes it on where the step saves on it"
            if signal["forward"]
            else "to the batch script, which notes that the time limit came"
        ),
    )
    if spec.sbatch.get("no-requeue") is True or not slurm["requeue"]:
        add("no-requeue", True, "a failed node ends the job; the next link of the chain goes on")
    else:
        add("requeue", True, "a failed node puts the job back into the queue; it then resumes")
    add("open-mode", "append", "a requeue must not truncate the log")
    add("chdir", run_dir)
    add("output", f"{output_pattern(run_dir)}/logs/{output_pattern(spec.name)}-%j.out")
    for option, value in slurm["always"].items():
        add(option, value, "the site's rule")
        notes.decide(
            f"sbatch.{option}", value, "the site's rule", "slurm", "always", option, site=True
        )
    for option, value in spec.sbatch.items():
        if option in ("signal", "no-requeue"):
            continue
        if option_text(option, value) is None:
            out.pop(option, None)
        elif option == "gres" and "gres" in out and "gpu" not in str(value):
            add(option, f"{out[option].value},{value}", "the GPUs, and what the run asks for")
        else:
            add(option, value)
        verb = "replaces the plan's" if option in REPLACES else "as the run says"
        notes.decide(f"sbatch.{option}", value, verb, "sbatch", option)
    if "mem-per-cpu" in spec.sbatch or "mem-per-gpu" in spec.sbatch:
        out.pop("mem", None)
    return tuple(out.values())


def decide_srun(
    notes: Notes, node: NodeType, tasks: int, cpus: int, whole: bool
) -> tuple[Directive, ...]:
    rules, out = notes.site.values["slurm"]["srun"], []
    if rules["kill_on_bad_exit"]:
        out.append(
            Directive(
                "kill-on-bad-exit",
                "1",
                "a crashed rank ends the step instead of leaving it hanging",
            )
        )
    if rules["wait_s"]:
        out.append(
            Directive(
                "wait",
                str(rules["wait_s"]),
                "the rest is ended so many seconds after the first task left",
            )
        )
    bind = container.cpu_bind(node, tasks, cpus, whole)
    if bind:
        # A mask and --cpus-per-task on the same srun contradict each other (LUMI course, "Process
        # and thread binding").
        out.append(Directive("cpu-bind", bind[0], bind[1]))
        notes.decide(
            "srun.cpu-bind", bind[0], bind[1], "node_types", node.name, "cpu_bind", cpus, site=True
        )
    for option in rules["extra"]:
        name, _, value = option[2:].partition("=")
        out.append(Directive(name, value, "the site's rule"))
    return tuple(_with_own(notes, out))


def _with_own(notes: Notes, options: Sequence[Directive]) -> list[Directive]:
    """The step's options with those of `srun:`, which replace others of their name; false takes one
    out."""
    own = notes.spec.srun
    out = [option for option in options if option.option not in own]
    for name, value in own.items():
        text = option_text(name, value)
        notes.decide(f"srun.{name}", value, "as the run says", "srun", name)
        if text is not None:
            if notes.spec.recipe_options.get("expand") is True and "$" in text:
                text = one_expanding_word(text)
            out.append(Directive(name, text, "as the run says"))
    return out


def decide_preflight(
    notes: Notes,
    directives: tuple[Directive, ...],
    options: Mapping[str, Any],
    gpus: int,
    tasks: int,
) -> dict[str, Any] | None:
    """The look at the nodes that the job begins with, as plan.json and the job script carry it;
    None without one."""
    asked = notes.spec.preflight
    if asked is None:
        return None
    fixed = any(directive.option == "no-requeue" for directive in directives)
    policy, why = asked["policy"], "as the run says"
    if policy is None:
        policy = "warn" if fixed else "exclude"
        why = (
            "the job may not be requeued"
            if fixed
            else "bad nodes are left out and the job goes back into the queue"
        )
    elif policy == "exclude" and fixed:
        notes.error(
            "`preflight: {policy: exclude}` puts the job back into the queue, and `no-requeue`"
            " forbids that",
            "preflight",
            "policy",
            hint="choose warn or stop, or let the job be requeued",
        )
    if asked["limit_s"] >= notes.spec.time_s:
        notes.error(
            f"a preflight of up to {asked['limit_s']} s does not fit into a job of"
            f" {notes.spec.time_s} s",
            "preflight",
            "limit_s",
        )
    notes.decide("preflight.policy", policy, why, "preflight")
    python = str(asked["python"] or options.get("python") or "python3")
    return {
        "policy": policy,
        "requeues": asked["requeues"],
        "slow_is_bad": asked["slow_is_bad"],
        "limit_s": asked["limit_s"],
        "mib": asked["mib"],
        "python": python,
        "gpus_per_task": max(gpus // tasks, 1) if gpus else None,
        "tasks_per_node": tasks,
    }


def decide_container(notes: Notes, resolved: Resolved, run_dir: str) -> tuple[str, ...]:
    spec, site = notes.spec, notes.site
    if not spec.container:
        if spec.container_binds:
            notes.error(
                "`container_binds` without a `container`",
                "container_binds",
                hint="set `container:` or delete it",
            )
        return ()
    if site.values["container"]["runtime"] == "none":
        notes.error(
            f"site `{site.name}` runs no containers",
            "container",
            why=f"container.runtime is none in {site.document.where('container', 'runtime')}",
            hint="delete `container:`",
        )
        return ()
    if ":" in spec.container or "," in spec.container:
        notes.error("a container image path cannot hold `:` or `,`", "container")
    needed = [("run directory", run_dir)]
    if spec.checkpoint_dir:
        needed.append(("checkpoint folder", spec.checkpoint_dir))
    if spec.checkpoint_start:
        needed.append(("start checkpoint", container.parent_folder(spec.checkpoint_start)))
    elif spec.has_start and spec.handed and spec.handed.checkpoint_dir:
        needed.append(("checkpoints of the stage before", spec.handed.checkpoint_dir))
    needed += [
        ("data", container.parent_folder(path)) for paths in spec.data.values() for path in paths
    ]
    needed += [(what, path) for what, path, _ in resolved.paths]
    needed += resolved.binds
    for what, path in needed:
        if ":" in path or "," in path:
            notes.error(
                f"the {what} `{path}` cannot be bound into a container: its path holds `:` or `,`"
            )
    binds, decisions = container.bind_list(site, spec.container_binds, needed)
    notes.decisions += decisions
    notes.decide(
        "container", spec.container, f"run with {site.values['container']['runtime']}", "container"
    )
    return tuple(container.container_argv(site, spec.container, binds))


def decide_env(notes: Notes, resolved: Resolved) -> tuple[EnvVar, ...]:
    """The job's variables: the site's, the recipe's, then the run's, each winning over those before
    it."""
    out: dict[str, EnvVar] = {}
    found: dict[str, Decision] = {}

    def take(name: str, value: str, why: str, origin: str) -> None:
        out[name] = EnvVar(name, value, why)
        found[name] = Decision(f"env.{name}", value, why, origin)

    for name, fields in notes.site.values["env"].items():
        value, path = fields["value"], ("env", name, "value")
        for least, scaled in sorted(fields["from_nodes"].items(), key=lambda item: int(item[0])):
            if notes.spec.num_nodes >= int(least):
                value, path = scaled, ("env", name, "from_nodes")
        take(name, value, fields["why"], notes.site.document.where(*path))
    for name, fields in notes.recipe.values["env"].items():
        take(name, fields["value"], fields["why"], notes.recipe.document.where("env", name))
    for variable in resolved.env:
        take(variable.name, variable.value, variable.why, f"recipe {notes.recipe.name}")
    for name, value in notes.spec.env.items():
        why = "from run.yaml"
        if name in out:
            why = (
                out[name].why
                if out[name].value == value
                else f"from run.yaml, instead of {out[name].value}"
            )
        take(name, value, why, notes.spec.where("env", name))
    notes.decisions += found.values()
    for name in notes.site.values["node_dirs"]:
        if name in notes.spec.env:
            notes.error(
                f"`env.{name}` is a folder the site makes on every node",
                "env",
                name,
                level="warning",
                why=f"set in {notes.site.document.where('node_dirs', name)}; the site's wins",
                hint="delete it",
            )
    return tuple(out.values())


def _account(notes: Notes, add: Any) -> None:
    spec, rules = notes.spec, notes.site.values["account"]
    if not spec.account:
        if rules["required"]:
            notes.error(
                f"site `{notes.site.name}` needs an account",
                why=f"set in {notes.site.document.where('account')}",
                hint=f"set `account: {rules['example'] or '…'}` in run.yaml or in your config",
            )
        return
    if rules["pattern"] and not re.fullmatch(rules["pattern"], spec.account):
        notes.error(
            f"`account: {spec.account}` is not an account of `{notes.site.name}`",
            "account",
            why=(
                f"accounts look like {rules['example'] or rules['pattern']}, set in"
                f" {notes.site.document.where('account', 'pattern')}"
            ),
        )
    notes.decide("account", spec.account, "as the run says", "account")
    add("account", spec.account)
