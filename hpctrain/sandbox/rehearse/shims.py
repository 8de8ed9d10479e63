"""The script that a rehearsed job finds in place of its program. Pure: the text of a POSIX shell
script.

A step of 1,536 tasks starts it 1,536 times, so it uses nothing but shell builtins: it tells what
the task saw and waits for rank 0, which alone becomes Python. It is found by its name on PATH;
called with other words it is the real program.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hpctrain.base.paths import filled

FIELD, END = "\x1f", "\x1e"
# What a task tells about itself. A variable that is not set is left out of the record, an empty one
# is in it.
TOLD = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "LOCAL_WORLD_SIZE",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURMD_NODENAME",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_GPUS",
    "SLURM_JOB_GPUS",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "SLURM_CPU_BIND_TYPE",
    "SLURM_CPU_BIND_LIST",
    "SLURM_CPUS_PER_TASK",
    "HPCTRAIN_MODE",
    "HPCTRAIN_LINK",
    "HPCTRAIN_ITERATION",
    "PWD",
    "HPCTRAIN_CONFIG",
    "HPCTRAIN_CHECKPOINT",
    "HPCTRAIN_CHECKPOINT_DIR",
    "SINGULARITY_CONTAINER",
)


def script(
    folder: str,
    step: Sequence[str] | None,
    needed: Sequence[str],
    real: Mapping[str, str],
    python: str,
    saves_on: str = "",
    rules: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The stand-in's text. `step`: how the words of the step begin, without the program's name;
    None where this name is none of the step.

    `needed`: paths that every task must see. `real`: {name: the program to become when called with
    other words}. `python`: the interpreter of rank 0. `saves_on`: the signal that every task gets
    before the time limit, and outlives. `rules`: `rehearse` of recipe.yaml.
    """
    return filled(
        "sandbox",
        "program.sh",
        q=shlex.quote,
        folder=folder,
        step=step,
        needed=needed,
        real=real,
        python=python,
        saves_on=saves_on,
        skip=rules.get("skip", ()),
        instead=rules.get("instead", {}),
        TOLD=TOLD,
        FIELD=FIELD,
        END=END,
    )


def wait_for_slot(folder: str) -> str:
    """Lines for the end of the task prolog: a task of a step takes one of the slots, which the
    stand-in gives back.

    Those that are not given back, as by other programs, are given again by `records.Slots`.
    """
    slots = shlex.quote(f"{folder}/slots")
    return (
        f'case "${{SLURM_STEP_ID:-}}" in [0-9]*) [ ! -p {slots} ] || read -r _ <{slots} ;; esac\n'
    )


def dispatch(name: str, folders: Mapping[str, str], real: str) -> str:
    """Of several runs' stand-ins called `name` the one of the job's own run: `folders` are by run
    directory.

    Every job script exports HPCTRAIN_RUN_DIR in its first lines. Where no run fits, it is the
    program `real`.
    """
    cases = [
        f'  {shlex.quote(run_dir)}) exec {shlex.quote(f"{folder}/bin/{name}")} "$@" ;;'
        for run_dir, folder in folders.items()
    ]
    return "\n".join(
        [
            "#!/bin/sh",
            'case "${HPCTRAIN_RUN_DIR:-}" in',
            *cases,
            "esac",
            f'exec {shlex.quote(real)} "$@"',
            "",
        ]
    )


def bash(instead: Mapping[str, str]) -> str:
    """A `bash` that hands the job's tasks another program: the first word that is a key of
    `instead` becomes its value.

    The script that srun gives it, and everything else, is run by the real bash unchanged.
    """
    cases = "\n".join(
        f"      {shlex.quote(word)}) word={shlex.quote(other)} done=1 ;;"
        for word, other in instead.items()
    )
    return f"""#!/bin/sh
if [ "${{1:-}}" = -c ] && [ "${{3:-}}" = task ]; then
  done=
  for word do
    shift
    [ "$done" ] || case $word in
{cases}
    esac
    set -- "$@" "$word"
  done
fi
exec /bin/bash "$@"
"""
