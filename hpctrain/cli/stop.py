from __future__ import annotations

import shlex

import click

from hpctrain.base import terminal
from hpctrain.cli import common


@click.command()
@click.argument("run", default="run.yaml", type=click.Path(), metavar="[RUN]")
@common.dry_run
def command(run: str, dry_run: bool) -> None:
    """End a chain after its next checkpoint; RUN is a run directory, a run.yaml, a pipeline, a name
    or a job id.

    \b
    hpctrain stop runs/ft
    hpctrain stop 1234567
    """
    from hpctrain.jobs import chain
    from hpctrain.runs.status import observe, stop_words

    run_dirs = chain.find_chains(run)
    for run_dir in run_dirs:
        chain.stop(run_dir, dry_run)
    for status in observe(run_dirs):
        terminal.notes(stop_words(status.run, status.links, status.progress))
    if not dry_run:
        stops = " ".join(shlex.quote(f"{run_dir}/STOP") for run_dir in run_dirs)
        terminal.next_step(f"hpctrain status {shlex.quote(run)}    (remove {stops} to go on)")
