"""The sbatch options that `sbatch:` may hold, and which of them hpctrain keeps to itself. Source:
man sbatch (22.05–24.11)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from hpctrain.base.errors import Problem
from hpctrain.config.fields import nearest

# Options that replace a value of the plan.
REPLACES = frozenset(
    "cpus-per-task ntasks-per-node mem mem-per-cpu mem-per-gpu exclusive gpus-per-node gres hint"
    " signal constraint qos".split()
)
FREE = frozenset(
    "acctg-freq batch bb bbf begin clusters cluster-constraint contiguous core-spec"
    " cores-per-socket cpu-freq deadline delay-boot distribution exclude extra extra-node-info"
    " get-user-env gid gpu-bind gpu-freq gres-flags ignore-pbs licenses mail-type mail-user"
    " mcs-label mem-bind mincpus network nice nodefile nodelist ntasks-per-core ntasks-per-socket"
    " overcommit power prefer priority profile reservation reboot segment sockets-per-node"
    " spread-job switches thread-spec threads-per-core time-min tmp uid use-min-nodes"
    " wait-all-nodes wckey x11".split()
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
# Options of srun that would contradict the plan: what to use instead.
SRUN_OWNED = {
    "nodes": "use the key `nodes:`",
    "ntasks": "it is nodes x tasks a node; use `tasks_per_node:`",
    "ntasks-per-node": "use the key `tasks_per_node:`",
    "cpus-per-task": "use `sbatch: {cpus-per-task: N}`, which the step takes over",
    "account": "use the key `account:`",
    "partition": "use the key `partition:`",
    "time": "use the key `time:`",
    "output": "the run directory's logs/ holds the logs",
    "error": "the run directory's logs/ holds the logs",
    "chdir": "use `recipe_options: {workdir: …}`",
    "export": "the step has the job's environment; use `env:`",
    "jobid": "the step runs in its own job",
    "pty": "a job has no terminal",
}
SWITCHES = frozenset("contiguous no-requeue overcommit reboot spread-job use-min-nodes".split())


def check_options(options: Mapping[str, Any], where: Callable[[str], str]) -> list[Problem]:
    """Every problem of an `sbatch:` mapping: unknown options, owned ones, wrong values."""
    problems = []
    for name, value in options.items():
        if name == "dependency" and value == "singleton":
            continue
        if name in OWNED:
            problems.append(
                Problem(f"`sbatch.{name}` cannot be set here", where=where(name), hint=OWNED[name])
            )
        elif name not in REPLACES and name not in FREE and name not in SWITCHES:
            problems.append(_unknown(name, where(name)))
        elif name in SWITCHES and not isinstance(value, bool):
            problems.append(
                Problem(f"`sbatch.{name}` is a switch: true or false", where=where(name))
            )
        elif value == "":
            problems.append(Problem(f"`sbatch.{name}` is empty", where=where(name)))
    return problems


def _unknown(name: str, where: str) -> Problem:
    """A mistyped option, or one that a site's plugin may add."""
    what = f"sbatch has no option `--{name}`, or it has no place in a run"
    hint = nearest(name, sorted({*REPLACES, *FREE, *SWITCHES, *OWNED}))
    if hint:
        return Problem(what, where=where, hint=hint)
    what = f"`sbatch.{name}` is passed on as it stands: hpctrain does not know it"
    return Problem(what, where, why="a site's plugins may add options", level="warning")


def check_srun_options(options: Mapping[str, Any], where: Callable[[str], str]) -> list[Problem]:
    """Every problem of a `srun:` mapping. What hpctrain does not know srun may: plugins add
    options."""
    return [
        Problem(f"`srun.{name}` cannot be set here", where=where(name), hint=SRUN_OWNED[name])
        for name in options
        if name in SRUN_OWNED
    ]


def option_text(name: str, value: Any) -> str | None:
    """The text after `--name=`, an empty string for a switch that is on, None for one that is
    off."""
    if value is True:
        return ""
    if value is False or value is None:
        return None
    return str(value)


