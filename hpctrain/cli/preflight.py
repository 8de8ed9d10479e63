from __future__ import annotations

import os
import sys

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common


@click.command()
@common.run_yaml
@common.set_option
@click.option(
    "--python", default=None, help="The Python of the step [default: the run's, or python3]."
)
@click.option(
    "--mib",
    default=8,
    show_default=True,
    type=click.IntRange(1, 1024),
    help="Size of the blocks that are sent.",
)
@click.option(
    "--limit",
    default=300.0,
    show_default=True,
    help="Seconds after which a step that hangs is ended.",
)
@click.option("--submit", is_flag=True, help="As a short job of its own, and wait for it.")
@common.no_check
@common.as_json
def command(
    run_yaml: str,
    assignments: tuple[str, ...],
    python: str | None,
    mib: int,
    limit: float,
    submit: bool,
    no_check: bool,
    as_json: bool,
) -> None:
    """Look at the allocated nodes before training: ranks, GPUs, cores, clocks, scratch, ring and
    all-reduce; name slow ones.

    Runs a step with the run's shape, container and Python on the allocation it is called in. Exits
    1 when a node is bad.

    \b
    salloc -N 4 ... hpctrain preflight run.yaml
    hpctrain preflight run.yaml --submit
    """
    from hpctrain.plan.load import load_plan
    from hpctrain.sites import nodes as allocation

    loaded = load_plan(run_yaml, assignments)
    plan = loaded.plan
    if submit:
        common.require_sound([loaded], no_check)
    elif plan.errors:
        raise errors.UsageError(plan.problems)
    name = python or str(plan.spec.recipe_options.get("python") or "python3")
    if submit:
        words = [
            sys.executable,
            "-m",
            "hpctrain",
            "preflight",
            os.path.abspath(run_yaml),
            "--python",
            name,
            "--mib",
            str(mib),
            "--limit",
            str(limit),
        ]
        words += [word for assignment in assignments for word in ("--set", assignment)]
        job_id, code = allocation.submit(plan, words + (["--json"] if as_json else []))
        with open(
            os.path.join(plan.run_dir, "logs", f"preflight-{job_id}.out"),
            encoding="utf-8",
            errors="replace",
        ) as log:
            terminal.data(log.read().rstrip("\n"))
        raise click.exceptions.Exit(code)
    answer = allocation.run_here(plan, name, mib, limit)
    if as_json:
        terminal.data_json(**answer)
    else:
        rows = [
            (
                f["rank"],
                f["node"],
                f.get("stage"),
                f.get("gpus"),
                len(f.get("cpus") or []),
                _figure(f.get("clock_offset_s"), 1000),
                _figure(f.get("ring_mib_s")),
                _figure(f.get("allreduce_mib_s")),
                _figure(f.get("scratch_mib_s")),
                _figure(f.get("compute_s"), 1000),
            )
            for f in answer["map"]
        ]
        terminal.table(
            rows,
            (
                "rank",
                "node",
                "came to",
                "GPUs",
                "cores",
                "clock ms",
                "ring MiB/s",
                "all-reduce MiB/s",
                "scratch MiB/s",
                "compute ms",
            ),
        )
        for level, nodes in (("bad", answer["bad"]), ("slow", answer["slow"])):
            for node, reasons in nodes.items():
                terminal.info(
                    f"{terminal.paint(level, 'red' if level == 'bad' else 'yellow', sys.stderr)}:"
                    f" {node}: {'; '.join(reasons)}"
                )
        terminal.notes(answer["remarks"])
        terminal.info(
            f"{answer['seen']} of {answer['ranks']} ranks answered, by"
            f" {answer['comm'] or 'no collectives'}"
        )
        exclude = [*answer["bad"], *answer["slow"]]
        if exclude:
            terminal.next_step(f"sbatch --exclude={','.join(exclude)} …")
    common.exit_if(not answer["ok"])


def _figure(value: float | None, factor: float = 1) -> str:
    return "" if value is None else f"{value * factor:.1f}"
