"""Arguments and options that several verbs share, so that the same flag means the same
everywhere."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from hpctrain.base import terminal
from hpctrain.base.errors import NO, Refused

if TYPE_CHECKING:  # not at run time: `--help` of a verb needs none of it
    from hpctrain.plan.gate import Checked
    from hpctrain.plan.load import Loaded

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

run_yaml = click.argument("run_yaml", default="run.yaml", type=click.Path(), metavar="[RUN_YAML]")
set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value, e.g. --set config.train_iters=500.",
)
out_dir = click.option(
    "-o",
    "--out",
    "out_dir",
    type=click.Path(),
    help="The run directory [default: runs/<name> beside run.yaml].",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
dry_run = click.option("--dry-run", is_flag=True, help="Do everything but the one effect.")
force = click.option("--force", is_flag=True, help="Replace what an earlier render wrote.")
no_check = click.option(
    "--no-check", is_flag=True, help="Go on although `check` finds errors; the ledger keeps them."
)
yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def typed(verb: str, *wanted: str) -> str:
    """`hpctrain VERB` with the arguments and options that were typed for this one, shell-quoted.

    Only those named in `wanted`; without it all but --dry-run and --json, which asked for less than
    the command does.
    """
    context = click.get_current_context()
    words = ["hpctrain", verb]
    for param in context.command.params:
        name = str(param.name)
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if not given or (name not in wanted if wanted else name in ("dry_run", "as_json")):
            continue
        value = context.params[name]
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(param, click.Argument):
            words += map(str, values)
        elif isinstance(param, click.Option) and param.is_flag:
            words.append((param.opts if value else param.secondary_opts)[-1])
        else:
            words += [word for each in values for word in (param.opts[-1], str(each))]
    return shlex.join(words)


def ask(question: str) -> None:
    """Ask a person. Raises Refused when there is none to ask, or the answer is no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Refused(
            question.rstrip("?") + ": not without being asked",
            hint="add --yes, or look with --dry-run first",
        )
    if not click.confirm(question, err=True):
        raise Refused("nothing was submitted")


def exit_if(no: object, code: int = NO) -> None:
    """End the verb with `code` where the answer is no."""
    if no:
        raise click.exceptions.Exit(code)


def require_sound(runs: Sequence[Loaded], no_check: bool) -> Checked:
    """Check the runs and say what there is to remark. Raises UsageError, or Refused, where `check`
    finds errors."""
    from hpctrain.plan import gate

    checked = gate.require_sound(runs, no_check)
    terminal.problems(checked.remarks)
    return checked
