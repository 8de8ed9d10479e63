from __future__ import annotations

import os
import shlex

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common, complete


@click.group()
def command() -> None:
    """Templates of the job script: which there are, and a small child that changes blocks of one.

    \b
    hpctrain template list
    hpctrain template override command --block user_setup
    """


@command.command("list")
@common.as_json
def list_(as_json: bool) -> None:
    """List every template with the layer that wins and its blocks. Exits 1 when one is not
    valid."""
    from hpctrain.plan.overrides import list_templates

    found = list_templates()
    if as_json:
        terminal.data_json(templates=[vars(item) for item in found])
    else:
        rows = [
            (
                item.name,
                item.layer,
                ", ".join(item.shadows),
                item.problem and "not valid" or " ".join(item.blocks),
            )
            for item in found
        ]
        terminal.table(rows, ("template", "layer", "shadows", "blocks"))
    bad = [errors.Problem(item.problem) for item in found if item.problem]
    terminal.problems(bad)
    common.exit_if(bad)


@command.command()
@click.argument("name", shell_complete=complete.templates)
def show(name: str) -> None:
    """Print the template NAME, or the job script of the recipe NAME, as the winning layer has
    it."""
    from hpctrain.plan.overrides import find_template

    template = find_template(name)
    terminal.info(f"{template.layer}: {template.path}")
    with open(template.path, encoding="utf-8", errors="replace") as file:
        terminal.data(file.read().rstrip("\n"))


@command.command()
@click.argument("name", shell_complete=complete.templates)
@click.option(
    "--block",
    "blocks",
    multiple=True,
    metavar="NAME",
    help="A block to change; may be repeated [default: user_setup].",
)
@click.option(
    "--user",
    "for_user",
    is_flag=True,
    help="Into your own config folder instead of .hpctrain here.",
)
@common.dry_run
def override(name: str, blocks: tuple[str, ...], for_user: bool, dry_run: bool) -> None:
    """Write a small template that extends NAME (or the job script of the recipe NAME); never
    replaces one.

    \b
    hpctrain template override command --block user_setup
    """
    from hpctrain.base.files import write_new
    from hpctrain.base.paths import own_dir
    from hpctrain.plan.overrides import USER_BLOCK, child_text, find_template, shipped

    template = find_template(name)
    if not shipped(template):
        raise errors.Refused(
            f"`{template.name}` is a template of yours", where=template.path, hint="edit that file"
        )
    text = child_text(template, blocks or (USER_BLOCK,))
    path = os.path.join(own_dir("templates", for_user), template.name)
    if dry_run:
        terminal.info(f"would write {path}")
        terminal.data(text.rstrip("\n"))
        return
    write_new(path, text, hint="edit that one, or delete it first")
    terminal.info(f"wrote {path}")
    if template.layer in ("user", "project") and not (template.layer == "user" and for_user):
        terminal.info(
            f"note: {template.path} no longer counts"
            if not for_user
            else f"note: {template.path} still wins"
        )
    terminal.next_step(f"edit {shlex.quote(path)}, then `hpctrain render`")
