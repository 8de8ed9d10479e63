"""An sbatch script -> a run.yaml that starts the same processes, and what was thought of each line.

Order is kept: modules, then literal exports, then everything else as `setup:`, which the job runs
on its first node as the script did. What is not one plain step stays whole in `setup:`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from hpctrain.base.errors import UsageError
from hpctrain.config.run import (
    NOT_SECRET_ENV,
    RESERVED_ENV,
    SECRET_ENV,
    SECRET_VALUE,
    looks_like_script,
)
from hpctrain.imports.bash import Statement, constants, statements, texts
from hpctrain.imports.directives import Directives, directives, keys
from hpctrain.imports.launch import Step, main_statement, step_of

_LITERAL = re.compile(r"export\s+([A-Za-z_]\w*)=(\"[^\"$`\\]*\"|'[^']*'|[^\s\"'$`\\;*?\[~]*)\s*\Z")
_MODULE_LOAD = re.compile(r"(?:module|ml)\s+(?:load|add)\s+([^;&|$`\"'<>()]+)\Z")
_OPENS_UP = re.compile(r"(?:^|[\s;])(?:source|\.|eval|conda|mamba|micromamba|module|ml|spack|uv)\s")
_SECRET = "a secret; put it into a file of mode 0600 and name that under `secrets:`"
_DIE = '# A failed step is the job\'s failure.\ncode=$?; [ "$code" -eq 0 ] || exit "$code"'


@dataclass
class Imported:
    """The run, and what to tell of the script: lines left out with reasons, faults, remarks."""

    run: dict[str, Any] = field(default_factory=dict)
    left: list[tuple[int, str]] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def import_script(text: str, name: str, site: str) -> Imported:
    """Read a script. `name`: of its file, for the run's. Raises UsageError where it is none."""
    if not looks_like_script(text):
        raise UsageError(f"`{name}` is no job script: it has no #! and no #SBATCH line")
    found, asked = statements(text), directives(text)
    values = constants(found)
    out = Imported()
    known, left = keys(asked)
    out.faults += asked.faults
    out.left += left
    place = main_statement(found)
    command = found[place].single if place is not None else None
    if command and SECRET_VALUE.search(" ".join(command.words)):
        command = None
    step = step_of(command, values, texts(found)) if command else None
    if step is not None and not _fits(step, known):
        step = None
    if step is None or place is None:
        body, step, place = found, None, None
    else:
        body = found[:place]
        _after(found[place + 1 :], out)
    before = _before(body, out)
    _faults(text, asked, found, out)
    out.run = _run(asked, known, step, before, name, site)
    if step is None:
        out.remarks.append(
            "the script starts its processes in a way that is not one step: they start in `setup:`,"
            " as the script did it, and hpctrain knows nothing of them"
        )
    else:
        out.left += [(found[place].line if place is not None else 0, why) for why in step.left]
        out.faults += [(found[place].line if place is not None else 0, why) for why in step.faults]
    _remarks(text, out)
    if "time" not in asked.options:
        out.remarks.append("the script asks for no time; `time: 1:00:00` is a guess")
    return out


def _fits(step: Step, known: dict[str, Any]) -> bool:
    """Whether the step has all of the job's nodes, and as many tasks on each of them."""
    nodes, ntasks = step.options.pop(":nodes", None), step.options.pop(":ntasks", None)
    if nodes is not None and str(nodes) != str(known["nodes"]):
        return False
    if ntasks is not None:
        if ntasks % known["nodes"]:
            return False
        step.tasks = ntasks // known["nodes"]
    alone = step.only_batch_host and known["nodes"] > 1
    return not alone and (not step.nnodes.isdigit() or int(step.nnodes) == known["nodes"])


def _before(body: list[Statement], out: Imported) -> dict[str, Any]:
    """modules, env and setup of the statements before the step."""
    modules: list[str] = []
    env: dict[str, str] = {}
    setup: list[str] = []
    loads = [one for one in body if re.match(r"(?:module|ml)\s", one.text)]
    plain = all(_MODULE_LOAD.match(one.text) for one in loads)
    opened = False
    for statement in body:
        text = statement.text
        why = _leave_out(statement)
        exported = _LITERAL.match(text)
        module = _MODULE_LOAD.match(text)
        if why:
            out.left.append((statement.line, f"`{_shown(statement)}`: {why}"))
        elif module and plain and not setup:
            modules += module[1].split()
        elif exported and not opened and _is_free(exported, setup):
            env[exported[1]] = exported[2].strip("\"'")
        else:
            setup.append(text + (" &" if statement.background else ""))
            opened = opened or bool(_OPENS_UP.search(text)) or statement.kind == "command"
    return {"modules": modules, "env": env, "setup": setup}


def _is_free(exported: re.Match[str], setup: list[str]) -> bool:
    """Whether a literal may be exported before the lines so far: none speaks of it, and run.yaml
    takes it."""
    name = exported[1]
    reserved = RESERVED_ENV.fullmatch(name) or not exported[2].strip("\"'")
    secret = SECRET_ENV.fullmatch(name) and not NOT_SECRET_ENV.fullmatch(name)
    spoken = any(re.search(rf"\b{name}\b", line) for line in setup)
    return not (reserved or secret or spoken or exported[2].startswith("~"))


def _shown(statement: Statement) -> str:
    """The beginning of a statement, and of one that may hold a secret less."""
    line = (statement.text.strip().splitlines() or [""])[0]
    if _leave_out(statement) != _SECRET:
        return line[:60]
    return re.split(r"(?<==)|\s--?\w*(?:token|key)|\slogin\s", line)[0] + "…"


