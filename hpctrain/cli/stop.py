from __future__ import annotations

import shlex

import click

from hpctrain import output
from hpctrain.cli import common


@click.command()
@click.argument("run", default="run.yaml", type=click.Path(), metavar="[RUN]")
@common.dry_run
def command(run: str, dry_run: bool) -> None:
    """End a chain after its next checkpoint; RUN is a run directory, a run.yaml, a run's name or a job id.

    \b
    hpctrain stop runs/ft
    hpctrain stop 1234567
    """
    from hpctrain import chain

    run_dir = chain.find_run(run)
    running = chain.stop(run_dir, dry_run)
    would = "would end" if dry_run else "end"
    for job in running:
        output.info(
            f"job {job.job_id} runs: it {would} after its next checkpoint where its step can, else at its own end"
        )
    output.info(f"links that wait {would} as they start")
    if not dry_run:
        output.next_step(f"hpctrain status {shlex.quote(run)}    (remove {shlex.quote(run_dir)}/STOP to go on)")
