from __future__ import annotations

import time

import click

from hpctrain.base import terminal
from hpctrain.cli import common


@click.command()
@click.argument("target", required=False, metavar="[RUN]")
@click.option(
    "-w", "--watch", is_flag=True, help="Show it again and again until nothing runs or waits."
)
@click.option(
    "--every",
    default=30.0,
    show_default=True,
    type=click.FloatRange(1),
    help="Seconds between two looks.",
)
@click.option("--no-slurm", is_flag=True, help="From the run directory alone.")
@common.as_json
def command(target: str | None, watch: bool, every: float, no_slurm: bool, as_json: bool) -> None:
    """Show what a run is doing: every link, the progress, the time and links still needed.

    RUN is a run directory, a run.yaml, a pipeline (its name, folder or YAML), a run's name or a job
    id; none means all runs here. Exits 0 when done, 1 when one failed, gave up, or was never
    submitted, 8 while one runs or waits.

    \b
    hpctrain status
    hpctrain status runs/ft_latest_7 --watch
    hpctrain status 1234567 --json | jq .runs[0].progress
    """
    from hpctrain.runs.records import find_pipeline, find_runs
    from hpctrain.runs.status import observe
    from hpctrain.runs.status_table import exit_code, of_pipeline, show, show_pipeline

    while True:
        statuses = observe(find_runs(target), not no_slurm)
        folder = find_pipeline(target) if target else None
        pipeline = of_pipeline(folder, statuses) if folder else None
        if as_json:
            more = {"pipeline": pipeline} if pipeline else {}
            terminal.data_json(runs=[status.as_json() for status in statuses], **more)
        else:
            if watch:
                click.clear()
            show_pipeline(pipeline, statuses) if pipeline else show(statuses, time.time())
        if not watch or not any(status.live for status in statuses):
            break
        time.sleep(every)
    raise click.exceptions.Exit(exit_code(statuses))
