from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from hpctrain.base import terminal

_WHERE = {
    "bash": 'put  eval "$(hpctrain completion bash)"  into ~/.bashrc',
    "zsh": 'put  eval "$(hpctrain completion zsh)"  into ~/.zshrc, after compinit',
    "fish": "hpctrain completion fish > ~/.config/fish/completions/hpctrain.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(_WHERE)))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that makes Tab complete verbs, options, sites, recipes and partitions.

    \b
    eval "$(hpctrain completion bash)"
    """
    root = ctx.find_root()
    kind = get_completion_class(shell)
    assert kind is not None
    # The variable that click's `main` looks at for a program called hpctrain.
    script = kind(root.command, {}, "hpctrain", "_HPCTRAIN_COMPLETE")
    # Not script.source(): that starts a bash to ask for its version.
    terminal.data((script.source_template % script.source_vars()).strip("\n"))
    terminal.info(f"to keep it: {_WHERE[shell]}")