def _leave_out(statement: Statement) -> str:
    """Why a statement has no place in a run, empty where it has."""
    text = statement.text
    exported = re.search(r"(?:^|[\s;])(?:export\s+)?([A-Za-z_]\w*)=(\S+)", text)
    if exported and statement.kind in ("declaration_command", "variable_assignment"):
        name, value = exported[1], exported[2].strip("\"'")
        secret = SECRET_ENV.fullmatch(name) and not NOT_SECRET_ENV.fullmatch(name)
        if SECRET_VALUE.search(value) or (
            secret and value and not value.startswith(("$", "/", "~"))
        ):
            return "a secret; put it into a file of mode 0600 and name that under `secrets:`"
    if re.search(r"(?:^|[\s;&|(])sbatch\s", text):
        return "`hpctrain chain` queues the next jobs"
    if re.match(r"set\s+-[a-z]*x[a-z]*\s*\Z", text) or re.match(r"set\s+-o\s+xtrace", text):
        return "it would write every value into the log"
    if re.match(r"exit\b", text):
        return "the step's own code ends the job"
    if text == "wait":
        return "the job waits for its step"
    if re.match(r"trap\s", text):
        return "the job passes signals on itself"
    return ""


def _after(rest: list[Statement], out: Imported) -> None:
    for statement in rest:
        why = _leave_out(statement) or (
            "it runs after the step: `hpctrain template override command --block after_step` has a"
            " place for it"
        )
        out.left.append((statement.line, f"`{_shown(statement)}`: {why}"))


def _faults(text: str, asked: Directives, found: list[Statement], out: Imported) -> None:
    """Mistakes that the script has as it is."""
    if "requeue" in asked.options and not re.search(
        r"resume|latest|--load\b|checkpoint", text, re.I
    ):
        out.faults.append(
            (asked.lines["requeue"], "--requeue, and nothing resumes: a requeued job starts anew")
        )
    sruns = [
        (statement, command)
        for statement in found
        for command in statement.commands
        if command.words and os.path.basename(command.words[0]) == "srun"
    ]
    cpus = "cpus-per-task" in asked.options and "SRUN_CPUS_PER_TASK" not in text
    if cpus and sruns and not any(re.search(r"(--cpus-per-task|-c\b)", s.text) for s, _ in sruns):
        out.faults.append(
            (
                sruns[0][0].line,
                "srun does not take --cpus-per-task from sbatch since Slurm 22.05:"
                " its tasks have one core; hpctrain hands it on",
            )
        )
    for statement in found:
        ranks = re.search(
            r"export\s+(NODE_RANK|RANK|MACHINE_RANK)=\"?\$\{?SLURM_(PROCID|NODEID)", statement.text
        )
        if ranks:
            out.faults.append(
                (
                    statement.line,
                    f"{ranks[1]} is read in the batch script, where it is 0: every node gets 0",
                )
            )
        port = re.search(r"export\s+MASTER_PORT=\"?(\d{4,5})", statement.text)
        if port:
            out.faults.append(
                (
                    statement.line,
                    f"port {port[1]} is the same for every job and start; the job takes one of its own",
                )
            )


def _remarks(text: str, out: Imported) -> None:
    words = re.search(
        r"--(save|output[-_]dir|save[-_]dir|checkpoint[-_]dir|ckpt[-_]dir)[ =]([^\s\\\"']+)", text
    )
    if words:
        layout = {"save": "megatron", "output_dir": "hf-trainer"}.get(words[1], "…")
        out.remarks.append(
            f"`--{words[1]} {words[2]}` looks like the checkpoint folder: with `checkpoint: {{dir: …}}`"
            f" and `recipe_options: {{layout: {layout}}}` a chain resumes"
        )
    image = re.search(r"(?:singularity|apptainer)\s+exec", text)
    if image:
        out.remarks.append(
            "the container is part of the program; `container:` lets the site run it"
        )


def _run(
    asked: Directives,
    known: dict[str, Any],
    step: Step | None,
    before: dict[str, Any],
    name: str,
    site: str,
) -> dict[str, Any]:
    title = re.sub(r"[^A-Za-z0-9_.-]+", "-", asked.options.get("job-name", name)).strip("-.")
    run: dict[str, Any] = {"name": title or "imported", "site": site, "recipe": "command"}
    known.setdefault("time", "1:00:00")
    tasks = known.pop("tasks_per_node")
    run.update({key: value for key, value in known.items() if key != "sbatch"})
    if step is None or step.launch == "srun":
        run["tasks_per_node"] = step.tasks if step and step.tasks else tasks
    for key in ("modules", "env"):
        if before[key]:
            run[key] = before[key]
    setup = [*before["setup"], *(step.setup if step else [_DIE])]
    if setup:
        run["setup"] = "\n".join(setup) + "\n"
    if step and step.options:
        run["srun"] = dict(step.options)
    if known["sbatch"]:
        run["sbatch"] = known["sbatch"]
    run["recipe_options"] = _options(step)
    if "chdir" in asked.options:
        run["recipe_options"]["workdir"] = asked.options["chdir"]
    return run


def _options(step: Step | None) -> dict[str, Any]:
    if step is None:
        return {"program": "true"}
    options = {"program": step.program, **step.recipe_options}
    if step.launch != "srun":
        options["launch"] = step.launch
    if re.search(r"[$`*?~]", " ".join([step.program, *map(str, step.options.values())])):
        options["expand"] = True
    return options
