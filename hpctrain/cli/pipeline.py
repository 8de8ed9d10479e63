from __future__ import annotations

import os
import shlex

import click

from hpctrain.base import terminal
from hpctrain.cli import common


@click.command()
@click.argument(
    "pipeline_yaml", default="pipeline.yaml", type=click.Path(), metavar="[PIPELINE_YAML]"
)
@click.option(
    "--stage",
    "stages",
    multiple=True,
    metavar="STAGE",
    help="Queue links of this stage only; may be repeated.",
)
@click.option(
    "-o",
    "--out",
    "out_dir",
    type=click.Path(),
    help="The folder of its run directories [default: runs/<name> beside it].",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="STAGE.KEY=VALUE",
    help="Override a value of a stage's run.",
)
@common.force
@common.no_check
@common.dry_run
@common.yes
@common.as_json
def command(
    pipeline_yaml: str,
    stages: tuple[str, ...],
    out_dir: str | None,
    assignments: tuple[str, ...],
    force: bool,
    no_check: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Check and queue every stage of a pipeline at once; each stage starts from what the one before
    it hands over.

    Running it again submits only what is missing, at any stage. See docs/pipelines.md.

    \b
    hpctrain pipeline --dry-run
    hpctrain pipeline gad/pipeline.yaml --yes
    hpctrain pipeline --stage adversarial --set adversarial.config.lr=1.0e-6
    """
    from hpctrain.jobs import chain
    from hpctrain.jobs.pipeline import queue
    from hpctrain.jobs.pipeline import stages as planning

    pipeline = planning.load_pipeline(pipeline_yaml, assignments, out_dir)
    queue.check_names(pipeline, stages)
    checked = common.require_sound([stage.loaded for stage in pipeline.stages], no_check)
    terminal.lines(queue.prepare(pipeline, force, dry_run))
    found = queue.plan_queue(pipeline, stages)
    hours, unit = queue.hours(found)
    ids: dict[str, dict[int, str]] = {}
    if not dry_run:
        if chain.ask_needed(hours) and not yes:
            common.ask(
                f"Submit {sum(len(stage.new) for stage in found)} links for up to {hours:.0f}"
                f" {unit}?"
            )
        ids = queue.submit_queue(pipeline, found, checked.waived)
    rows = queue.rows(found, ids)
    if as_json:
        terminal.data_json(
            pipeline=pipeline.spec.name,
            folder=pipeline.folder,
            submitted=not dry_run,
            hours=hours,
            unit=unit,
            stages=rows,
        )
    else:
        terminal.table(
            [
                (
                    r["stage"],
                    r["state"],
                    r["from"] or "",
                    r["hand_over"] or "",
                    len(r["links"]),
                    " ".join(r["new_jobs"]) or len(r["new"]),
                    r["expected"],
                )
                for r in rows
            ],
            header=("stage", "state", "from", "gets", "links", "new", "begins as"),
        )
    terminal.info(f"{sum(len(stage.new) for stage in found)} new links: at most {hours:.1f} {unit}")
    where = shlex.quote(os.path.relpath(pipeline.folder))
    terminal.next_step(common.typed("pipeline") if dry_run else f"hpctrain status {where}")
