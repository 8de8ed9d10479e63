"""`#SBATCH` lines as Slurm reads them, and as keys of a run.yaml."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from hpctrain.config.sbatch import OWNED

_SHORT = {
    **{"J": "job-name", "A": "account", "p": "partition", "N": "nodes", "n": "ntasks"},
    **{"c": "cpus-per-task", "t": "time", "G": "gpus", "o": "output", "e": "error", "i": "input"},
    **{
        "D": "chdir",
        "C": "constraint",
        "q": "qos",
        "w": "nodelist",
        "x": "exclude",
        "F": "nodefile",
    },
    **{"d": "dependency", "L": "licenses", "a": "array", "m": "distribution", "M": "clusters"},
    **{
        "O": "overcommit",
        "s": "oversubscribe",
        "H": "hold",
        "k": "no-kill",
        "B": "extra-node-info",
    },
    **{"S": "core-spec", "b": "begin", "v": "verbose", "Q": "quiet", "W": "wait"},
}
SWITCHES = frozenset(
    "exclusive requeue no-requeue contiguous overcommit verbose quiet hold wait".split()
)
_LONG = {"workdir": "chdir", "tasks-per-node": "ntasks-per-node", "mail_type": "mail-type"}
# Taken up by keys of run.yaml, by the recipe, or counted below.
_KEYS = {
    "account": ("account", r"[\w@.+-]+"),
    "time": ("time", r"[\d:-]+"),
    "partition": ("partition", r"[\w@.+-]+(,[\w@.+-]+)*"),
}
_COUNTED = frozenset(
    "job-name nodes ntasks ntasks-per-node gpus gpus-per-node gpus-per-task gres chdir"
    " cpus-per-gpu requeue".split()
)


@dataclass
class Directives:
    """The options by their long names, with line numbers; those that Slurm never sees; remarks."""

    options: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)


def directives(text: str) -> Directives:
    """What sbatch takes from a script: the lines before its first command."""
    found, over = Directives(), False
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"#SBATCH\s", line):
            if over:
                found.faults.append(
                    (
                        number,
                        f"Slurm never reads `{line.strip()}`: it stands after the first command",
                    )
                )
                continue
            for name, value in _options(line[7:].strip()):
                if "$" in value:
                    found.faults.append(
                        (
                            number,
                            f"`--{name}={value}`: Slurm fills in no variables in #SBATCH lines",
                        )
                    )
                    continue
                found.options[name], found.lines[name] = value, number
        elif line.strip() and not line.lstrip().startswith("#"):
            over = True
    return found


def _options(text: str) -> list[tuple[str, str]]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        words = text.split()
    out: list[tuple[str, str]] = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = _LONG.get(name, name)
            if not equals and name not in SWITCHES and words and not words[0].startswith("-"):
                value = words.pop(0)
            out.append((name, value))
        elif re.match(r"-[A-Za-z]", word):
            name, value = _SHORT.get(word[1], word[1]), word[2:].lstrip("=")
            if not value and name not in SWITCHES and words:
                value = words.pop(0)
            out.append((name, value))
    return out


def keys(found: Directives) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """(keys of run.yaml, remarks on what is left out)."""
    options, left = found.options, []
    out: dict[str, Any] = {}
    number = options.get("nodes", "1").split("-")[0]
    out["nodes"] = int(number) if number.isdigit() else 1
    if "-" in options.get("nodes", ""):
        left.append((found.lines["nodes"], f"of --nodes={options['nodes']} the least"))
    for name, (key, shape) in _KEYS.items():
        if name not in options:
            continue
        if re.fullmatch(shape, options[name]):
            out[key] = options[name]
        else:
            found.faults.append(
                (found.lines[name], f"`{options[name]}` is a place to fill in: set `{key}:`")
            )
    gpus = _gpus(options, out["nodes"])
    if gpus is not None:
        out["gpus_per_node"] = gpus
    out["tasks_per_node"] = _tasks(options, out["nodes"])
    out["sbatch"] = _sbatch(found, gpus or 0, out["tasks_per_node"], left)
    return out, left


def _sbatch(
    found: Directives, gpus: int, tasks: int, left: list[tuple[int, str]]
) -> dict[str, Any]:
    """What stays an option of sbatch; what cannot is told in `left`."""
    options, sbatch = found.options, {}
    for name, value in options.items():
        if name in _KEYS or name in _COUNTED:
            continue
        if name in OWNED and not (name == "dependency" and value == "singleton"):
            said = f"--{name}{'=' + value if value else ''}: {OWNED[name]}"
            left.append((found.lines[name], said))
        else:
            sbatch[name] = _scalar(value)
    gres = [part for part in options.get("gres", "").split(",") if part[:3] not in ("", "gpu")]
    if gres:
        sbatch["gres"] = ",".join(gres)
    if gpus and options.get("cpus-per-gpu", "").isdigit():
        sbatch["cpus-per-task"] = gpus * int(options["cpus-per-gpu"]) // tasks
    return sbatch


def _scalar(value: str) -> Any:
    if not value:
        return True
    return int(value) if re.fullmatch(r"[1-9]\d{0,8}|0", value) else value


def _gpus(options: dict[str, str], nodes: int) -> int | None:
    """GPUs a node; None where the script asks for none by number."""
    found = re.search(r"gpu(?::[A-Za-z][\w.-]*)?(?::(\d+))?", options.get("gres", ""))
    if found:
        return int(found[1] or 1)
    for name in ("gpus-per-node", "gpus", "gpus-per-task"):
        count = re.search(r"(\d+)$", options.get(name, ""))
        if count and name == "gpus":
            return max(int(count[1]) // nodes, 1)
        if count and name == "gpus-per-task":
            return int(count[1]) * _tasks(options, nodes)
        if count:
            return int(count[1])
    return None


def _tasks(options: dict[str, str], nodes: int) -> int:
    for name, share in (("ntasks-per-node", 1), ("ntasks", nodes)):
        if options.get(name, "").isdigit():
            return max(int(options[name]) // share, 1)
    return 1
