from __future__ import annotations

import sys

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common


@click.command()
@common.run_yaml
@common.out_dir
@common.set_option
@click.option(
    "-v", "--verbose", is_flag=True, help="On a terminal too: values that only repeat a config."
)
@common.as_json
def command(
    run_yaml: str, out_dir: str | None, assignments: tuple[str, ...], verbose: bool, as_json: bool
) -> None:
    """Show every decided value with its reason and where it comes from, the arithmetic and the
    cost.

    \b
    hpctrain plan
    hpctrain plan --json | jq .cost
    """
    from hpctrain.plan.checkpoints import checkpoint_problems
    from hpctrain.plan.load import load_plan
    from hpctrain.plan.render import plan_json
    from hpctrain.runs.outlook import outlook

    loaded = load_plan(run_yaml, assignments, out_dir)
    plan = loaded.plan
    if as_json:
        fields = plan_json(plan, loaded.inputs)
        fields.pop("schema_version")
        terminal.data_json(ok=not plan.errors, **fields)
    else:
        shown = [d for d in plan.decisions if verbose or not (d.repeats and sys.stdout.isatty())]
        terminal.table(
            [(d.name, _short(d.value), d.reason, d.origin) for d in shown],
            ("value of", "is", "because", "from"),
        )
        if len(shown) < len(plan.decisions):
            left = len(plan.decisions) - len(shown)
            terminal.info(f"{left} values are as the base config says; -v shows them")
        measured = outlook(plan.run_dir, plan.resolved.cadence.iterations)
        if measured:
            terminal.info(measured)
        jobs = plan.spec.num_links
        cost = plan.cost
        terminal.info(
            f"one job: {cost.node_hours:,.1f} node-hours, {cost.gpu_hours:,.1f} GPU-hours as Slurm"
            " counts GPUs"
        )
        if cost.billed is not None:
            terminal.info(
                f"billed: {cost.billed:,.1f} {cost.unit}s a job, {cost.billed * jobs:,.1f} at most"
                f" for {jobs} jobs"
            )
        else:
            terminal.info(f"billed: unknown; {cost.formula}")
        terminal.problems([*plan.problems, *checkpoint_problems(plan)])
    common.exit_if(plan.errors, errors.USAGE)
    if not as_json:
        run = ("run_yaml", "assignments", "out_dir")
        terminal.next_step(f"{common.typed('check', *run)} && {common.typed('render', *run)}")


def _short(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 100 else text[:97] + "…"
