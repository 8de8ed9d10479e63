from __future__ import annotations

import os

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common


@click.command()
@click.argument("run_yaml", required=False, metavar="[RUN_YAML]")
@common.set_option
@click.option(
    "--python",
    "python_path",
    metavar="PATH",
    help="The Python to examine [default: the run's, or this one].",
)
@click.option("--site", help="Without a run.yaml: compare Slurm here with this profile.")
@click.option(
    "-r",
    "--requirements",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Pins to hold against the recipe's and what is installed.",
)
@common.as_json
def command(
    run_yaml: str | None,
    assignments: tuple[str, ...],
    python_path: str | None,
    site: str | None,
    requirements: tuple[str, ...],
    as_json: bool,
) -> None:
    """Examine this environment: Python, packages against the recipe's pins, disks, caches, secrets,
    Slurm; gives a score.

    The run's own Python is asked, inside its container where it has one. Exits 1 when something
    must be changed.

    \b
    hpctrain doctor
    hpctrain doctor run.yaml -r requirements.txt
    hpctrain doctor --site lumi --json
    """
    from hpctrain.sites.doctor.examine import examine_here, examine_run

    if run_yaml is None and os.path.isfile("run.yaml") and not site:
        run_yaml = "run.yaml"
    if run_yaml:
        from hpctrain.plan.load import load_plan

        loaded = load_plan(run_yaml, assignments)
        if loaded.plan.errors:
            raise errors.UsageError(loaded.plan.errors)
        found = examine_run(loaded.plan, python_path, requirements)
    else:
        found = examine_here(site, python_path, requirements)
    if as_json:
        terminal.data_json(**found.as_json())
    else:
        colours = {"ok": "green", "problem": "red", "warning": "yellow"}
        terminal.table(
            [
                (
                    f.area,
                    f.name,
                    (
                        terminal.paint(f.result, colours[f.result])
                        if f.result in colours
                        else f.result
                    ),
                    f.what,
                    f.hint,
                )
                for f in found.findings
            ],
            ("area", "check", "result", "what was seen", "what to do"),
        )
        terminal.info(
            f"score: {found.score} %" if found.score is not None else "score: nothing could be seen"
        )
    common.exit_if(not found.healthy)
