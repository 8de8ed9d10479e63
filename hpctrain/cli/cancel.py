from __future__ import annotations

import shlex

import click

from hpctrain.base import terminal
from hpctrain.cli import common


@click.command()
@click.argument("run", default="run.yaml", type=click.Path(), metavar="[RUN]")
@common.dry_run
def command(run: str, dry_run: bool) -> None:
    """Cancel every job of a chain now; work since the last checkpoint is lost. RUN as for `stop`.

    \b
    hpctrain cancel runs/ft
    hpctrain cancel 1234567 --dry-run
    """
    from hpctrain.jobs import chain

    run_dirs = chain.find_chains(run)
    # The last stage first, so that none of its links begins while those before it go.
    found = [job for run_dir in reversed(run_dirs) for job in chain.cancel(run_dir, dry_run)]
    for job in found:
        terminal.info(
            f"{'would cancel' if dry_run else 'cancelled'} job {job.job_id} ({job.state.lower()})"
        )
    if not found:
        terminal.info("no job of this run waits or runs")
    if not dry_run:
        verb = "pipeline" if len(run_dirs) > 1 else "chain --extend N"
        where = " ".join(map(shlex.quote, run_dirs))
        terminal.next_step(
            f"hpctrain {verb}    (goes on from the newest complete checkpoint of {where})"
        )
