from __future__ import annotations

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common


@click.command()
@common.run_yaml
@common.out_dir
@common.set_option
@common.as_json
def command(
    run_yaml: str, out_dir: str | None, assignments: tuple[str, ...], as_json: bool
) -> None:
    """Find every problem of a run, or of every stage of a pipeline.yaml, at once, without any
    effect.

    Exits 0 without errors, 1 when the machine or Slurm would refuse the run, 2 when run.yaml itself
    is not valid.

    \b
    hpctrain check
    hpctrain check my.yaml --set nodes=64 --json
    """
    from hpctrain.config.pipeline import is_pipeline
    from hpctrain.jobs.pipeline.stages import load_pipeline
    from hpctrain.plan.check import find_problems, problems_between
    from hpctrain.plan.load import load_plan

    stages = is_pipeline(run_yaml)
    try:
        if stages:
            runs = [stage.loaded for stage in load_pipeline(run_yaml, assignments, out_dir).stages]
        else:
            runs = [load_plan(run_yaml, assignments, out_dir)]
        each = [problem for loaded in runs for problem in find_problems(loaded)]
        found = list(dict.fromkeys([*problems_between(runs), *each]))
        invalid = any(loaded.plan.errors for loaded in runs)
    except errors.UsageError as error:
        found, invalid = list(error.problems), True
    bad = [problem for problem in found if problem.level == "error"]
    if as_json:
        terminal.data_json(ok=not bad, problems=[problem.as_json() for problem in found])
    else:
        terminal.problems(found)
        terminal.info(terminal.tally(found))
        if not bad and stages:
            terminal.next_step(common.typed("pipeline"))
        elif not bad:
            terminal.next_step(common.typed("render"))
    common.exit_if(bad, errors.USAGE if invalid else errors.NO)
