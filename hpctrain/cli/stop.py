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

    run_dirs = chain.find_chains(run)
    running = [job for run_dir in run_dirs for job in chain.stop(run_dir, dry_run)]
    would = "would end" if dry_run else "end"
    for job in running:
        terminal.info(
            f"job {job.job_id} runs: it {would} after its next checkpoint where its step can, else"
            " at its own end"
        )
    terminal.info(f"links that wait {would} as they start")
    if not dry_run:
        stops = " ".join(shlex.quote(f"{run_dir}/STOP") for run_dir in run_dirs)
        terminal.next_step(f"hpctrain status {shlex.quote(run)}    (remove {stops} to go on)")
