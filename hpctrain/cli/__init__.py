"""The click group. Verbs are loaded only when typed, so that `hpctrain --help` opens few files on
Lustre.

A verb is one line in `SECTIONS` and one module `hpctrain/cli/<module>.py` with a click command
named `command`.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import click

from hpctrain import __version__
from hpctrain.base import errors, terminal

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Heading: {verb: (module under hpctrain.cli, one-line help)}. The order is that of use, and of
# `--help`.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Write a run": {
        "init": ("init", "write a commented, valid run.yaml"),
        "import": ("import_", "sbatch scripts to run.yaml, and what is wrong with them"),
        "recipe": ("recipe", "what can train: list, show"),
        "check": ("check", "find every problem of a run at once, without any effect"),
        "plan": ("plan", "show every decided value with its reason, and the cost"),
        "render": ("render", "write the run directory; prints the path of job.sbatch"),
        "template": ("template", "job script templates: list, show, override by blocks"),
    },
    "Run it": {
        "ladder": ("ladder", "few steps on 1, 2, 8 GPUs first, each only after GREEN"),
        "chain": ("chain", "render, bootstrap and queue a whole chain of jobs"),
        "pipeline": ("pipeline", "runs that hand checkpoints or models on, queued as one graph"),
        "stop": ("stop", "end a chain after its next checkpoint"),
        "cancel": ("cancel", "cancel every job of a chain now"),
        "checkpoint": ("checkpoint", "list, verify, bootstrap and choose checkpoints"),
        "export": ("export", "write a run's weights as a Hugging Face directory"),
        "generate": ("generate", "answer prompts with a run's weights"),
    },
    "Watch it": {
        "status": ("status", "what runs are doing: links, progress, time still needed"),
        "logs": ("logs", "logs across links and requeues, the first failing rank first"),
        "triage": ("triage", "what the logs say: GREEN or RED, the cause, what to do next"),
        "report": ("report", "one HTML page of a run: curves, links, cost, lost work"),
        "cost": ("cost", "what a run will cost or has cost, in hours and billing units"),
    },
    "Data": {
        "tokenize": ("tokenize", "dialogues to a Megatron/NeoX dataset, as a resumable array"),
        "data": ("data", "look at, check, count, pack and merge datasets"),
        "upload": ("upload", "send data to the site: resumable, verified"),
    },
    "Sites": {
        "site": ("site", "site profiles: list, show, check, draft a new one"),
        "doctor": ("doctor", "this environment: Python, packages, disks, caches, Slurm"),
        "preflight": (
            "preflight",
            "the allocated nodes: ranks, GPUs, clocks, bandwidth, slow ones",
        ),
        "shell": ("shell", "an interactive allocation in the site's container"),
    },
    "This machine": {
        "rehearse": ("rehearse", "the very job, against a real Slurm shaped like its site"),
        "sandbox": ("sandbox", "a real Slurm, shaped like a site"),
        "schema": ("schema", "JSON Schemas of run.yaml and profiles, for editors"),
        "completion": ("completion", "Tab completion for bash, zsh and fish"),
    },
}
VERBS = {verb: entry for verbs in SECTIONS.values() for verb, entry in verbs.items()}


class LazyGroup(click.Group):
    """A group whose commands are imported when typed, and listed from the table without importing
    them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"hpctrain.cli.{VERBS[cmd_name][0]}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if (
            args
            and args[0] not in VERBS
            and not args[0].startswith("-")
            and not ctx.resilient_parsing
        ):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=1)
            raise errors.UsageError(
                f"there is no verb `{args[0]}`",
                hint=f"did you mean `hpctrain {near[0]}`?" if near else "see `hpctrain --help`",
            )
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs from the table, since click would import every verb to ask whether it is hidden."""
        from click.shell_completion import CompletionItem

        verbs = [
            CompletionItem(verb, help=text)
            for verb, (_, text) in VERBS.items()
            if verb.startswith(incomplete)
        ]
        return [*verbs, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, VERBS))  # the same column in every section
        for heading, verbs in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(verb.ljust(width), text) for verb, (_, text) in verbs.items()])


@click.command(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "HPCTRAIN",
        "max_content_width": 110,
    },
)
@click.version_option(__version__, "-V", "--version", prog_name="hpctrain")
@click.option("--debug", is_flag=True, help="Show a traceback when hpctrain itself fails.")
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Colour the output.",
)
@click.pass_context
def group(ctx: click.Context, debug: bool, color: str) -> None:
    """One run.yaml becomes the Slurm jobs, configs and checkpoint chain of an LLM training run.

    \b
    hpctrain init my-run --recipe neox-sft --site lumi
    sbatch "$(hpctrain render my-run/run.yaml)"
    """
    terminal.set_color(color)
    ctx.color = None if color == "auto" else color == "always"


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with a code of `hpctrain.base.errors`; never shows a traceback
    without `--debug`."""
    argv = sys.argv[1:] if args is None else args
    debug = "--debug" in argv
    terminal.make_printable()
    try:
        code = group.main(args=argv, prog_name="hpctrain", standalone_mode=False)
        sys.stdout.flush()
    except errors.HpctrainError as error:
        terminal.problems(error.problems)
        code = error.exit_code
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        terminal.info("interrupted")
        code = errors.INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`): not an error; keep Python from complaining
        # at exit.
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = errors.DONE
    except OSError as error:
        if debug:
            raise
        where = str(error.filename) if error.filename else ""
        terminal.problems([errors.Problem(error.strerror or str(error), where=where)])
        code = errors.ENVIRONMENT
    except Exception as error:
        if debug:
            raise
        _report_bug(error)
        code = errors.BUG
    sys.exit(code if isinstance(code, int) else errors.DONE)


def _report_bug(error: Exception) -> None:
    import tempfile
    import traceback

    hint = "run it again with --debug"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="hpctrain-bug-", suffix=".txt", delete=False
        ) as log:
            traceback.print_exc(file=log)
        hint = f"the traceback is in {log.name}; please report it"
    except OSError:
        pass
    terminal.problems(
        [errors.Problem(f"this is a bug in hpctrain: {type(error).__name__}: {error}", hint=hint)]
    )
