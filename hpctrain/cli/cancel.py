from __future__ import annotations

import shlex

import click

from hpctrain.base import terminal
from hpctrain.cli import common


@click.command()
@click.argument("run", default="run.yaml", type=click.Path(), metavar="[RUN]")
@common.dry_run
def command(run: str, dry_run: bool) -> None:
    """Cancel every job of a run now, however it was submitted; work since the last checkpoint is
    lost. RUN as for `stop`.

    \b
    hpctrain cancel runs/ft
    hpctrain cancel 1234567 --dry-run
    """
    from hpctrain.jobs import chain

    run_dirs = chain.find_chains(run)
    would = "would be " if dry_run else ""
    found = False
    # The last stage first, so that none of its links begins while those before it go.
    for run_dir in reversed(run_dirs):
        done = chain.cancel(run_dir, dry_run, run if run.isdigit() else None)
        found = found or bool(done.jobs)
        for job in done.jobs:
            verb = "would cancel" if dry_run else "cancelled"
            terminal.info(f"{verb} job {job.job_id} ({job.state.lower()})")
        if done.lost:
            terminal.info(f"{would}lost: {done.lost}")
        if done.unrecorded:
            terminal.info(f"warning: not on record in `{run_dir}`: {done.unrecorded}")
    if not found:
        where = " ".join(map(shlex.quote, run_dirs))
        terminal.info(f"Slurm has no job of {where} that waits or runs")
    if found and not dry_run:
        verb = "pipeline" if len(run_dirs) > 1 else "chain"
        terminal.next_step(f"hpctrain {verb}    (goes on from the newest complete checkpoint)")
