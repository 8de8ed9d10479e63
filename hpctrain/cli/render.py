from __future__ import annotations

import os

import click

from hpctrain.base import terminal
from hpctrain.cli import common


@click.command()
@common.run_yaml
@common.out_dir
@common.set_option
@common.force
@common.no_check
@common.dry_run
def command(
    run_yaml: str,
    out_dir: str | None,
    assignments: tuple[str, ...],
    force: bool,
    no_check: bool,
    dry_run: bool,
) -> None:
    """Check the run and write its run directory; stdout is the path of job.sbatch and nothing
    else.

    \b
    sbatch "$(hpctrain render)"
    hpctrain render my.yaml --set nodes=2 -o runs/small
    """
    from hpctrain.plan.load import load_plan
    from hpctrain.plan.run_dir import run_files, write_run_dir

    loaded = load_plan(run_yaml, assignments, out_dir)
    checked = common.require_sound([loaded], no_check)
    files = run_files(loaded)
    job = os.path.join(loaded.plan.run_dir, "job.sbatch")
    if dry_run:
        terminal.info(f"would write {len(files)} files to {loaded.plan.run_dir}")
    else:
        changed = write_run_dir(loaded.plan.run_dir, files, force)
        if checked.waived:
            from hpctrain.jobs.ledger import record_waived

            record_waived(loaded.plan.run_dir, checked.waived)
        terminal.info(f"{'wrote' if changed else 'unchanged:'} {loaded.plan.run_dir}")
    terminal.data(job)
