"""The only caller of sbatch, squeue, sacct, scancel, scontrol and sinfo: argv lists, timeouts, a scrubbed environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from hpctrain.errors import EnvironmentFault

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
        raise EnvironmentFault(
            f"there is no `{argv[0]}` here",
            hint="run this on a login node of a Slurm cluster, or start `hpctrain sandbox up`",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(
            f"`{argv[0]}` did not answer within {timeout_s:g} s", hint="is slurmctld up? try `scontrol ping`"
        ) from error


def test_only(job_script: str) -> tuple[bool, str]:
    """Ask sbatch whether the cluster would take this script now: (accepted, Slurm's own words)."""
    done = run(["sbatch", "--test-only", job_script])
    return done.returncode == 0, (done.stderr or done.stdout).strip()


def show(what: str) -> str:
    """What `scontrol show <what>` prints. Raises EnvironmentFault when Slurm does not answer."""
    done = run(["scontrol", "show", what], timeout_s=120)
    if done.returncode:
        words = done.stderr.strip() or f"exit code {done.returncode}"
        raise EnvironmentFault(f"`scontrol show {what}` failed: {words}", hint="is slurmctld up? try `scontrol ping`")
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


def active_jobs(name: str) -> list[tuple[str, str]]:
    """(job id, state) of this user's jobs of that name that are queued or running, array tasks one by one."""
    done = run(["squeue", "--noheader", "--array", "--me", f"--name={name}", "--format=%i %T"])
    if done.returncode:
        raise EnvironmentFault(f"squeue failed: {done.stderr.strip()}")
    return [(line.split()[0], line.split()[-1]) for line in done.stdout.splitlines() if line.strip()]


def count_queued(partition: str) -> int:
    """How many of this user's jobs are queued or running in `partition`, counting array tasks one by one."""
    done = run(["squeue", "--noheader", "--array", "--me", f"--partition={partition}", "--format=%i"])
    if done.returncode:
        raise EnvironmentFault(f"squeue failed: {done.stderr.strip()}")
    return len(done.stdout.split())
