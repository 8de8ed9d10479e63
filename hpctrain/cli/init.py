from __future__ import annotations

import os
import shlex

import click

from hpctrain.base import terminal
from hpctrain.cli import complete


@click.command()
@click.argument("folder", default=".", type=click.Path(), metavar="[DIR]")
@click.option(
    "--recipe",
    "recipe_name",
    required=True,
    metavar="R",
    shell_complete=complete.recipes,
    help="What trains: see `hpctrain recipe list`.",
)
@click.option(
    "--site",
    "site_name",
    required=True,
    metavar="S",
    shell_complete=complete.sites,
    help="Where: see `hpctrain site list`, or a path to a profile.",
)
@click.option("--name", help="The run's name [default: the folder's].")
@click.option("--account", help="The Slurm account that pays.")
@click.option("--dry-run", is_flag=True, help="Print it instead of writing it.")
def command(
    folder: str,
    recipe_name: str,
    site_name: str,
    name: str | None,
    account: str | None,
    dry_run: bool,
) -> None:
    """Write a commented, valid run.yaml to start from; never replaces one.

    \b
    hpctrain init my-run --recipe command --site lumi --account project_465000000
    cd my-run && hpctrain check
    """
    from hpctrain.base.files import write_new
    from hpctrain.config.new_run import new_run
    from hpctrain.config.run import refuse_script

    if os.path.isfile(folder):
        refuse_script(folder)
    text = new_run(folder, recipe_name, site_name, name, account)
    path = os.path.join(folder, "run.yaml")
    if dry_run:
        terminal.data(text.rstrip("\n"))
        return
    write_new(path, text, hint="name another folder")
    terminal.info(f"wrote {path}")
    terminal.next_step("hpctrain check" if folder == "." else f"hpctrain check {shlex.quote(path)}")
