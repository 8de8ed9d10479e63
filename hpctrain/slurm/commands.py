"""The only caller of sbatch, squeue, sacct, scancel, scontrol and sinfo: argv lists, timeouts, a
scrubbed environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from hpctrain.base.errors import EnvironmentFault
from hpctrain.slurm import answers

# SBATCH_* overrides a script's directives (man sbatch); SLURM_* and PMI* of an enclosing allocation
# leak into the job.
SCRUBBED_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_")
KEPT = frozenset({"SLURM_CONF"})


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what would override or leak into a submitted job; SLURM_CONF stays."""
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT or not name.startswith(SCRUBBED_PREFIXES)
    }


def leaking(environment: Mapping[str, str]) -> list[str]:
    """The names of those variables that `scrubbed` removes, sorted."""
    return sorted(set(environment) - set(scrubbed(environment)))


class NoAnswer(EnvironmentFault):
    """No Slurm answered, so nothing is known of what was asked: it is neither refused nor done."""


class Unsure(EnvironmentFault):
    """sbatch did not tell what became of a job: it may be queued."""


def have(program: str) -> bool:
    """Whether a Slurm command is on PATH."""
    return shutil.which(program) is not None


def run(
    argv: Sequence[str], timeout_s: float = 60, input_text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one Slurm command with the scrubbed environment and return what it said, whatever its
    exit code.

    Raises NoAnswer when it takes too long, and EnvironmentFault when it is not installed.
    """
    try:
        return subprocess.run(
            list(argv),
            env=scrubbed(os.environ),
            close_fds=False,  # only what was made inheritable goes on: the submission lock
            stdin=subprocess.DEVNULL if input_text is None else None,
            input=input_text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise _not_here(argv[0]) from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(
            f"`{argv[0]}` did not answer within {timeout_s:g} s",
            hint="is slurmctld up? try `scontrol ping`",
        ) from error


def ask(argv: Sequence[str], timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """`run`, for a command that asks or tells a daemon: NoAnswer too when it says that none
    answered, or was killed."""
    done = run(argv, timeout_s=timeout_s)
    if done.returncode < 0:
        raise NoAnswer(f"`{argv[0]}` was ended by signal {-done.returncode} before it answered")
    words = said(done)
    hint = answers.no_answer(words) if done.returncode else ""
    if hint:
        raise NoAnswer(f"Slurm did not answer: {words}", hint=hint)
    return done


def ask_in_utc(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """`ask`, with times in UTC: squeue, sacct and scontrol print local time without a zone."""
    if not have(argv[0]):
        raise _not_here(argv[0])
    return ask(["env", "TZ=UTC0", *argv], timeout_s=60)


def test_only(job_script: str) -> tuple[bool, str]:
    """Whether the cluster would take this script now, and Slurm's own words. Raises NoAnswer."""
    done = ask(["sbatch", "--test-only", job_script])
    return done.returncode == 0, said(done)


def may_be_down(partition: str | None, num_nodes: int) -> bool:
    """Whether a job may only lack nodes that are down or reserved now; so too where Slurm does not
    say. See `answers.may_be_down`."""
    where = [f"--partition={partition}"] if partition else []
    try:
        done = ask(["sinfo", "-h", "-N", "-o", "%a|%T|%c|%m|%G|%f", *where])
    except EnvironmentFault:
        return True
    return answers.may_be_down(done.stdout, num_nodes)


def become(argv: Sequence[str], unset: Sequence[str] = ()) -> NoReturn:
    """Replace this process by an interactive Slurm command with the scrubbed environment, less the
    variables `unset`.

    Its terminal, signals and exit code are then the user's own. Raises EnvironmentFault when it is
    not installed.
    """
    environment = {name: value for name, value in scrubbed(os.environ).items() if name not in unset}
    sys.stdout.flush()
    try:
        os.execvpe(argv[0], list(argv), environment)
    except FileNotFoundError as error:
        raise _not_here(argv[0]) from error


def show(*what: str) -> str:
    """What `scontrol show WHAT…` prints. Raises NoAnswer, or EnvironmentFault with Slurm's own
    words."""
    done = ask(["scontrol", "show", *what], timeout_s=120)
    if done.returncode:
        raise EnvironmentFault(f"`scontrol show {' '.join(what)}` failed: {said(done)}")
    return done.stdout


def cluster_name() -> str | None:
    """ClusterName of the Slurm that answers here, or None."""
    try:
        done = ask(["scontrol", "show", "config"], timeout_s=15)
    except EnvironmentFault:
        return None
    found = re.search(r"^ClusterName\s*=\s*(.*\S)", done.stdout, re.MULTILINE)
    return found[1] if found else None


def _not_here(program: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"there is no `{program}` here",
        hint="run this on a login node of a Slurm cluster, or start `hpctrain sandbox up`",
    )


def submit(script: str, arguments: Sequence[str] = (), options: Sequence[str] = ()) -> str:
    """Submit a job script and return its job id.

    Raises EnvironmentFault with Slurm's own message when it is refused, Unsure when it may be
    queued all the same.
    """
    return submitted(["--parsable", *options, script, *arguments], script)[0]


def submitted(words: Sequence[str], script: str, timeout_s: float = 120) -> tuple[str, int]:
    """Run `sbatch --parsable …`: (job id, exit code), which `--wait` makes the job's own.

    The id is the one line that is an id: a site's wrapper may print before and after it. Raises as
    `submit` does.
    """
    try:
        done = run(["sbatch", *words], timeout_s=timeout_s)
    except NoAnswer as error:
        raise _unsure(error.problems[0].what, script) from error
    ids = [
        line.split(";")[0]
        for line in done.stdout.splitlines()
        if re.fullmatch(r"\d+(;\S+)?", line.strip())
    ]
    told = said(done)
    if len(ids) == 1 and (done.returncode == 0 or "--wait" in words):
        return ids[0].strip(), done.returncode
    if done.returncode <= 0 or ids or answers.no_answer(told) or not done.stderr.strip():
        raise _unsure(told, script)
    raise EnvironmentFault(
        f"Slurm refused the job: {told}", where=script, hint=answers.shown_by(told)
    )


def _unsure(words: str, script: str) -> Unsure:
    return Unsure(
        f"sbatch gave no job id, so the job may be queued or not: {words}",
        where=script,
        hint="`squeue --me` shows what is queued",
    )


def cancel(ids: Sequence[str]) -> None:
    """End or withdraw jobs; those that have ended already are no error. Raises EnvironmentFault
    when Slurm refuses."""
    if not ids:
        return
    done = ask(["scancel", *ids])
    wrong = [
        line
        for line in done.stderr.splitlines()
        if line.strip() and "Invalid job id" not in line and "already complet" not in line
    ]
    if done.returncode != 0 and wrong:
        raise EnvironmentFault(f"scancel failed: {'; '.join(wrong)}")


def signal_batch(job_id: str, name: str) -> None:
    """Send a signal to a running job's batch script, and to nothing else of it."""
    done = ask(["scancel", "--batch", f"--signal={name}", job_id])
    if done.returncode != 0:
        raise EnvironmentFault(f"scancel --signal failed: {said(done)}")


def excluded_nodes(job_id: str) -> str:
    """The nodes a waiting job must not get, in Slurm's compressed form; "" for none."""
    match = re.search(r"\bExcNodeList=(\S+)", show("job", "-o", job_id))
    return "" if match is None or match.group(1) == "(null)" else match.group(1)


def exclude_nodes(job_id: str, nodes: str) -> None:
    """Let a waiting job never get `nodes` (Slurm's compressed form)."""
    done = ask(["scontrol", "update", f"jobid={job_id}", f"ExcNodeList={nodes}"])
    if done.returncode != 0:
        raise EnvironmentFault(f"scontrol update of job {job_id} failed: {said(done)}")


def set_dependency(job_id: str, dependency: str) -> bool:
    """Let a waiting job wait for something else; False when Slurm does not take it (it began, or
    ended, in between)."""
    return (
        ask(["scontrol", "update", f"jobid={job_id}", f"Dependency={dependency}"]).returncode == 0
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said, in one line; its exit code where it said nothing."""
    return (
        "; ".join(
            line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()
        )
        or f"exit code {done.returncode}"
    )
