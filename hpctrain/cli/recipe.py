from __future__ import annotations

import click

from hpctrain.base import terminal
from hpctrain.cli import common, complete


@click.group()
def command() -> None:
    """Recipes: what trains, and what each wants to know.

    \b
    hpctrain recipe list
    hpctrain recipe show command
    """


@command.command("list")
@common.as_json
def list_(as_json: bool) -> None:
    """List every recipe with the layer it comes from."""
    from hpctrain.config.recipe_show import summaries

    found = summaries()
    if as_json:
        terminal.data_json(recipes=found)
        return
    terminal.table(
        [(r["name"], r["layer"], r["title"] or f"does not load: {r['problem']}") for r in found],
        ("recipe", "layer", "title"),
    )
    terminal.next_step("hpctrain recipe show NAME")


@command.command()
@click.argument("name", shell_complete=complete.recipes)
@common.as_json
def show(name: str, as_json: bool) -> None:
    """Show what the recipe NAME does and every option it has."""
    from hpctrain.config.recipe_show import describe

    found = describe(name)
    if as_json:
        terminal.data_json(recipe=found)
        return
    for key in ("name", "title", "tasks", "signal", "proven", "path"):
        terminal.info(f"{key}: {found[key]}")
    rows = [(o["name"], o["kind"], o["default_text"], o["doc"]) for o in found["options"]]
    terminal.table(rows, ("recipe_options", "type", "default", "meaning"))
    terminal.next_step(f"hpctrain init my-run --recipe {name} --site SITE")
