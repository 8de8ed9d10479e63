"""What jobs left in their nodes' /tmp, which is this machine's: at a site an administrator's epilog
removes it."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpctrain.base.errors import EnvironmentFault
from hpctrain.sandbox import state

# `JobId=7`, and `JobId=7_3(12)` of an array, whose task has the id 12.
_JOB = re.compile(rb"JobId=(\d+)(?:_\d+\((\d+)\))?")


def remove_node_dirs(directory: Path) -> None:
    """Delete the per-job folders of a sandbox's own jobs: those that its controller's log names,
    and no others.

    Not by an epilog of Slurm's: with one, a node whose slurmd died stays in the state of its last
    job for longer, so a rehearsal would show other states than the site. What cannot be deleted is
    left.
    """
    try:
        record = state.load(directory)
    except EnvironmentFault:
        return
    if record is None or not record.shape.node_dirs:
        return
    jobs: set[str] = set()
    with contextlib.suppress(OSError), open(directory / "log" / "slurmctld.log", "rb") as log:
        for line in log:
            jobs.update(
                job.decode() for found in _JOB.finditer(line) for job in found.groups() if job
            )
    for path in node_dirs(record.shape.node_dirs, jobs):
        if not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)


def node_dirs(patterns: Sequence[str], jobs: Iterable[str]) -> list[str]:
    """The folders of these jobs; a job that was submitted without USER has used the user's number
    instead."""
    users = {str(os.geteuid()), os.environ.get("USER", "")}
    with contextlib.suppress(KeyError):
        users.add(pwd.getpwuid(os.geteuid()).pw_name)
    return [
        pattern.replace("{user}", user).replace("{job}", job)
        for job in sorted(jobs)
        for user in sorted(users - {""})
        for pattern in patterns
    ]
