from __future__ import annotations

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common


@click.command()
@click.argument("target", nargs=-1, type=click.Path(), metavar="[RUN_OR_LOG]...")
@click.option(
    "-f", "--follow", is_flag=True, help="Go on looking; end when the run does or a rule turns RED."
)
@click.option(
    "--threshold", "thresholds", multiple=True, metavar="NAME=VALUE", help="Judge by another limit."
)
@common.as_json
def command(
    target: tuple[str, ...], follow: bool, thresholds: tuple[str, ...], as_json: bool
) -> None:
    """Say what the logs of a run tell: GREEN, RED or NOT OBSERVED per rule, the causing line, and
    what to do next.

    A target is a run directory, a run's name, a job id, or any log files, whoever wrote them; none
    means the runs here. Exits 0 when GREEN, 1 when RED, 8 when there is nothing to judge yet.

    \b
    hpctrain triage runs/ft_latest_7
    hpctrain triage slurm-1234567.out --threshold loss_drop=0.05
    hpctrain triage -f 1234567
    """
    from hpctrain.runs.diagnose import open_target, watch
    from hpctrain.runs.diagnosis import as_fields, diagnose, show
    from hpctrain.triage.thresholds import parse_thresholds

    subject = open_target(target, parse_thresholds(thresholds))
    diagnosis = watch(subject, terminal.info) if follow else diagnose(subject)
    if as_json:
        terminal.data_json(**as_fields(subject, diagnosis))
    else:
        show(subject, diagnosis)
    codes = {"GREEN": errors.DONE, "RED": errors.NO, "NOT OBSERVED": errors.PENDING}
    raise click.exceptions.Exit(codes[diagnosis.verdict])
