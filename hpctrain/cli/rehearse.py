from __future__ import annotations

import contextlib
import shlex
from typing import Any

import click

from hpctrain.base import terminal
from hpctrain.cli import common


@click.command()
@common.run_yaml
@click.option(
    "--nodes",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Rehearse with so many nodes [default: the run's].",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 100),
    metavar="N",
    help="Links to queue [default: 1; with faults, the run's chain].",
)
@click.option(
    "--faults",
    metavar="F,F,…",
    help=(
        "What goes wrong in the 1st, 2nd, … start of the step: timeout, node_fail, kill_mid_save,"
        " none; of a pipeline, of one stage: STAGE:F,F."
    ),
)
@click.option(
    "--account-exists",
    "accounts",
    multiple=True,
    metavar="NAME",
    help="An account that exists there [default: the run's]; may be repeated.",
)
@click.option(
    "--accounting/--no-accounting",
    default=True,
    show_default=True,
    help="With accounts and limits on submitted jobs.",
)
@click.option(
    "--no-check",
    is_flag=True,
    help="Submit also what hpctrain itself would refuse, and hear what Slurm says.",
)
@click.option(
    "--job",
    "job_script",
    type=click.Path(),
    metavar="FILE",
    help="Run this job script, for example one edited by hand.",
)
@click.option(
    "--limits-only",
    is_flag=True,
    help="Only submit, to hear what the site's limits refuse: seconds, for any number of nodes.",
)
@click.option(
    "--speed",
    type=click.FloatRange(min=1),
    metavar="X",
    help="Seconds of the site in one second here [default: a link in about 4 s].",
)
@click.option(
    "--picture", type=click.Path(), metavar="FILE.svg", help="Write the timeline as an SVG picture."
)
@click.option(
    "--keep", is_flag=True, help="Leave the sandbox running and everything it wrote in place."
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(),
    default="",
    help="Where to build it [default: hpctrain's state directory].",
)
@common.out_dir
@common.set_option
@common.as_json
def command(
    run_yaml: str, out_dir: str | None, assignments: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Run the very job against a real Slurm shaped like its site, on this machine, before a
    GPU-hour is spent.

    Every task is started; the training program is replaced by a stand-in that saves in the recipe's
    layout, in compressed time. Exits 0 when all is right, 1 when something would have gone wrong at
    the site. Of a pipeline all stages are queued with their dependencies, and hand on what they
    made. `hpctrain tokenize --rehearse` plays the array of a tokenization.

    \b
    hpctrain rehearse --nodes 4
    hpctrain rehearse my-run/run.yaml --faults timeout,node_fail --picture chain.svg
    hpctrain rehearse pipeline.yaml --faults warmup:node_fail
    hpctrain rehearse --nodes 1024 --limits-only
    hpctrain rehearse --job runs/my-run/job.sbatch --no-check
    """
    from hpctrain.base.files import write_new
    from hpctrain.sandbox.rehearse import report

    wishes = report.Wishes(**options)
    wanted = report.prepare(run_yaml, assignments, out_dir, wishes)
    outcomes = _play(wanted)
    found = report.all_bars(wanted, outcomes)
    if wishes.picture:
        write_new(wishes.picture, report.picture(wanted, found))
    if as_json:
        terminal.data_json(**report.as_json(wanted, outcomes, found))
    else:
        terminal.data("\n".join(report.lines(wanted, outcomes, found)))
    for outcome in outcomes:
        terminal.problems(outcome.problems)
    for plan, outcome in zip(wanted.plans, outcomes):
        terminal.lines(report.notes(plan, outcome))
    ok = all(outcome.ok for outcome in outcomes)
    name = "" if run_yaml == "run.yaml" else " " + shlex.quote(run_yaml)
    verb = "pipeline" if wanted.pipeline else "chain"
    terminal.next_step(f"hpctrain {verb if ok else 'rehearse'}{name}")
    common.exit_if(not ok)


def _play(wanted: Any) -> Any:
    import os

    from hpctrain.sandbox.rehearse.play import rehearse, rehearse_pipeline

    with contextlib.closing(terminal.Stages()) as meter:
        if wanted.pipeline:
            return rehearse_pipeline(wanted.pipeline, wanted.requests, os.environ, meter.update)
        return [rehearse(wanted.loaded, wanted.requests[""], os.environ, meter.update)]
