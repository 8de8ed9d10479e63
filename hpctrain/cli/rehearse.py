from __future__ import annotations

import shlex
from typing import Any

import click

from hpctrain import errors, output
from hpctrain.cli import common


@click.command()
@common.run_yaml
@click.option(
    "--nodes", type=click.IntRange(1, 4096), metavar="N", help="Rehearse with so many nodes [default: the run's]."
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
    help="What goes wrong in the 1st, 2nd, … start of the step: timeout, node_fail, kill_mid_save, none.",
)
@click.option(
    "--account-exists",
    "accounts",
    multiple=True,
    metavar="NAME",
    help="An account that exists there [default: the run's]; may be repeated.",
)
@click.option(
    "--accounting/--no-accounting", default=True, show_default=True, help="With accounts and limits on submitted jobs."
)
@click.option(
    "--no-check", is_flag=True, help="Submit also what hpctrain itself would refuse, and hear what Slurm says."
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
@click.option("--picture", type=click.Path(), metavar="FILE.svg", help="Write the timeline as an SVG picture.")
@click.option("--keep", is_flag=True, help="Leave the sandbox running and everything it wrote in place.")
@click.option(
    "--dir", "directory", type=click.Path(), default="", help="Where to build it [default: hpctrain's state directory]."
)
@common.out_dir
@common.set_option
@common.as_json
def command(run_yaml: str, out_dir: str | None, assignments: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run the very job against a real Slurm shaped like its site, on this machine, before a GPU-hour is spent.

    Every task is started; the training program is replaced by a stand-in that saves in the recipe's layout, in compressed
    time. Exits 0 when all is right, 1 when something would have gone wrong at the site. Of a pipeline each stage is played
    by itself, as if the one before it were done. `hpctrain tokenize --rehearse` plays the array of a tokenization.

    \b
    hpctrain rehearse --nodes 4
    hpctrain rehearse my-run/run.yaml --faults timeout,node_fail --picture chain.svg
    hpctrain rehearse --nodes 1024 --limits-only
    hpctrain rehearse --job runs/my-run/job.sbatch --no-check
    """
    from hpctrain.newfile import write_new
    from hpctrain.rehearse import report

    wishes = report.Wishes(**options)
    played = []
    for loaded, request in report.prepare(run_yaml, assignments, out_dir, wishes):
        outcome = _play(loaded, request)
        found = report.bars_of(loaded.plan, outcome)
        if wishes.picture:
            write_new(wishes.picture, report.picture(loaded.plan, found))
        if not as_json:
            for line in report.lines(loaded.plan, outcome, found):
                output.data(line)
        output.problems(outcome.problems)
        for line in report.notes(loaded.plan, outcome):
            output.info(line)
        played.append((outcome.ok, report.as_json(loaded.plan, outcome, found)))
    ok = all(good for good, _ in played)
    is_pipeline = len(played) > 1
    if as_json:
        answers = [answer for _, answer in played]
        output.data_json(**({"ok": ok, "stages": answers} if is_pipeline else answers[0]))
    name = "" if run_yaml == "run.yaml" else " " + shlex.quote(run_yaml)
    output.next_step(f"hpctrain {('pipeline' if is_pipeline else 'chain') if ok else 'rehearse'}{name}")
    if not ok:
        raise click.exceptions.Exit(errors.NO)


def _play(loaded: Any, request: Any) -> Any:
    import os

    from hpctrain.rehearse.play import rehearse

    meter = output.Stages()
    try:
        return rehearse(loaded, request, os.environ, meter.update)
    finally:
        meter.close()
