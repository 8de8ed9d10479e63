"""The sbatch options that `sbatch:` may hold, and which of them hpctrain keeps to itself. Source: man sbatch (22.05–24.11)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.config.fields import nearest

# Options that replace a value of the plan.
REPLACES = frozenset(
    "cpus-per-task ntasks-per-node mem mem-per-cpu mem-per-gpu exclusive gpus-per-node gres hint signal constraint qos".split()
)
FREE = frozenset(
    "acctg-freq batch bb bbf begin clusters cluster-constraint contiguous core-spec cores-per-socket cpu-freq deadline "
    "delay-boot distribution exclude extra extra-node-info get-user-env gid gpu-bind gpu-freq gres-flags ignore-pbs "
    "licenses mail-type mail-user mcs-label mem-bind mincpus network nice nodefile nodelist "
    "ntasks-per-core ntasks-per-socket overcommit power prefer priority profile reservation reboot "
    "segment sockets-per-node spread-job switches thread-spec threads-per-core time-min tmp "
    "uid use-min-nodes wait-all-nodes wckey x11".split()
)
# Options that would contradict what hpctrain decides elsewhere: what to use instead.
OWNED = {
    "account": "use the key `account:`",
    "partition": "use the key `partition:`",
    "nodes": "use the key `nodes:`",
    "time": "use the key `time:`",
    "job-name": "use the key `name:`",
    "comment": "hpctrain marks its jobs with it, so that a rerun never submits twice",
    "ntasks": "it is nodes x tasks a node; use `tasks_per_node:`",
    "tasks-per-node": "use `ntasks-per-node`",
    "output": "the run directory's logs/ holds the logs",
    "error": "the run directory's logs/ holds the logs",
    "input": "jobs have no standard input",
    "open-mode": "logs are always appended, or a requeue would truncate them",
    "chdir": "jobs run in the run directory",
    "dependency": "`hpctrain chain` sets it",
    "array": "a run is one job, not an array",
    "export": "the script sets its environment itself",
    "export-file": "the script sets its environment itself; secrets go into a `secrets:` file",
    "wrap": "the recipe's step runs",
    "parsable": "`hpctrain chain` sets it",
    "quiet": "`hpctrain chain` sets it",
    "verbose": "give it to sbatch by hand",
    "test-only": "`hpctrain check` does that",
    "wait": "`hpctrain status --watch` waits",
    "hold": "`scontrol hold` after submitting keeps the ledger right",
    "kill-on-invalid-dep": "chains use afterany, which cannot become invalid",
    "no-kill": "a job that goes on without a node hangs in its next collective",
    "requeue": "the site's policy; use `no-requeue: true` to turn it off",
    "gpus": "it may spread GPUs unevenly over nodes; use `gpus_per_node:`",
    "gpus-per-task": "a cgroup per task breaks GPU-to-GPU communication; use `gpus_per_node:`",
    "gpus-per-socket": "use `gpus_per_node:`",
    "cpus-per-gpu": "use `cpus-per-task`",
    "ntasks-per-gpu": "use `tasks_per_node:`",
    "container": "use the key `container:`",
    "container-id": "use the key `container:`",
    "propagate": "limits of the login node do not belong into jobs",
    "oversubscribe": "training jobs do not share their GPUs",
}
SWITCHES = frozenset("contiguous no-requeue overcommit reboot spread-job use-min-nodes".split())


def check_options(options: Mapping[str, Any], where: Callable[[str], str]) -> list[Problem]:
    """Every problem of an `sbatch:` mapping: unknown options, owned ones, wrong values."""
    problems = []
    for name, value in options.items():
        if name in OWNED:
            problems.append(Problem(f"`sbatch.{name}` cannot be set here", where=where(name), hint=OWNED[name]))
        elif name not in REPLACES and name not in FREE and name not in SWITCHES:
            known = sorted({*REPLACES, *FREE, *SWITCHES, *OWNED})
            problems.append(
                Problem(
                    f"sbatch has no option `--{name}`, or it has no place in a run",
                    where=where(name),
                    hint=nearest(name, known),
                )
            )
        elif name in SWITCHES and not isinstance(value, bool):
            problems.append(Problem(f"`sbatch.{name}` is a switch: true or false", where=where(name)))
        elif value == "":
            problems.append(Problem(f"`sbatch.{name}` is empty", where=where(name)))
    return problems


def option_text(name: str, value: Any) -> str | None:
    """The text after `--name=`, an empty string for a switch that is on, None for one that is off."""
    if value is True:
        return ""
    if value is False or value is None:
        return None
    return str(value)
