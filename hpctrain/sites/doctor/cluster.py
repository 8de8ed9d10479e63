"""Slurm here against the site's profile: version, partitions and their limits."""

from __future__ import annotations

from collections.abc import Iterator

from hpctrain.base.errors import EnvironmentFault
from hpctrain.base.units import format_time
from hpctrain.config.site import Partition, Site
from hpctrain.sites.doctor.findings import NOT_SEEN, OK, PROBLEM, WARNING, Finding
from hpctrain.slurm import commands as slurm
from hpctrain.slurm.facts import PartitionFacts, read_facts

_NEEDED = ("sbatch", "srun", "squeue", "scancel", "scontrol")


def judge_cluster(site: Site) -> Iterator[Finding]:
    """Commands, answer, version and limits of the Slurm of this machine. Says so where there is
    none."""
    missing = [name for name in _NEEDED if not slurm.have(name)]
    if len(missing) == len(_NEEDED):
        yield Finding(
            "slurm",
            "commands",
            NOT_SEEN,
            "there is no Slurm here",
            "run this on a login node, or in `hpctrain sandbox shell`",
        )
        return
    if missing:
        yield Finding("slurm", "commands", PROBLEM, f"missing: {', '.join(missing)}")
    try:
        facts = read_facts([slurm.show("config"), slurm.show("partition")])
    except EnvironmentFault as error:
        yield Finding("slurm", "answers", PROBLEM, error.problems[0].what, error.problems[0].hint)
        return
    version = facts.config.get("SLURM_VERSION", "")
    yield from judge_version(version, str(site.values["verified"].get("slurm") or ""))
    if not slurm.have("sacct"):
        yield Finding(
            "slurm",
            "sacct",
            WARNING,
            "there is no sacct: what ended jobs did is known from logs and the run directory only",
        )
    here = {partition.name: partition for partition in facts.partitions}
    for name, ours in site.partitions.items():
        yield judge_partition(name, ours, here.get(ours.slurm_name))


def judge_version(version: str, verified: str) -> Iterator[Finding]:
    if not version:
        yield Finding("slurm", "version", NOT_SEEN, "scontrol does not tell its version")
        return
    major = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if major < (20, 11):
        yield Finding(
            "slurm", "version", WARNING, f"Slurm {version}; hpctrain is tried with 22.05 and newer"
        )
    else:
        yield Finding(
            "slurm",
            "version",
            OK,
            f"Slurm {version}"
            + (f"; the profile was verified with {verified}" if verified else ""),
        )


def judge_partition(name: str, ours: Partition, here: PartitionFacts | None) -> Finding:
    """One partition of the profile against the one of the same name here."""
    if here is None:
        return Finding(
            "slurm",
            f"partition {name}",
            PROBLEM,
            "the profile names it, and Slurm here does not have it",
            "correct the profile",
        )
    wrong = []
    if ours.max_time_s and here.max_time_s and ours.max_time_s > here.max_time_s:
        wrong.append(
            f"the profile allows {format_time(ours.max_time_s)}, Slurm"
            f" {format_time(here.max_time_s)}"
        )
    if ours.max_nodes and here.max_nodes and ours.max_nodes > here.max_nodes:
        wrong.append(f"the profile allows {ours.max_nodes} nodes, Slurm {here.max_nodes}")
    if wrong:
        return Finding(
            "slurm", f"partition {name}", PROBLEM, "; ".join(wrong), "lower the profile's limits"
        )
    stricter = [
        text
        for text, mine, theirs in (
            ("time", ours.max_time_s, here.max_time_s),
            ("nodes", ours.max_nodes, here.max_nodes),
        )
        if mine and theirs and mine < theirs
    ]
    note = f"; the profile is stricter about {' and '.join(stricter)}" if stricter else ""
    return Finding("slurm", f"partition {name}", OK, f"agrees with the profile{note}")
