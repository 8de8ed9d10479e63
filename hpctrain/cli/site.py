from __future__ import annotations

import os
import sys

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common, complete


@click.group()
def command() -> None:
    """Site profiles: what hpctrain knows about a machine, as data.

    \b
    hpctrain site list
    hpctrain site show lumi --blame
    hpctrain site new mycluster --from-scontrol partitions.txt --from-scontrol nodes.txt
    """


@command.command("list")
@common.as_json
def list_(as_json: bool) -> None:
    """List every profile with its layer and when it was verified."""
    from hpctrain.sites.show import summaries

    found = summaries()
    if as_json:
        terminal.data_json(
            sites=[{**vars(item), "maintainers": list(item.maintainers)} for item in found]
        )
        return
    rows = [
        (
            item.name,
            item.layer,
            item.verified,
            ", ".join(item.maintainers) or "nobody",
            item.title or f"does not load: {item.problem}",
        )
        for item in found
    ]
    terminal.table(rows, ("site", "layer", "verified", "maintainers", "title"))
    terminal.next_step("hpctrain site show NAME")


@command.command()
@click.argument("name", shell_complete=complete.sites)
@click.option("--blame", is_flag=True, help="Show where each value was written.")
@common.as_json
def show(name: str, blame: bool, as_json: bool) -> None:
    """Show the effective profile NAME (or the one at a path), all its layers merged.

    \b
    hpctrain site show lumi --blame
    """
    from hpctrain.config.site import load_site
    from hpctrain.sites import show as site_report

    site = load_site(name)
    rows = site_report.blame(site) if blame else []
    if as_json:
        origins = {dotted: origin for dotted, _, origin in rows}
        terminal.data_json(
            site=site.values, files=list(site.files), **({"origins": origins} if blame else {})
        )
    elif blame:
        terminal.table(
            [(origin, dotted, site_report.value_text(value)) for dotted, value, origin in rows],
            ("from", "name", "value"),
        )
    else:
        from hpctrain.plan.load import site_yaml

        terminal.data(site_yaml(site).rstrip("\n"))


@command.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete.sites)
@common.as_json
def check(names: tuple[str, ...], as_json: bool) -> None:
    """Find every problem of profiles, of all when none is named. Exits 2 when one has errors.

    \b
    hpctrain site check lumi
    """
    import datetime

    from hpctrain.sites.show import check_profiles

    found = check_profiles(names, datetime.date.today())
    bad = any(problem.level == "error" for problems in found.values() for problem in problems)
    if as_json:
        terminal.data_json(
            ok=not bad,
            sites={name: [p.as_json() for p in problems] for name, problems in found.items()},
        )
    else:
        for name, problems in found.items():
            terminal.problems(problems)
            terminal.info(f"{name}: {terminal.tally(problems)}")
    common.exit_if(bad, errors.USAGE)


@command.command()
@click.argument("name")
@click.option(
    "--from-scontrol",
    "files",
    multiple=True,
    type=click.Path(allow_dash=True),
    metavar="FILE",
    help=(
        "Output of scontrol show partition, node or config, or of sinfo; may be repeated [default:"
        " ask Slurm here]."
    ),
)
@click.option(
    "--user",
    "for_user",
    is_flag=True,
    help="Into your own config folder instead of .hpctrain here.",
)
@click.option("--dry-run", is_flag=True, help="Print the profile instead of writing it.")
def new(name: str, files: tuple[str, ...], for_user: bool, dry_run: bool) -> None:
    """Draft a profile from what Slurm says of itself; every value in it is for you to check.

    \b
    hpctrain site new mycluster
    scontrol show node | hpctrain site new mycluster --from-scontrol - --dry-run
    """
    from hpctrain.base.files import write_new
    from hpctrain.base.paths import own_dir
    from hpctrain.sites.draft import draft_from_files, draft_from_slurm

    text, notes = (
        draft_from_files(name, files, sys.stdin.buffer) if files else draft_from_slurm(name)
    )
    terminal.problems(notes)
    if dry_run:
        terminal.data(text.rstrip("\n"))
        return
    path = os.path.join(own_dir("site_profiles", for_user), name, "profile.yaml")
    write_new(path, text, hint="edit that one, or delete it first")
    terminal.info(f"wrote {path}: look for `TODO: check`")
    terminal.next_step(f"hpctrain site check {name}")
