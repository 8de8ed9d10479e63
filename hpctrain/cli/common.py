"""Arguments and options that several verbs share, so that the same flag means the same everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hpctrain import output
from hpctrain.errors import Refused, UsageError

if TYPE_CHECKING:
    from hpctrain.plan import Plan  # not at run time: `--help` of a verb needs none of it

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
    "-o", "--out", "out_dir", type=click.Path(), help="The run directory [default: runs/<name> beside run.yaml]."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
dry_run = click.option("--dry-run", is_flag=True, help="Do everything but the one effect.")
force = click.option("--force", is_flag=True, help="Replace what an earlier render wrote.")
yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


def ask(question: str) -> None:
    """Ask a person. Raises Refused when there is none to ask, or the answer is no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Refused(
            question.rstrip("?") + ": not without being asked", hint="add --yes, or look with --dry-run first"
        )
    if not click.confirm(question, err=True):
        raise Refused("nothing was submitted")


def require_valid(plan: Plan) -> None:
    """Say the plan's warnings; raise UsageError with all its problems when it has errors."""
    if plan.errors:
        raise UsageError(plan.problems)
    output.problems(plan.problems)
