"""The only caller of sbatch, squeue, sacct, scancel, scontrol and sinfo: argv lists, timeouts, a scrubbed environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from hpctrain.base.errors import EnvironmentFault

# SBATCH_* overrides a script's directives (man sbatch); SLURM_* and PMI* of an enclosing allocation leak into the job.
SCRUBBED_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_")
KEPT = frozenset({"SLURM_CONF"})


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what would override or leak into a submitted job; SLURM_CONF stays."""
    return {
        name: value for name, value in environment.items() if name in KEPT or not name.startswith(SCRUBBED_PREFIXES)
    }  # fmt: skip


def leaking(environment: Mapping[str, str]) -> list[str]:
    """The names of those variables that `scrubbed` removes, sorted."""
    return sorted(set(environment) - set(scrubbed(environment)))


def have(program: str) -> bool:
    """Whether a Slurm command is on PATH."""
    return shutil.which(program) is not None


def run(argv: Sequence[str], timeout_s: float = 60, input_text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one Slurm command with the scrubbed environment and return what it said, whatever its exit code.

    Raises EnvironmentFault when it is not installed or does not answer.
    """
    try:
        return subprocess.run(
            list(argv), env=scrubbed(os.environ), stdin=subprocess.DEVNULL if input_text is None else None, input=input_text,
            capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise _not_here(argv[0]) from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(
            f"`{argv[0]}` did not answer within {timeout_s:g} s", hint="is slurmctld up? try `scontrol ping`"
        ) from error


def run_in_utc(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """`run`, with times in UTC: squeue, sacct and scontrol print local time without a zone."""
    if not have(argv[0]):
        raise _not_here(argv[0])
    return run(["env", "TZ=UTC0", *argv], timeout_s=60)


def test_only(job_script: str) -> tuple[bool, str]:
    """Ask sbatch whether the cluster would take this script now: (accepted, Slurm's own words)."""
    done = run(["sbatch", "--test-only", job_script])
    return done.returncode == 0, (done.stderr or done.stdout).strip()


def become(argv: Sequence[str], unset: Sequence[str] = ()) -> NoReturn:
    """Replace this process by an interactive Slurm command with the scrubbed environment, less the variables `unset`.

    Its terminal, signals and exit code are then the user's own. Raises EnvironmentFault when it is not installed.
    """
    environment = {name: value for name, value in scrubbed(os.environ).items() if name not in unset}
    sys.stdout.flush()
    try:
        os.execvpe(argv[0], list(argv), environment)
    except FileNotFoundError as error:
        raise _not_here(argv[0]) from error


def show(*what: str) -> str:
    """What `scontrol show WHAT…` prints. Raises EnvironmentFault when Slurm does not answer."""
    done = run(["scontrol", "show", *what], timeout_s=120)
    if done.returncode:
        words = done.stderr.strip() or f"exit code {done.returncode}"
        raise EnvironmentFault(
            f"`scontrol show {' '.join(what)}` failed: {words}", hint="is slurmctld up? try `scontrol ping`"
        )
    return done.stdout


def cluster_name() -> str | None:
    """ClusterName of the Slurm that answers here, or None."""
    if not have("scontrol"):
        return None
    try:
        done = run(["scontrol", "show", "config"], timeout_s=15)
    except EnvironmentFault:
        return None
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "ClusterName":
            return value.strip()
    return None


def _not_here(program: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"there is no `{program}` here",
        hint="run this on a login node of a Slurm cluster, or start `hpctrain sandbox up`",
    )


def submit(script: str, arguments: Sequence[str] = (), options: Sequence[str] = ()) -> str:
    """Submit a job script and return its job id. Raises EnvironmentFault with Slurm's own message when it is refused."""
    done = run(["sbatch", "--parsable", *options, script, *arguments], timeout_s=120)
    words = (done.stdout.strip().splitlines() or [""])[-1].split(";")[0]
    if done.returncode != 0 or not words.isdigit():
        raise EnvironmentFault(
            f"Slurm refused the job: {said(done)}", where=script, hint="`hpctrain check` asks it without submitting"
        )
    return words


def cancel(ids: Sequence[str]) -> None:
    """End or withdraw jobs; those that have ended already are no error. Raises EnvironmentFault when Slurm refuses."""
    if not ids:
        return
    done = run(["scancel", *ids])
    wrong = [
        line
        for line in done.stderr.splitlines()
        if line.strip() and "Invalid job id" not in line and "already complet" not in line
    ]
    if done.returncode != 0 and wrong:
        raise EnvironmentFault(f"scancel failed: {'; '.join(wrong)}", hint="is slurmctld up? try `scontrol ping`")


def signal_batch(job_id: str, name: str) -> None:
    """Send a signal to a running job's batch script, and to nothing else of it."""
    done = run(["scancel", "--batch", f"--signal={name}", job_id])
    if done.returncode != 0:
        raise EnvironmentFault(f"scancel --signal failed: {said(done)}")


def excluded_nodes(job_id: str) -> str:
    """The nodes a waiting job must not get, in Slurm's compressed form; "" for none."""
    match = re.search(r"\bExcNodeList=(\S+)", show("job", "-o", job_id))
    return "" if match is None or match.group(1) == "(null)" else match.group(1)


def exclude_nodes(job_id: str, nodes: str) -> None:
    """Let a waiting job never get `nodes` (Slurm's compressed form)."""
    done = run(["scontrol", "update", f"jobid={job_id}", f"ExcNodeList={nodes}"])
    if done.returncode != 0:
        raise EnvironmentFault(f"scontrol update of job {job_id} failed: {said(done)}")


def set_dependency(job_id: str, dependency: str) -> bool:
    """Let a waiting job wait for something else; False when Slurm does not take it (it began, or ended, in between)."""
    return run(["scontrol", "update", f"jobid={job_id}", f"Dependency={dependency}"]).returncode == 0


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said, in one line."""
    return (
        "; ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        or f"exit code {done.returncode}"
    )
