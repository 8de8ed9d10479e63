from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common

if TYPE_CHECKING:
    from hpctrain.jobs.chain import ChainPlan


@click.command()
@common.run_yaml
@click.option(
    "--jobs",
    metavar="N|auto",
    help="Links in all, or as many as the remaining iterations need [default: the run's]; those"
    " that ended without a new checkpoint are made up for.",
)
@click.option(
    "--extend",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Queue N more links behind those that are queued.",
)
@click.option(
    "--exclude-bad",
    is_flag=True,
    help="Keep new and waiting links off nodes named in two failures.",
)
@common.out_dir
@common.set_option
@common.force
@common.no_check
@common.dry_run
@common.yes
@common.as_json
def command(
    run_yaml: str,
    jobs: str | None,
    extend: int | None,
    exclude_bad: bool,
    out_dir: str | None,
    assignments: tuple[str, ...],
    force: bool,
    no_check: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Check, render, bootstrap and queue a whole chain of jobs; each link decides as it starts what
    there is to do.

    Running it again submits only what is missing: also after a give-up, a cancel, or a stop whose
    STOP file was removed.

    \b
    hpctrain chain --jobs 5
    hpctrain chain my-run/run.yaml --jobs auto --dry-run
    hpctrain chain --extend 3 --exclude-bad
    """
    from hpctrain.jobs import bad_nodes, chain
    from hpctrain.plan import gate
    from hpctrain.plan.load import load_plan

    num_links = _number(jobs)
    if jobs and extend:
        raise errors.UsageError(
            "`--jobs` and `--extend` contradict each other",
            hint="--extend adds links to those on record",
        )
    loaded = load_plan(run_yaml, assignments, out_dir)
    checked = common.require_sound([loaded], no_check)
    run_dir = loaded.plan.run_dir
    with chain.readable(run_dir):
        plan, said = chain.prepare(loaded, force, dry_run)
    terminal.lines(said)
    found = chain.plan_chain(run_dir, plan, num_links, extend, jobs == "auto", force, no_check)
    if found.total > loaded.plan.spec.num_links:
        as_queued = (*assignments, f"chain.jobs={found.total}")
        gate.require_sound_as_queued(load_plan(run_yaml, as_queued, out_dir), loaded)
    hours, unit = found.hours
    if not as_json:
        shown = [
            (
                e.link,
                e.job_id or ("new" if dry_run else "to submit"),
                e.mode,
                _span(e.first, e.last),
            )
            for e in found.links
        ]
        terminal.table(shown, header=("link", "job", "expected", "iterations"))
    bill = f", {found.billed:.1f} {found.unit}s billed" if found.billed is not None else ""
    beside = f" beside {len(found.live)} that wait or run" if found.live else ""
    terminal.info(f"{len(found.new)} new links{beside}: at most {hours:.1f} {unit}{bill}")
    for node in found.bad_nodes:
        advice = "" if exclude_bad else "; --exclude-bad keeps the links off it"
        terminal.info(
            f"node {node.name} was named in {len(node.failures)} failures (jobs"
            f" {', '.join(node.failures)}){advice}"
        )
    if not dry_run:
        if found.new and chain.ask_needed(hours) and not yes:
            common.ask(f"Submit {len(found.new)} links for up to {hours:.0f} {unit}?")
        exclude = bad_nodes.merged("", found.bad_nodes) if exclude_bad and found.bad_nodes else ""
        changed = chain.exclude_bad(run_dir, found.bad_nodes) if exclude else []
        ids = chain.submit_chain(found, exclude, waived=checked.waived)
        if changed:
            terminal.info(f"waiting links that will not get {exclude}: {' '.join(changed)}")
        new = [ids[link, "link"] for link in found.new]
        terminal.info(
            f"queued {len(new)} links: {' '.join(new)}"
            if new
            else f"nothing to submit: {_nothing(found)}"
        )
    if as_json:
        terminal.data_json(
            run=found.run,
            run_dir=run_dir,
            submitted=not dry_run,
            new=list(found.new),
            gpu_hours=found.gpu_hours,
            node_hours=found.node_hours,
            billed=found.billed,
            unit=found.unit,
            live=list(found.live),
            done=found.done,
            links=[
                {
                    "link": e.link,
                    "job_id": e.job_id if dry_run else ids.get((e.link, "link")),
                    "expected": e.mode,
                    "first": e.first,
                    "last": e.last,
                }
                for e in found.links
            ],
            bad_nodes=[
                {"name": node.name, "failures": list(node.failures)} for node in found.bad_nodes
            ],
        )
    terminal.next_step(
        common.typed("chain")
        if dry_run
        else f"hpctrain status {shlex.quote(os.path.relpath(run_dir))}"
    )


def _nothing(found: ChainPlan) -> str:
    if found.done:
        return f"the run is done, {found.done}"
    return f"{len(found.live)} links wait or run (--extend N adds more)"


def _number(jobs: str | None) -> int | None:
    if jobs is None or jobs == "auto":
        return None
    if not jobs.isdigit() or not 1 <= int(jobs) <= 1000:
        raise errors.UsageError(
            f"`--jobs {jobs}` is not a number of jobs from 1 to 1000, nor `auto`"
        )
    return int(jobs)


def _span(first: int | None, last: int | None) -> str:
    end = "?" if last is None else last
    return "" if first is None else f"{first} -> {end}"
