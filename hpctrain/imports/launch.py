"""The line of a script that starts its processes: which it is, and what it says. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hpctrain.base.shell import expanding_words
from hpctrain.config.sbatch import SRUN_OWNED
from hpctrain.imports.bash import Command, Statement, expanded

# Options of srun with one letter, and those that take no value.
_SHORT = {
    **{"l": "label", "u": "unbuffered", "n": "ntasks", "N": "nodes", "c": "cpus-per-task"},
    **{"K": "kill-on-bad-exit", "o": "output", "e": "error", "D": "chdir", "w": "nodelist"},
    **{"G": "gpus", "p": "partition", "A": "account", "t": "time", "J": "job-name", "W": "wait"},
    **{
        "x": "exclude",
        "m": "distribution",
        "v": "verbose",
        "E": "preserve-env",
        "X": "disable-status",
    },
    **{"C": "constraint", "i": "input", "Q": "quiet", "r": "relative", "q": "qos"},
}
_SWITCHES = frozenset(
    "label unbuffered kill-on-bad-exit verbose preserve-env disable-status exclusive overlap exact"
    " pty quiet container-remap-root no-container-remap-root container-mount-home"
    " no-container-mount-home container-writable no-kill overcommit standalone use_env use-env"
    " no_python no-python".split()
)
# The plan decides these: nodes and tasks by the job, cores by `--cpus-per-task`.
_PLANNED = frozenset(SRUN_OWNED) | frozenset(
    "kill-on-bad-exit gpus gpus-per-node gres gpus-per-task job-name mem exclusive verbose overlap"
    " cpus-per-gpu ntasks-per-gpu quiet qos constraint".split()
)
_TORCHRUN = frozenset(
    "nnodes nproc_per_node node_rank master_addr master_port rdzv_id rdzv_backend rdzv_endpoint"
    " rdzv_conf max_restarts".split()
)
_TORCHRUN_FLAGS = frozenset({"standalone", "use_env"})
# Not worth a remark: what they say is what the plan says.
_SAID_ANYWAY = frozenset("export kill-on-bad-exit cpus-per-task jobid nodes".split())
_STARTS = re.compile(
    r"(?:^|/)(srun|mpirun|mpiexec|torchrun|accelerate|deepspeed|ray|python[\d.]*|singularity|apptainer"
    r"|llamafactory-cli|axolotl|swift|composer|bash|sh|uv|poetry|pixi|conda|podman|docker|time|nsys|numactl)$"
)
_QUIET_PROGRAMS = re.compile(
    r"(^|\s)(nvidia-smi|rocm-smi|hostname|env|pip|nproc|date|echo|mkdir|ln|ls|cat|rm|uname|git|python3? -c|python3? --version|python3? -V)\b"
)


@dataclass
class Step:
    """One step: `program` is shell text; `tasks` a node, None as the job says; `options` of srun;
    `left` what is not taken over; `setup` lines that belong before it."""

    program: str
    tasks: int | None = None
    only_batch_host: bool = False
    nnodes: str = ""
    launch: str = "srun"
    options: dict[str, Any] = field(default_factory=dict)
    recipe_options: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def is_step(command: Command) -> bool:
    """Whether a command starts processes of a training, as far as its name tells."""
    if not command.words:
        return False
    text = " ".join(command.words)
    first = command.words[0]
    if _QUIET_PROGRAMS.search(text) and not re.search(r"torchrun|accelerate|\.py\b|-m ", text):
        return False
    if re.fullmatch(r"\"?\$\{?[A-Za-z_]\w*(\[@\])?\}?\"?", first):
        return bool(re.search(r"CMD|COMMAND|LAUNCH|RUN|PYTHON|EXEC|SRUN|TORCH", first, re.I))
    return bool(_STARTS.search(first)) or first.endswith((".sh", ".py"))


def step_of(command: Command, values: dict[str, str], lists: dict[str, list[str]]) -> Step | None:
    """The step that a command is, None where it cannot be said in run.yaml."""
    words = list(command.words)
    variable = re.fullmatch(r"\"?\$\{?([A-Za-z_]\w*)(?:\[[@*]\])?\}?\"?", words[0])
    if variable:  # which may hold an srun, or anything else
        words = [*lists.get(variable[1], ["$"]), *words[1:]]
    if words[0].startswith("$"):
        return None
    first = os.path.basename(words[0])
    step = Step("")
    step.setup = [f"export {word}" for word in command.assigned]
    if command.piped:
        step.left.append(
            f"`{command.piped[:60]}`: the run directory's logs/ holds what the step says"
        )
    if first == "srun":
        rest = _srun(words[1:], values, lists, step)
        if rest is None:
            return None
        words = rest
    else:
        step.tasks, step.only_batch_host = 1, True
    if not words:
        return None
    try:
        expanding_words(" ".join(words))
    except ValueError:
        return None
    step.program = " ".join(words)
    _torchrun(words, values, step)
    return step


def _unpacked(words: list[str], lists: dict[str, list[str]]) -> list[str]:
    """The words with a variable at their head replaced by the options that it holds."""
    name = re.fullmatch(r"\"?\$\{?([A-Za-z_]\w*)(?:\[[@*]\])?\}?\"?", words[0]) if words else None
    held = lists.get(name[1], []) if name else []
    return _unpacked([*held, *words[1:]], lists) if held and held[0].startswith("-") else words


def _may_be_options(words: list[str]) -> bool:
    """Whether the head of what srun runs is a variable that may hold options of srun's."""
    if not words or not re.match(r"\"?\$\{?\w", words[0]):
        return False
    program = re.search(r"PY|LAUNCH|CMD|COMMAND|TORCH|EXEC|PROG", words[0], re.I)
    dashed = len(words) > 1 and words[1].startswith("-")
    return bool(re.search(r"ARG|OPT|SRUN|FLAG", words[0], re.I)) or (dashed and not program)