# srun takes options from these variables (`env_vars` and the getenv calls in src/srun, Slurm 19.05
# to 26.05), and a job's environment is that of the shell that submitted it. None is the job's own …
_SRUN_INPUTS = frozenset(
    "SLURMD_DEBUG SLURM_ACCOUNT SLURM_ARBITRARY_NODELIST SLURM_BCAST SLURM_BCAST_EXCLUDE "
    "SLURM_BURST_BUFFER SLURM_CHECKPOINT SLURM_CLUSTERS SLURM_CLUSTER_CONSTRAINT SLURM_COMPRESS "
    "SLURM_CONSOLIDATE_SEGMENTS SLURM_CONSTRAINT SLURM_CONTAINER SLURM_CONTAINER_ID "
    "SLURM_CONTAINER_TYPE SLURM_CORE_SPEC SLURM_CPU_BIND SLURM_CPU_FREQ_REQ SLURM_DEBUG "
    "SLURM_DELAY_BOOT SLURM_DEPENDENCY SLURM_DISABLE_STATUS SLURM_EPILOG SLURM_EXACT "
    "SLURM_EXCLUSIVE SLURM_EXIT_ERROR SLURM_EXIT_IMMEDIATE SLURM_EXPORT_ENV "
    "SLURM_EXTERNAL_LAUNCHER SLURM_GRES SLURM_GRES_FLAGS SLURM_HET_SIZE SLURM_HOSTFILE "
    "SLURM_IMMEDIATE SLURM_KILL_BAD_EXIT SLURM_LABELIO SLURM_MPI_TYPE SLURM_NCORES_PER_SOCKET "
    "SLURM_NO_KILL SLURM_NSOCKETS_PER_NODE SLURM_OVERLAP SLURM_PARTITION SLURM_POWER SLURM_PROLOG "
    "SLURM_QOS SLURM_REMOTE_CWD SLURM_REQ_SWITCH SLURM_RESERVATION SLURM_RESV_PORTS "
    "SLURM_SEND_LIBS SLURM_SIGNAL SLURM_SPREAD_JOB SLURM_SPREAD_SEGMENTS SLURM_SRUN_MULTI "
    "SLURM_SRUN_REDUCE_TASK_EXIT_MSG SLURM_STDERRMODE SLURM_STDINMODE SLURM_STDOUTMODE "
    "SLURM_STEP_GRES SLURM_STEP_KILLED_MSG_NODE_ID SLURM_TASK_EPILOG SLURM_TASK_PROLOG "
    "SLURM_TEST_EXEC SLURM_THREADS SLURM_THREAD_SPEC SLURM_TIMELIMIT SLURM_UNBUFFEREDIO "
    "SLURM_USE_MIN_NODES SLURM_WAIT SLURM_WAIT4SWITCH SLURM_WCKEY SLURM_WORKING_DIR".split()
)
# … and these are only where sbatch got one of these options: it then sets the variable anew
# (src/sbatch/opt.c, src/common/env.c). What Slurm sets for every job, such as SLURM_JOB_ID, is not
# here, nor is SLURM_MEM_PER_*, which it sets for some: see templates/base.
_SRUN_INPUTS_OF = {
    "SLURM_ACCTG_FREQ": ("acctg-freq",),
    "SLURM_CPUS_PER_GPU": ("cpus-per-gpu",),
    "SLURM_CPUS_PER_TASK": ("cpus-per-task",),
    "SLURM_DISTRIBUTION": ("distribution",),
    "SLURM_DIST_PLANESIZE": ("distribution",),
    "SLURM_GPUS": ("gpus",),
    "SLURM_GPUS_PER_NODE": ("gpus-per-node",),
    "SLURM_GPUS_PER_SOCKET": ("gpus-per-socket",),
    "SLURM_GPUS_PER_TASK": ("gpus-per-task",),
    "SLURM_GPU_BIND": ("gpu-bind",),
    "SLURM_GPU_FREQ": ("gpu-freq",),
    "SLURM_HINT": ("hint",),
    "SLURM_MEM_BIND": ("mem-bind",),
    "SLURM_NETWORK": ("network",),
    "SLURM_NTASKS_PER_CORE": ("ntasks-per-core",),
    "SLURM_NTASKS_PER_GPU": ("ntasks-per-gpu",),
    "SLURM_NTASKS_PER_NODE": ("ntasks-per-node", "tasks-per-node"),
    "SLURM_NTASKS_PER_SOCKET": ("ntasks-per-socket",),
    "SLURM_NTASKS_PER_TRES": ("ntasks-per-gpu",),
    "SLURM_OOM_KILL_STEP": ("oom-kill-step",),
    "SLURM_OPEN_MODE": ("open-mode",),
    "SLURM_OVERCOMMIT": ("overcommit",),
    "SLURM_PROFILE": ("profile",),
    "SLURM_THREADS_PER_CORE": ("threads-per-core", "hint"),
    "SLURM_TRES_BIND": ("gpu-bind", "tres-bind"),
    "SLURM_TRES_PER_TASK": ("gpus-per-task", "tres-per-task"),
}
# The variables from which sbatch takes options before it reads the script (sbatch(1), INPUT
# ENVIRONMENT VARIABLES), for the options that jobs have here.
_SBATCH_INPUTS = {
    "job-name": "SBATCH_JOB_NAME",
    "mem": "SBATCH_MEM_PER_NODE",
    "time": "SBATCH_TIMELIMIT",
    "switches": "SBATCH_REQ_SWITCH",
    **{
        option: "SBATCH_" + option.upper().replace("-", "_")
        for option in "account constraint distribution exclusive gpus-per-node gres hint"
        " mem-per-cpu mem-per-gpu network no-requeue open-mode output partition qos requeue"
        " reservation signal".split()
    },
}
# What says nothing about the job, or what Slurm itself sets in it (SBATCH_MEM_BIND…).
_SBATCH_HARMLESS = (
    "SBATCH_DEBUG SBATCH_EXPORT SBATCH_GET_USER_ENV SBATCH_IGNORE_PBS SBATCH_WAIT SBATCH_MEM_BIND "
    "SBATCH_MEM_BIND_LIST SBATCH_MEM_BIND_PREFER SBATCH_MEM_BIND_SORT SBATCH_MEM_BIND_TYPE "
    "SBATCH_MEM_BIND_VERBOSE"
).split()


def inherited_inputs(options: Collection[str]) -> list[str]:
    """The variables from which srun would take what is not of a job submitted with these
    options."""
    own = {name for name, setters in _SRUN_INPUTS_OF.items() if set(setters) & set(options)}
    return sorted((_SRUN_INPUTS | set(_SRUN_INPUTS_OF)) - own)


def agreeing_inputs(options: Mapping[str, str]) -> dict[str, str]:
    """The variables of sbatch that change nothing of a job with these options: their values, "" for
    any."""
    own = {_SBATCH_INPUTS[name]: value for name, value in options.items() if name in _SBATCH_INPUTS}
    return {**own, **dict.fromkeys(_SBATCH_HARMLESS, "")}


def overriding_inputs(environment: Mapping[str, str], options: Mapping[str, str]) -> list[str]:
    """The variables of a shell from which sbatch would take other options than these, sorted."""
    agreeing = {**agreeing_inputs(options), "SLURM_HINT": options.get("hint", "")}
    return [
        name
        for name, value in sorted(environment.items())
        if (
            name.startswith("SBATCH_") or name in ("SLURM_HINT", "SLURM_CLUSTERS", "SLURM_HOSTFILE")
        )
        and (name not in agreeing or agreeing[name] not in ("", value))
    ]
