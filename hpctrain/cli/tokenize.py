"""`hpctrain tokenize`: JSONL dialogues to a Megatron/NeoX dataset."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common
from hpctrain.data.control import DEFAULT_EOD
from hpctrain.data.markers import ALLOWABLE
from hpctrain.data.sources import MAX_LINE_MIB


def _time(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    from hpctrain.base.units import parse_time_s

    try:
        return parse_time_s(value) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _choice(name: str, values: str, help: str) -> common.Decorator:
    """An option that takes one of a few words; the first is the default."""
    words = values.split()
    return click.option(
        name, type=click.Choice(words), default=words[0], show_default=True, help=help
    )


_help_allow = "Accept what is an error otherwise: " + "; ".join(
    f"{kind} ({what})" for kind, what in ALLOWABLE.items()
)


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(), metavar="INPUT...")
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(),
    metavar="MODEL",
    help="The SentencePiece .model file.",
)
@click.option(
    "--output-prefix",
    required=True,
    type=click.Path(),
    metavar="P",
    help="Writes P_text_document.bin and .idx.",
)
@click.option(
    "--tasks",
    default=1,
    show_default=True,
    help="Array tasks, or local processes; the result is the same.",
)
@click.option("--local", is_flag=True, help="Run on this machine, not in Slurm.")
@_choice(
    "--engine",
    "auto array local mpi",
    "How tasks run: a Slurm array where there is Slurm, else local; mpi inside srun or mpirun.",
)
@_choice(
    "--encoder",
    "auto fast sentencepiece",
    "auto takes the fast one where it proves itself exact for the model.",
)
@click.option(
    "--control-token",
    "control_tokens",
    multiple=True,
    metavar="MARKER=PIECE",
    help=(
        "A marker in the text and its piece in the model; may be repeated [default:"
        " <<<|user|>>>=<|user|> with id 7, <<<|assistant|>>>=<|assistant|> with id 8]."
    ),
)
@click.option(
    "--append-eod/--no-append-eod",
    default=True,
    show_default=True,
    help="End each document with EOD.",
)
@click.option(
    "--eod", "eod_piece", default=DEFAULT_EOD, show_default=True, help="The end-of-document piece."
)
@click.option(
    "--allow-user-defined", is_flag=True, help="Accept control pieces that are not control symbols."
)
@click.option(
    "--text-key", default="text", show_default=True, help="The key of the marked-up text."
)
@click.option(
    "--messages-key", default="messages", show_default=True, help="The key of chat messages."
)
@click.option(
    "--response-key",
    default="",
    help="A key holding the last reply of a chat (GAD: teacher_response).",
)
@_choice(
    "--system",
    "error prepend",
    "Chat system messages without a control token of their own: refuse, or put before the user's"
    " message.",
)
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(list(ALLOWABLE)),
    metavar="KIND",
    help=_help_allow + ".",
)
@_choice("--on-error", "fail skip", "Bad records: stop, or write them to P.rejects.jsonl.")
@click.option("--max-errors", default=0, show_default=True, help="How many records may be skipped.")
@click.option(
    "--max-line-mib",
    default=MAX_LINE_MIB,
    show_default=True,
    help="Longer lines are refused; a task's memory is up to 30 times as much.",
)
@_choice("--scan", "sample full none", "How much of the data is checked before tasks start.")
@click.option("--site", help="The site profile: its CPU partition, limits and container.")
@click.option("--partition", help="The partition [default: the site's CPU partition].")
@click.option("--account", help="The Slurm account.")
@click.option(
    "--time",
    "time_s",
    callback=_time,
    help="Time limit of a task [default: from the size of the data].",
)
@click.option(
    "--container",
    type=click.Path(),
    help="Image in which the tasks run, as the site's profile says.",
)
@click.option(
    "--processes", type=int, help="Local processes [default: --tasks, at most the cores]."
)
@click.option("--no-wait", is_flag=True, help="Return once the jobs are queued.")
@click.option("--keep-shards", is_flag=True, help="Keep P.tokenize/ whole after the merge.")
@click.option("--force", is_flag=True, help="Replace another dataset of that name.")
@click.option(
    "--rehearse",
    is_flag=True,
    help="Play the array on the head of the data in a Slurm shaped like the site; keep nothing.",
)
@common.dry_run
@common.as_json
def command(**options: Any) -> None:
    """Turn JSONL dialogues into a Megatron/NeoX dataset, byte for byte as preprocess_sft.py does,
    as a resumable array.

    \b
    hpctrain tokenize a.jsonl --tokenizer t.model --output-prefix P --site lumi --account PROJECT
    hpctrain tokenize data.jsonl --tokenizer t.model --output-prefix P --local
    """
    from hpctrain.data import present
    from hpctrain.data.command import tokenize

    request, how = _parse(options)
    if options["rehearse"]:
        _rehearse(request, how, options["as_json"])
        return
    if how.engine == "mpi":
        outcome = _on_mpi(request, how)
        if outcome is None:
            return
    else:
        with present.Watcher() as watcher:
            outcome = tokenize(
                request, how, terminal.info, lambda note: terminal.problems([note]), watcher
            )
    if options["as_json"]:
        terminal.data_json(**present.outcome_json(outcome))
    else:
        present.outcome(outcome)
    common.exit_if(outcome.status == "queued", errors.PENDING)


def _parse(options: dict[str, Any]) -> tuple[Any, Any]:
    from hpctrain.data.command import How
    from hpctrain.data.plan import Options
    from hpctrain.data.prepare import Request
    from hpctrain.data.records import RecordForm

    def named(kind: Any, **more: Any) -> Any:
        """A `kind` from the options that are named as its fields."""
        names = {field.name for field in dataclasses.fields(kind)} & options.keys()
        return kind(**{name: options[name] for name in names}, **more)

    request = named(Request, options=named(Options, form=named(RecordForm)))
    options.update(
        engine="local" if options["local"] else options["engine"], wait=not options["no_wait"]
    )
    return request, named(How)


def _rehearse(request: Any, how: Any, as_json: bool) -> None:
    import os

    from hpctrain.sandbox.rehearse import tokens

    with contextlib.closing(terminal.Stages()) as meter:
        outcome = tokens.rehearse_tokens(request, how, os.environ, meter.update)
    if as_json:
        terminal.data_json(**tokens.as_json(outcome))
    else:
        terminal.data("\n".join(tokens.lines(outcome)))
    terminal.problems(outcome.problems)
    terminal.next_step(
        "the same command without --rehearse, at the site"
        if outcome.ok
        else "the same command again"
    )
    common.exit_if(not outcome.ok)


def _on_mpi(request: Any, how: Any) -> Any:
    from hpctrain.data.command import tokenize_mpi

    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        raise errors.missing_package("mpi4py", "mpi") from None
    try:
        return tokenize_mpi(
            request, how, MPI.COMM_WORLD, terminal.info, lambda note: terminal.problems([note])
        )
    except errors.HpctrainError:
        raise  # told by rank 0 alone, when no rank waits for another
    except BaseException:
        # The other ranks would wait for this one for ever.
        import traceback

        traceback.print_exc()
        MPI.COMM_WORLD.Abort(errors.BUG)
        raise