def _srun(
    words: list[str], values: dict[str, str], lists: dict[str, list[str]], step: Step
) -> list[str] | None:
    """What srun runs, its options told to the step; None where an option is known only in the
    job."""
    while True:
        words = _unpacked(words, lists)
        if not words or not words[0].startswith("-"):
            return None if _may_be_options(words) else words
        word = words.pop(0)
        name, value = _option(word, words)
        if not name or "$" in name or not _taken(name, value, values, step):
            return None


def _taken(name: str, value: str, values: dict[str, str], step: Step) -> bool:
    """Tell the step an option of srun's; False for one that run.yaml cannot say."""
    plain = expanded(value, values) if value else ""
    if name in ("ntasks-per-node", "ntasks"):
        return _tasks_taken(name, value, plain, step)
    if name == "nodes" and plain:
        step.options[":nodes"] = plain
    elif name == "export" and value not in ("ALL", ""):
        step.setup += [f"export {part}" for part in value[4:].split(",")]
        return value.startswith("ALL,")
    elif name in _PLANNED:
        if name not in _SAID_ANYWAY:
            step.left.append(f"srun --{name}: {SRUN_OWNED.get(name, 'the plan decides it')}")
        return name != "chdir"
    elif plain is not None:
        step.options[name.replace("_", "-")] = plain or True
    else:
        step.options[name.replace("_", "-")] = value.strip('"')
        return bool(re.fullmatch(r"[^\s'`()]*|\"[^'`()\"]*\"", value))
    return True


def _tasks_taken(name: str, value: str, plain: str | None, step: Step) -> bool:
    """Tasks of the step: a number, or a variable of Slurm's that says the same as the job."""
    if plain and plain.isdigit() and name == "ntasks-per-node":
        step.tasks = int(plain)
    elif plain and plain.isdigit():
        step.options[":ntasks"] = int(plain)
    elif re.search(r"NODES", value, re.I):
        step.tasks = 1
    else:
        return "SLURM_" in value
    return True


