from __future__ import annotations

import os
import time

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common


@click.command()
@click.argument("target", default="run.yaml", metavar="[RUN_YAML|PIPELINE_YAML|RUN]")
@common.set_option
@click.option(
    "--jobs", type=click.IntRange(1), help="Of a chain of this many jobs instead of the run.yaml's."
)
@click.option("--array", type=click.IntRange(1), help="Also of an array of this many such jobs.")
@click.option(
    "--ladder",
    metavar="1,2,8",
    help="Also of a ladder with these numbers of GPUs, as `hpctrain ladder` plans it.",
)
@common.as_json
def command(
    target: str,
    assignments: tuple[str, ...],
    jobs: int | None,
    array: int | None,
    ladder: str | None,
    as_json: bool,
) -> None:
    """Show what a run will cost (a run.yaml), or has cost (a run directory, name or job id); of a
    pipeline both, stage by stage.

    Node-hours, GPU-hours as Slurm counts GPUs, and the site's billing units by its profile's
    formula.

    \b
    hpctrain cost run.yaml --jobs 5
    hpctrain cost run.yaml --ladder 1,2,8
    hpctrain cost runs/ft_latest_7 --json
    hpctrain cost pipeline.yaml --set warmup.chain.jobs=3
    """
    from hpctrain.jobs.ladder import parse_rungs, plan_rungs, total
    from hpctrain.jobs.pipeline import bills
    from hpctrain.runs import bills as run_bills
    from hpctrain.runs import cost
    from hpctrain.runs.records import find_runs, read_run

    priced = bills.read(target, assignments)
    if priced is not None:
        name, stages, left_of = priced
        if jobs or array or ladder:
            raise errors.UsageError(
                f"`{target}` is a pipeline, and --jobs, --array and --ladder are about one run",
                hint="name the run.yaml of a stage, or set its links: `--set STAGE.chain.jobs=5`",
            )
        if as_json:
            terminal.data_json(**bills.fields(name, stages, left_of))
        else:
            bills.show(stages, left_of)
        return
    if os.path.isfile(target) and target.endswith((".yaml", ".yml")):
        planned, found = run_bills.planned(target, assignments, jobs, array)
        if ladder:
            rungs = plan_rungs(target, assignments, parse_rungs(ladder))
            found += [*(rung.bill for rung in rungs), total(rungs)]
        left = run_bills.allocation(planned)
        if as_json:
            terminal.data_json(
                bills=[bill.as_json() for bill in found], allocation=vars(left) if left else None
            )
        else:
            run_bills.show_bills(found, left)
            terminal.next_step(
                "hpctrain chain" if planned.spec.num_links > 1 else "hpctrain render"
            )
        return
    from hpctrain.runs.live import ask

    (run,), answer = ask([read_run(find_runs(target)[0])])
    result = cost.spent(run, answer, time.time())
    if as_json:
        terminal.data_json(**run_bills.spent_fields(result))
    else:
        run_bills.show_spent(result)
