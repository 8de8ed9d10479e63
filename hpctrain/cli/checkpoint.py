"""`hpctrain checkpoint`: the checkpoint folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import Any

import click

from hpctrain.base import errors, terminal
from hpctrain.base.units import format_size
from hpctrain.cli import common
from hpctrain.jobs import checkpoints
from hpctrain.runtime.layout import COMPLETE, Expected, Verdict
from hpctrain.runtime.layouts import LAYOUTS

_target = click.argument("target", default="run.yaml", type=click.Path(), metavar="[RUN|FOLDER]")
_layout = click.option(
    "--layout", type=click.Choice(sorted(LAYOUTS)), help="The layout, for a plain folder."
)


def _ranks(function: Callable[..., Any]) -> Callable[..., Any]:
    for option, key, text in (
        ("--zero", "zero_stage", "ZeRO stage"),
        ("--dp", "data_parallel", "Data-parallel ranks"),
        ("--pp", "pipeline_parallel", "Pipeline stages"),
        ("--tp", "tensor_parallel", "Tensor-parallel ranks"),
    ):
        function = click.option(option, key, type=click.IntRange(0), help=f"{text} it must have.")(
            function
        )
    return function


@click.group()
def command() -> None:
    """Show, verify and choose checkpoints; RUN is a run directory or a run.yaml, FOLDER a plain
    checkpoint folder.

    \b
    hpctrain checkpoint list runs/ft
    hpctrain checkpoint verify /scratch/me/base/global_step423858
    hpctrain checkpoint use runs/ft --back 1
    """


@command.command("list")
@_target
@_layout
@click.option("--names-only", is_flag=True, help="Do not look into the checkpoints.")
@common.as_json
def list_(target: str, layout: str | None, names_only: bool, as_json: bool) -> None:
    """List the checkpoints of a folder, whether each is complete, and which one the next link
    starts from.

    \b
    hpctrain checkpoint list runs/ft
    hpctrain checkpoint list /scratch/me/ckpt --layout hf-trainer --json
    """
    settings = checkpoints.settings_of(target, layout)
    contents = checkpoints.list_checkpoints(settings, verify=not names_only)
    survey = contents.survey
    if as_json:
        terminal.data_json(
            folder=survey.folder,
            layout=settings.layout,
            tracker=survey.named,
            checkpoints=[checkpoints.as_json(row) for row in contents.rows],
            aside=sorted(contents.asides),
            refusal=contents.refusal or None,
        )
        return
    terminal.table(
        [_row(row, survey.layout.tracker) for row in contents.rows],
        header=("checkpoint", "kind", "size", "state", "named by"),
    )
    if contents.asides:
        names = ", ".join(sorted(contents.asides))
        terminal.info(
            f"set aside in {survey.place}: {names} (`hpctrain checkpoint use --to NAME` brings one"
            " back)"
        )
    if contents.refusal:
        terminal.problems(
            [errors.Problem(contents.refusal, why="no link would start", level="warning")]
        )


def _row(row: checkpoints.Row, tracker: str | None) -> list[str]:
    verdict = row.verdict
    marks = [word for word, there in ((tracker or "", row.named), ("next", row.chosen)) if there]
    size = format_size(verdict.num_bytes) if verdict and verdict.num_files else ""
    state = "not looked at"
    if verdict:
        state = "complete" if verdict.state == COMPLETE else f"{verdict.state}: {verdict.reason}"
    return [row.name, row.kind, size, state, ", ".join(marks)]


@command.command()
@click.argument("targets", nargs=-1, type=click.Path(), metavar="[RUN|FOLDER|CHECKPOINT]...")
@_layout
@_ranks
@common.as_json
def verify(
    targets: tuple[str, ...], layout: str | None, as_json: bool, **ranks: int | None
) -> None:
    """Check that checkpoints are complete: every shard there, none cut short; exits with 1 when one
    is not.

    \b
    hpctrain checkpoint verify                            the checkpoints of ./run.yaml
    hpctrain checkpoint verify base/global_step423858 --tp 8
    """
    expected = Expected(**ranks)
    wanted = targets or ("run.yaml",)
    found = [pair for target in wanted for pair in checkpoints.verify(target, layout, expected)]
    # Ranks asked for here must be there; those of a run's plan may differ, where the optimizer's
    # state can be laid out anew.
    asked = any(number is not None for number in ranks.values())
    bad = [path for path, verdict in found if _is_bad(verdict, asked)]
    if as_json:
        rows = [
            {
                "path": path,
                "complete": verdict.state == COMPLETE,
                **checkpoints.verdict_json(verdict),
            }
            for path, verdict in found
        ]
        terminal.data_json(checkpoints=rows)
    for path, verdict in found if not as_json else ():
        what = f" ({verdict.form})" if verdict.form else ""
        size = format_size(verdict.num_bytes)
        terminal.data(f"{path}: {verdict.state}{what}, {verdict.num_files} files, {size}")
        for line in verdict.faults + verdict.mismatches:
            terminal.data(f"  {line}")
    if not found:
        shown = ", ".join(f"`{target}`" for target in wanted)
        hint = "`hpctrain checkpoint verify FOLDER` takes a checkpoint or a folder of them"
        terminal.problems([errors.Problem(f"there is no checkpoint in {shown}", hint=hint)])
    raise click.exceptions.Exit(errors.NO if bad or not found else errors.DONE)


def _is_bad(verdict: Verdict, asked: bool) -> bool:
    return (
        verdict.state != COMPLETE or bool(verdict.refusals) or (asked and bool(verdict.mismatches))
    )


@command.command()
@_target
@_layout
@click.option(
    "--start",
    type=click.Path(),
    help="The checkpoint to start from [default: the run's `checkpoint.start`].",
)
@_ranks
@common.dry_run
def bootstrap(
    target: str, layout: str | None, start: str | None, dry_run: bool, **ranks: int | None
) -> None:
    """Bring the start checkpoint into the checkpoint folder: a relative link, and the file that
    names it.

    The start is verified first and never written to. `hpctrain chain` does the same by itself.

    \b
    hpctrain checkpoint bootstrap my-run/run.yaml
    hpctrain checkpoint bootstrap /scratch/me/ckpt --layout deepspeed --start /scratch/me/_global_step423858
    """
    settings = checkpoints.settings_of(target, layout, start, Expected(**ranks))
    plan = checkpoints.bootstrap(settings, dry_run, Expected(**ranks))
    for note in plan.notes:
        terminal.info(note)
    terminal.info(f"the start is complete: {plan.num_files} files, {format_size(plan.num_bytes)}")
    if plan.link:
        done = "would link" if dry_run else "linked"
        state = f"{done} to {plan.target}" if plan.target else "is there"
        terminal.info(f"{os.path.join(plan.folder, plan.link)} {state}; `{plan.tracker}` names it")
    if not dry_run:
        terminal.next_step(f"hpctrain checkpoint list {shlex.quote(target)}")


@command.command()
@_target
@_layout
@click.option("--to", metavar="NAME", help="A checkpoint's name or number, or `start`.")
@click.option(
    "--back", type=click.IntRange(1), metavar="N", help="Go back by N complete checkpoints."
)
@common.dry_run
@common.as_json
def use(
    target: str, layout: str | None, to: str | None, back: int | None, dry_run: bool, as_json: bool
) -> None:
    """Go back: let the next link start from an earlier checkpoint; newer ones are renamed, never
    deleted.

    \b
    hpctrain checkpoint use runs/ft --back 1
    hpctrain checkpoint use runs/ft --to global_step400
    """
    if (to is None) == (back is None):
        raise errors.UsageError("say where to go back to: --to NAME or --back N")
    settings = checkpoints.settings_of(target, layout)
    plan = checkpoints.plan_use(settings, to, back)
    moved = [] if dry_run else checkpoints.do_use(settings, plan)
    if as_json:
        planned = [{"name": name, "to": kind + name} for name, kind in plan.asides]
        terminal.data_json(
            folder=plan.folder,
            checkpoint=plan.name,
            kind=plan.kind,
            done=not dry_run,
            aside=[{"name": name, "to": path} for name, path in moved] or planned,
        )
        return
    word = "would" if dry_run else "will"
    terminal.info(f"the next link {word} start from `{plan.name}`")
    if plan.kind != "made":
        terminal.info("that is the start checkpoint: the optimizer's state begins anew")
    if plan.brought_from:
        verb = "would come" if dry_run else "came"
        terminal.info(f"`{plan.name}` {verb} back from {plan.brought_from}")
    for name, kind in plan.asides if dry_run else ():
        terminal.info(f"`{name}` would be set aside as {os.path.join(plan.place, kind + name)}")
    for name, path in moved:
        terminal.info(f"`{name}` is now `{path}`")
