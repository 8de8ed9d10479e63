from __future__ import annotations

import contextlib
import os
import shlex

import click

from hpctrain.base import terminal
from hpctrain.cli import common, complete


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option(
    "--to",
    metavar="PATH",
    help="The folder there [default: that of the run's data, or the site's for data].",
)
@click.option(
    "--run",
    "run_yaml",
    type=click.Path(),
    metavar="RUN_YAML",
    help="The run [default: ./run.yaml when there is one].",
)
@click.option(
    "--site",
    "site_name",
    metavar="S",
    shell_complete=complete.sites,
    help="The site [default: the run's].",
)
@click.option(
    "--account", metavar="A", help="The account in the site's paths [default: the run's]."
)
@click.option("--user", metavar="U", help="Your user name there.")
@click.option("--host", metavar="H", help="The login host [default: the site's].")
@click.option("--key", metavar="FILE", type=click.Path(), help="The ssh key.")
@click.option(
    "--ssh",
    default="ssh",
    show_default=True,
    metavar="COMMAND",
    help="How to connect, e.g. 'ssh -J jump.example.org'.",
)
@click.option(
    "--force", is_flag=True, help="Replace files of other content that are there already."
)
@common.dry_run
def command(
    files: tuple[str, ...],
    to: str | None,
    run_yaml: str | None,
    site_name: str | None,
    account: str | None,
    user: str | None,
    host: str | None,
    key: str | None,
    ssh: str,
    force: bool,
    dry_run: bool,
) -> None:
    """Send files or folders to the site with rsync: resumable, and compared by checksum afterwards.

    \b
    hpctrain upload corpus.jsonl --site lumi --account project_465000000 --user me --key ~/.ssh/id
    hpctrain upload data/ --to /scratch/project_465000000/data
    """
    from hpctrain.sites import upload

    if run_yaml is None and os.path.lexists("run.yaml") and not site_name:
        run_yaml = "run.yaml"
    words = upload.ssh_words(ssh, key)
    target = upload.find_target(run_yaml, site_name, account, to, host, user)
    planned = upload.plan_upload(files, *target, words, force)
    terminal.info(upload.describe(planned))
    if dry_run:
        terminal.data("\n".join(upload.command_lines(planned)))
        return
    meter = terminal.Progress("upload", planned.num_bytes, "bytes")
    with contextlib.closing(meter) as progress:
        upload.run_upload(planned, progress.update)
    terminal.info(f"{upload.count_files(planned.num_files)} there, compared by checksum")
    first = os.path.basename(os.path.normpath(files[0]))
    terminal.next_step(f"name it in run.yaml: {shlex.quote(os.path.join(planned.folder, first))}")