def _option(word: str, words: list[str]) -> tuple[str, str]:
    """(long name, value) of an option, whose value may be the next word."""
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        known = name in _SWITCHES or not words or words[0].startswith("-")
        return name, value if equals or known else words.pop(0)
    name = _SHORT.get(word[1:2], "")
    if len(word) > 2 and name in _SWITCHES and word[2:].isalpha():
        words.insert(0, "-" + word[2:])  # -lu
        return name, ""
    value = word[2:].lstrip("=")
    if not value and name not in _SWITCHES and words:
        value = words.pop(0)
    return name, value


def _torchrun(words: Sequence[str], values: dict[str, str], step: Step) -> None:
    """Let hpctrain start torchrun where all that the line says of it is what hpctrain says too."""
    rest = _after_torchrun(list(words))
    said: dict[str, str] = {}
    more: list[str] = []
    while rest and rest[0].startswith("--"):
        name, value = _option(rest.pop(0), rest)
        name = name.replace("-", "_")
        plain = expanded(value, values)
        if name == "no_python" or (plain is None and name not in _TORCHRUN):
            return
        if name in _TORCHRUN:
            said[name] = value if plain is None else plain
        elif name not in _TORCHRUN_FLAGS:
            more.append(f"--{name.replace('_', '-')}={plain}")
    processes = said.get("nproc_per_node", "1")
    known = processes.isdigit() or processes in ("gpu", "auto") or "GPU" in processes.upper()
    if not rest or not known or not (rest[0] == "-m" or rest[0].strip('"').endswith(".py")):
        return
    step.launch, step.tasks, step.nnodes = "torchrun", None, said.get("nnodes", "1")
    step.program = " ".join(rest)
    if processes.isdigit():
        step.recipe_options["processes_per_node"] = int(processes)
    if more:
        step.recipe_options["launch_args"] = more
    _torchrun_faults(said, step)


def _after_torchrun(words: list[str]) -> list[str]:
    """What follows torchrun, empty where the words start something else."""
    first = os.path.basename(words[0])
    if first == "torchrun":
        return words[1:]
    if re.match(r"python[\d.]*$", first) and "torch.distributed.run" in words[1:4]:
        return words[words.index("torch.distributed.run") + 1 :]
    return []


def _torchrun_faults(said: dict[str, str], step: Step) -> None:
    node_rank = said.get("node_rank", "")
    if "SLURM_PROCID" in node_rank or "SLURM_NODEID" in node_rank:
        step.faults.append(
            f"`--node_rank {node_rank}` is filled in by the batch script, where it is 0: every node"
            " gets the same number"
        )
    port = said.get("master_port") or said.get("rdzv_endpoint", "").rpartition(":")[2]
    if port.isdigit():
        step.faults.append(
            f"port {port} is the same for every job and start: two on one node collide"
        )
    if said.get("max_restarts", "0") not in ("0", ""):
        step.left.append(
            "--max_restarts: a link that begins anew does that, from a whole checkpoint"
        )


def main_statement(found: Sequence[Statement]) -> int | None:
    """The place of the statement that starts the processes: the only one, or the last that is not a
    helper's; None where there are several, or it is not one plain command."""
    starts = [
        index
        for index, statement in enumerate(found)
        if any(is_step(command) for command in statement.commands)
        and statement.kind != "function_definition"
        and statement.kind
        not in ("variable_assignment", "declaration_command", "variable_assignments")
    ]
    sruns = [
        index
        for index in starts
        if any(
            os.path.basename(command.words[0]) == "srun"
            for command in found[index].commands
            if command.words
        )
    ]
    chosen = sruns or starts
    if not chosen:
        return None
    index = chosen[-1]
    statement = found[index]
    if len(sruns) > 1 or statement.single is None or statement.broken:
        return None
    if statement.background and any(found[one].background for one in chosen[:-1]):
        return None
    return index
