"""The texts of the stand-ins' scripts and of the task prolog that puts them in front of every task.
Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from hpctrain.base.paths import filled
from hpctrain.sandbox.packages import CLIENTS, Toolbox

# Signals a job step may be sent. bubblewrap stays as the parent of the program and must not die of
# them: the script that starts the stand-in ignores them, and its `env` gives them back to the
# program.
PASSED_ON = (
    "HUP",
    "INT",
    "QUIT",
    "USR1",
    "USR2",
    "TERM",
    "CONT",
    "TSTP",
    "TTIN",
    "TTOU",
    "ALRM",
    "URG",
    "XCPU",
)


def client_script(argv: Sequence[str], slurm_conf: str) -> str:
    """A Slurm command that always talks to its own sandbox; nothing of ours enters the environment
    of jobs."""
    return (
        f"#!/bin/sh\nSLURM_CONF={shlex.quote(slurm_conf)}\nexport SLURM_CONF\nexec"
        f' {shlex.join(argv)} "$@"\n'
    )


def client_scripts(box: Toolbox, slurm_conf: str) -> dict[str, str]:
    """{command: script} for every Slurm command that there is."""
    return {
        name: client_script(box.argv(name), slurm_conf) for name in CLIENTS if name in box.programs
    }


def stepd_script(box: Toolbox) -> str:
    """What slurmd starts as slurmstepd."""
    return f'#!/bin/sh\nexec {shlex.join(box.argv("slurmstepd"))} "$@"\n'


def container_script(python: str, program: str, config: str, name: str) -> str:
    """`singularity` or `apptainer`: the stand-in run by hpctrain's interpreter, isolated from the
    job's environment.

    The signals of `PASSED_ON` are ignored from here on, so that bubblewrap does not die
    of them.
    """
    words = shlex.join([python, "-I", "-S", program, config, name])
    return f"#!/bin/sh\ntrap '' {' '.join(PASSED_ON)}\nexec {words} \"$@\"\n"


def container_config(
    bwrap: Sequence[str],
    image_dirs: Sequence[str],
    image_path: str,
    node_files: Sequence[str],
    unavailable: str,
) -> str:
    """The stand-in's configuration: lines `key<TAB>value`."""
    pairs = [("bwrap", word) for word in bwrap] + [("image_dirs", path) for path in image_dirs]
    pairs += [("image_path", image_path)] + [("node_files", path) for path in node_files]
    pairs += [("signals", name) for name in PASSED_ON]
    pairs += [("unavailable", unavailable.replace("\n", " "))] if unavailable else []
    return "".join(f"{key}\t{value}\n" for key, value in pairs)


def module_script(log: str) -> str:
    """`module` and `ml`: accepts what the real command does, writes it to `log`, changes
    nothing."""
    return filled("sandbox", "module.sh", q=shlex.quote, log=log)


def task_prolog(
    bin_dir: str, variables: Mapping[str, str], *, nss_wrapper: str, hosts_dir: str, hosts: str
) -> str:
    """Runs before the batch script and every task, however the job was submitted; its `export`
    lines reach them.

    Puts the sandbox's commands first on PATH (also with --export=NONE) and marks the processes as
    this sandbox's. With `nss_wrapper` that library is preloaded to answer for the names of
    simulated nodes: all of them from `hosts`, or, where `hosts` is "", the node itself and the
    first one of the job. Only shell builtins: it runs once per task.
    """
    return filled(
        "sandbox",
        "task_prolog.sh",
        q=shlex.quote,
        bin_dir=bin_dir,
        variables=variables,
        nss_wrapper=nss_wrapper,
        hosts_dir=hosts_dir,
        hosts=hosts,
    )
