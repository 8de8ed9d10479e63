from __future__ import annotations

import click

from hpctrain.base import terminal


@click.command()
@click.argument("kind", type=click.Choice(["run", "pipeline", "site"]))
def command(kind: str) -> None:
    """Print the JSON Schema of run.yaml, of a pipeline.yaml or of a site profile, for editors that
    complete YAML.

    \b
    hpctrain schema run > .hpctrain/run.schema.json
    # first line of run.yaml, for the YAML language server:
    # yaml-language-server: $schema=.hpctrain/run.schema.json
    """
    from hpctrain.config.json_schema import schema_text

    terminal.data(schema_text(kind).rstrip("\n"))
