"""Looks at the nodes of an allocation by a short Slurm step with the run's own shape, Python and
container."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from hpctrain.base.errors import EnvironmentFault
from hpctrain.base.paths import shipped_dir
from hpctrain.plan.make import Plan
from hpctrain.runtime import preflight
from hpctrain.slurm import commands as slurm

# What every task exports, as the job script does (templates/base/job.sbatch.j2, block `task`).
_TASK = (
    'export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"; exec "$@"'
)


def step_argv(plan: Plan, python: str, script: str, out: str, mib: int) -> list[str]:
    """The srun of the measurement on the current allocation: the run's options, container and
    Python."""
    # A rank that dies must not end the others: how far each of them comes tells which node is to
    # blame.
    options = ["--kill-on-bad-exit=0"]
    options += [
        f"--{option.option}" + (f"={option.value}" if option.value else "")
        for option in plan.srun_options
        if option.option != "kill-on-bad-exit"
    ]
    return [
        "srun",
        "--overlap",
        *options,
        "bash",
        "-c",
        _TASK,
        "task",
        *plan.container,
        python,
        "-B",
        script,
        "--out",
        out,
        "--mib",
        str(mib),
    ]


def run_here(plan: Plan, python: str, mib: int, limit_s: float) -> dict[str, Any]:
    """Measure the allocation that this process is in, and judge it. Raises EnvironmentFault outside
    of one."""
    if not os.environ.get("SLURM_JOB_ID"):
        raise EnvironmentFault(
            "this is not inside an allocation",
            hint="use --submit, or run it in `salloc` or `hpctrain shell`",
        )
    if not slurm.have("srun"):
        raise EnvironmentFault("there is no `srun` here")
    os.makedirs(os.path.join(plan.run_dir, "logs"), exist_ok=True)
    out = tempfile.mkdtemp(
        prefix=f"preflight-{os.environ['SLURM_JOB_ID']}-", dir=os.path.join(plan.run_dir, "logs")
    )
    script = os.path.join(shipped_dir("templates"), "base", "measure_nodes.py")
    num_ranks = plan.spec.num_nodes * plan.tasks_per_node
    host = _first_host()
    environ = {
        **os.environ,
        "MASTER_ADDR": host,
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
    }
    try:
        done = subprocess.run(
            step_argv(plan, python, script, out, mib),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            env=environ,
            timeout=limit_s,
            check=False,
        )
        ended = f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"not done after {limit_s:g} s"
    answer = preflight.judge(out, num_ranks, _gpus_per_task(plan))
    if ended != "exit code 0":
        answer["remarks"].append(f"the step ended with {ended}")
        answer["ok"] = False
    return {**answer, "out": out}


def _first_host() -> str:
    done = slurm.run(["scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")])
    names = done.stdout.split()
    if not names:
        raise EnvironmentFault(f"scontrol does not tell the nodes: {done.stderr.strip()}")
    return names[0]


def _gpus_per_task(plan: Plan) -> int | None:
    return max(plan.gpus_per_node // plan.tasks_per_node, 1) if plan.gpus_per_node else None


def submit_argv(plan: Plan, words: Sequence[str], minutes: int = 10) -> list[str]:
    """An sbatch that runs `words` (this verb again) on nodes of the run's shape and waits for the
    answer."""
    kept = {
        "account",
        "partition",
        "qos",
        "nodes",
        "ntasks-per-node",
        "cpus-per-task",
        "gpus-per-node",
        "gres",
        "mem",
        "exclusive",
        "constraint",
        "hint",
        "reservation",
        "exclude",
        "nodelist",
    }
    options = [
        f"--{d.option}" + (f"={d.value}" if d.value else "")
        for d in plan.directives
        if d.option in kept
    ]
    log = os.path.join(plan.run_dir, "logs", "preflight-%j.out")
    return [
        "sbatch",
        "--wait",
        "--parsable",
        "--job-name=preflight",
        f"--time={minutes}",
        f"--output={log}",
        *options,
        "--wrap",
        _quoted(words),
    ]


def _quoted(words: Sequence[str]) -> str:
    import shlex

    return "exec " + " ".join(shlex.quote(word) for word in words)


def submit(plan: Plan, words: Sequence[str]) -> tuple[str, int]:
    """Submit, wait, and return (job id, exit code). Raises EnvironmentFault when Slurm does not
    take it."""
    os.makedirs(os.path.join(plan.run_dir, "logs"), exist_ok=True)
    return slurm.submitted(submit_argv(plan, words)[1:], plan.run_dir, timeout_s=24 * 3600)
