"""`hpctrain sandbox`: a real Slurm on this machine, shaped like a site."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

from hpctrain.base import errors, terminal, units
from hpctrain.config.site import load_site
from hpctrain.sandbox import sandbox, state

_name = click.option(
    "--name", default="default", show_default=True, help="Which sandbox; several run side by side."
)
_dir = click.option(
    "--dir",
    "directory",
    default="",
    help="Its directory [default: $XDG_STATE_HOME/hpctrain/sandbox/NAME].",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")


@click.group()
def command() -> None:
    """A real Slurm on this machine, shaped like a site: its partitions, limits and nodes. Needs no
    root.

    \b
    hpctrain sandbox up --site lumi --nodes 4
    hpctrain sandbox shell -- sbatch runs/ft/job.sbatch
    hpctrain sandbox down
    """


@command.command()
@click.option(
    "--site",
    "site_name",
    default="lumi",
    show_default=True,
    help="The site profile to be shaped like.",
)
@click.option(
    "--nodes",
    multiple=True,
    default=("4",),
    show_default=True,
    help="How many nodes of the site's main kind, or KIND=N; may be repeated.",
)
@click.option(
    "--accounting",
    is_flag=True,
    help="With slurmdbd and MariaDB: accounts, limits on submitted jobs, sacct.",
)
@click.option(
    "--account",
    "accounts",
    multiple=True,
    help="An account that exists there; may be repeated (with --accounting).",
)
@click.option(
    "--partition",
    "partitions",
    multiple=True,
    help="A partition, for sites whose profile lists none.",
)
@click.option(
    "--mount",
    "mounts",
    multiple=True,
    metavar="DIR:PATH",
    help="Show DIR of this machine at PATH of the site (/scratch …).",
)
@click.option(
    "--slurm",
    "source",
    type=click.Choice(["auto", "system", "unpacked"]),
    default="auto",
    show_default=True,
    help="This machine's Slurm, or Debian's packages unpacked into a cache.",
)
@_name
@_dir
@_json
def up(
    site_name: str,
    nodes: Sequence[str],
    accounting: bool,
    accounts: Sequence[str],
    partitions: Sequence[str],
    mounts: Sequence[str],
    source: str,
    name: str,
    directory: str,
    as_json: bool,
) -> None:
    """Start a sandbox and wait until all its nodes are idle.

    \b
    hpctrain sandbox up --site lumi --nodes 4
    hpctrain sandbox up --site lumi --nodes 192 --accounting --account project_465000000 --name big
    """
    from hpctrain.sandbox.from_site import shape_from_site

    site = load_site(site_name)
    if accounting and not accounts and site.values["account"]["example"]:
        accounts = [site.values["account"]["example"]]
    wanted = shape_from_site(
        site,
        _counts(nodes, site),
        accounting=accounting,
        accounts=accounts,
        partitions=partitions,
        mounts=_mounts(mounts),
    )
    with contextlib.closing(terminal.Stages()) as meter:
        found, started = sandbox.up(
            wanted,
            name,
            state.state_dir(name, directory, os.environ),
            os.environ,
            source=source,
            report=terminal.info,
            progress=meter.update,
        )
    terminal.info(f"{'started' if started else 'already running'}: {sandbox.describe(wanted)}")
    _tell_dead(found, _which(name, directory))
    if as_json:
        terminal.data_json(**_as_json(found), started=started)
    terminal.next_step(f"hpctrain sandbox shell{_which(name, directory)}")


@command.command()
@click.option(
    "--keep-logs", is_flag=True, help="Leave the daemons' logs in the sandbox's directory."
)
@_name
@_dir
def down(name: str, directory: str, keep_logs: bool) -> None:
    """End a sandbox: its own daemons, jobs and files, nothing else.

    \b
    hpctrain sandbox down
    """
    ended = sandbox.down(
        name, state.state_dir(name, directory, os.environ), os.environ, keep_logs=keep_logs
    )
    terminal.info(f"sandbox `{name}` has ended" if ended else f"sandbox `{name}` is not running")


@command.command()
@_name
@_dir
@_json
def status(name: str, directory: str, as_json: bool) -> None:
    """Show what a sandbox is doing; exits with 1 when it is not up.

    \b
    hpctrain sandbox status --json
    """
    found = sandbox.status(name, state.state_dir(name, directory, os.environ), os.environ)
    if as_json:
        terminal.data_json(**_as_json(found))
    else:
        rows: list[tuple[str, object]] = [
            ("name", found.name),
            ("state", found.phase),
            ("directory", found.state),
        ]
        if found.record is not None:
            rows += [
                ("shape", sandbox.describe(found.record.shape)),
                (
                    "slurm",
                    (
                        f"{found.record.version}"
                        f" ({'unpacked' if found.record.packages else 'installed'})"
                    ),
                ),
                ("partitions", ", ".join(part.name for part in found.record.shape.partitions)),
                ("nodes", _node_summary(found)),
                ("jobs", found.num_jobs),
                ("processes", found.num_processes),
                ("SLURM_CONF", found.slurm_conf),
            ]
        terminal.table(rows)
    _tell_dead(found, _which(name, directory))
    if found.phase != "up":
        terminal.next_step(
            f"hpctrain sandbox {'up' if found.phase == 'down' else 'down'}{_which(name, directory)}"
        )
        sys.exit(errors.NO)


@command.command(context_settings={"ignore_unknown_options": True})
@_name
@_dir
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
def shell(name: str, directory: str, words: Sequence[str]) -> None:
    """Open a shell in which plain sbatch, squeue, srun talk to the sandbox, or run one command
    there.

    \b
    hpctrain sandbox shell
    hpctrain sandbox shell -- sinfo
    """
    record = sandbox.running(name, state.state_dir(name, directory, os.environ))
    environ = sandbox.shell_environ(record, os.environ)
    argv = sandbox.shell_argv(
        record, list(words) or [os.environ.get("SHELL") or "/bin/sh"], os.environ
    )
    if not words:
        terminal.info(
            f"a shell in the sandbox `{name}`: sbatch, squeue, srun, scontrol are its own; `exit`"
            " leaves it"
        )
    try:
        os.execvpe(argv[0], argv, environ)
    except OSError as error:
        raise errors.EnvironmentFault(f"cannot run `{argv[0]}`: {error.strerror}") from error


@command.command()
@click.argument("nodes")
@click.option(
    "--down", "action", flag_value="down", help="Set it down: its jobs are killed and requeued."
)
@click.option("--drain", "action", flag_value="drain", help="Let it take no new jobs.")
@click.option("--resume", "action", flag_value="resume", help="End --down and --drain.")
@click.option(
    "--crash",
    "action",
    flag_value="crash",
    help="Kill its slurmd and all its tasks, as when power fails.",
)
@click.option(
    "--kill-slurmd", "action", flag_value="kill-slurmd", help="Kill its slurmd; its tasks run on."
)
@click.option(
    "--restart-slurmd", "action", flag_value="restart-slurmd", help="Start its slurmd again."
)
@_name
@_dir
def fault(nodes: str, action: str | None, name: str, directory: str) -> None:
    """Make nodes of a sandbox fail, or come back.

    \b
    hpctrain sandbox fault nid000002 --down
    hpctrain sandbox fault 'nid[000002-000003]' --crash
    hpctrain sandbox fault nid000002 --restart-slurmd
    """
    if action is None:
        raise errors.UsageError(
            "what shall happen to it?",
            hint="--down, --drain, --resume, --crash, --kill-slurmd or --restart-slurmd",
        )
    changed = sandbox.fault(
        nodes, action, name, state.state_dir(name, directory, os.environ), os.environ
    )
    terminal.info(f"{action}: {units.compress_nodes(changed)}")


def _counts(nodes: Sequence[str], site: Any) -> dict[str, int]:
    main = next((part.node_type.name for part in site.partitions.values()), None)
    main = main or site.values["default_node_type"] or next(iter(site.node_types))
    counts, problems = {}, []
    for item in nodes:
        kind, equals, number = item.rpartition("=")
        if not number.isdigit():
            problems.append(
                errors.Problem(
                    f"`--nodes {item}` is not a number of nodes",
                    hint="--nodes 4 or --nodes lumi-c=2",
                )
            )
        else:
            counts[kind or main] = int(number)
    if problems:
        raise errors.UsageError(problems)
    return counts


def _mounts(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [tuple(word.split(":")) for word in words]
    problems = [
        errors.Problem(f"`--mount {word}` is not DIR:PATH", hint="--mount ~/lumi-scratch:/scratch")
        for word, pair in zip(words, pairs)
        if len(pair) != 2 or not pair[0] or not pair[1].startswith("/")
    ]
    if problems:
        raise errors.UsageError(problems)
    return [
        (os.path.abspath(os.path.expanduser(pair[0])), os.path.normpath(pair[1])) for pair in pairs
    ]


def _tell_dead(found: sandbox.Status, option: str) -> None:
    """Nodes whose daemon is gone take no jobs, whatever sinfo still says of them."""
    if found.nodes_without_slurmd:
        nodes = units.compress_nodes(list(found.nodes_without_slurmd))
        hint = f"hpctrain sandbox fault {shlex.quote(nodes)} --restart-slurmd{option}"
        terminal.problems(
            [errors.Problem(f"no slurmd runs for {nodes}", hint=hint, level="warning")]
        )


def _which(name: str, directory: str) -> str:
    """The options that name this sandbox, for a command to type next."""
    named = f" --name {shlex.quote(name)}" if name != "default" else ""
    return named + (f" --dir {shlex.quote(directory)}" if directory else "")


def _node_summary(found: sandbox.Status) -> str:
    counts: dict[str, int] = {}
    for node_state in (found.nodes or {}).values():
        counts[node_state] = counts.get(node_state, 0) + 1
    return (
        ", ".join(f"{count} {node_state}" for node_state, count in sorted(counts.items()))
        or "the controller does not answer"
    )


def _as_json(found: sandbox.Status) -> dict[str, Any]:
    record = found.record
    return {
        "name": found.name,
        "state": found.phase,
        "directory": str(found.state),
        "slurm_conf": found.slurm_conf,
        "bin": found.bin_dir,
        "slurm_version": record.version if record else None,
        "unpacked": bool(record.packages) if record else None,
        "nodes": dict(found.nodes or {}),
        "partitions": [part.name for part in record.shape.partitions] if record else [],
        "accounts": list(record.shape.accounts) if record else [],
        "jobs": found.num_jobs,
        "processes": found.num_processes,
        "nodes_without_slurmd": list(found.nodes_without_slurmd),
    }
