from __future__ import annotations

import os

import click

from hpctrain.base import terminal
from hpctrain.cli import common, complete

_PROGRAM = "hpctrain.shell.program"


class _Command(click.Command):
    """Keeps the words after `--` apart; click would fill RUN_YAML with the first of them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.meta[_PROGRAM] = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)


@click.command(cls=_Command, options_metavar="[OPTIONS]")
@click.argument("run_yaml", required=False, type=click.Path(), metavar="[RUN_YAML] [-- CMD...]")
@click.option(
    "--site",
    "site_name",
    metavar="S",
    shell_complete=complete.sites,
    help="The site [default: the run's].",
)
@click.option(
    "--account", metavar="A", help="The Slurm account [default: the run's, or your config's]."
)
@click.option(
    "--container", metavar="C", type=click.Path(), help="The container image [default: the run's]."
)
@click.option(
    "--partition",
    metavar="P",
    shell_complete=complete.partitions,
    help="The partition [default: the site's for tests].",
)
@click.option("--gpus", type=click.IntRange(0, 64), help="GPUs [default: one where there are any].")
@click.option(
    "--cpus", type=click.IntRange(1, 4096), help="Cores [default: the share of those GPUs]."
)
@click.option("--time", "time", metavar="T", help="Wall time [default: 45 minutes].")
@common.dry_run
@click.pass_context
def command(
    ctx: click.Context,
    run_yaml: str | None,
    site_name: str | None,
    account: str | None,
    container: str | None,
    partition: str | None,
    gpus: int | None,
    cpus: int | None,
    time: str | None,
    dry_run: bool,
) -> None:
    """Open an interactive allocation in the site's container; with `-- CMD` run CMD there instead.

    Becomes srun, so that its exit code is the shell's. The environment is rid of SLURM_* and
    SBATCH_* first.

    \b
    hpctrain shell --site lumi --account project_465000000 --container image.sif
    hpctrain shell run.yaml --gpus 8 -- python -c 'import torch; print(torch.cuda.device_count())'
    """
    from hpctrain.sites import shell
    from hpctrain.slurm import commands as slurm

    if run_yaml is None and os.path.lexists("run.yaml"):
        run_yaml = "run.yaml"
    wanted = shell.Wanted(
        site_name, account, container, partition, gpus, cpus, time, ctx.meta.get(_PROGRAM, ())
    )
    site, spec = shell.read_request(run_yaml, wanted)
    plan = shell.allocation(site, spec, wanted)
    if dry_run:
        terminal.data(shell.command_line(plan, os.environ, slurm.scrubbed(os.environ)))
        return
    terminal.info(f"waiting for an allocation on {site.name} …")
    slurm.become(plan.argv, plan.unset)
