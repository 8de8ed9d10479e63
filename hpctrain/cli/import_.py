from __future__ import annotations

import os

import click

from hpctrain.base import terminal
from hpctrain.cli import complete


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option(
    "--site",
    "site_name",
    default="generic-cuda",
    show_default=True,
    metavar="S",
    shell_complete=complete.sites,
    help="Where it shall run: see `hpctrain site list`.",
)
@click.option("--dry-run", is_flag=True, help="Print it instead of writing it.")
def command(files: tuple[str, ...], site_name: str, dry_run: bool) -> None:
    """Read sbatch scripts into a run.yaml each, and tell what is wrong with them; nothing is run.

    Writes SCRIPT.run.yaml beside each script, and never replaces one. Every line that is not taken
    over is named with its reason; what is not understood becomes `setup:`.

    \b
    hpctrain import train.sbatch --site lumi
    hpctrain check train.run.yaml
    """
    from hpctrain.base.files import write_new
    from hpctrain.imports.read import read_script
    from hpctrain.imports.script import import_script
    from hpctrain.imports.text import run_text

    for path in files:
        name = os.path.splitext(os.path.basename(path))[0]
        found = import_script(read_script(path), name, site_name)
        text = run_text(found, os.path.basename(path))
        for line, what in sorted(found.faults):
            terminal.info(f"{path}:{line}: {what}")
        for line, what in sorted(found.left):
            terminal.info(f"{path}:{line}: left out: {what}")
        for remark in found.remarks:
            terminal.info(f"{path}: {remark}")
        if dry_run:
            terminal.data(text.rstrip("\n"))
            continue
        target = os.path.join(os.path.dirname(path), f"{name}.run.yaml")
        write_new(target, text, hint="move it away, or look with --dry-run")
        terminal.info(f"wrote {target}")
        terminal.next_step(f"hpctrain check {target}")
