from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from hpctrain.base import terminal
from hpctrain.cli import common

if TYPE_CHECKING:
    from hpctrain.jobs.ladder import Result
    from hpctrain.triage.judge import Diagnosis


@click.command()
@common.run_yaml
@common.set_option
@click.option(
    "--rungs", "rungs_text", default="1,2,8", show_default=True, help="Numbers of GPUs, rising."
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Steps of each rung; 100 are needed to see the loss fall.  [default: 150]",
)
@click.option(
    "--time", help="Time limit of each rung.  [default: what its steps need, or 00:30:00]"
)
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="NAME=VALUE",
    help="Judge by another limit, as triage does.",
)
@click.option("--force", is_flag=True, help="Replace what an earlier ladder rendered.")
@common.no_check
@common.dry_run
@common.as_json
def command(
    run_yaml: str,
    assignments: tuple[str, ...],
    rungs_text: str,
    steps: int | None,
    time: str | None,
    thresholds: tuple[str, ...],
    force: bool,
    no_check: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Try a run on 1, 2 and 8 GPUs before the whole of it: few steps, the same global batch, the
    next rung only on GREEN.

    Each rung has a run directory and a checkpoint folder of its own, and each further ladder new
    ones.

    \b
    hpctrain ladder --dry-run
    hpctrain ladder run.yaml --rungs 1,8,64 --steps 200
    """
    from hpctrain.jobs.ladder import climb, parse_rungs, plan_rungs, total
    from hpctrain.runs.bills import AMOUNTS, amounts
    from hpctrain.triage.thresholds import parse_thresholds

    limits = parse_thresholds(thresholds)
    rungs = plan_rungs(run_yaml, assignments, parse_rungs(rungs_text), steps, time)
    terminal.problems([problem for rung in rungs for problem in rung.left_out])
    checked = common.require_sound([rung.loaded for rung in rungs], no_check)
    if dry_run:
        fields = [
            {
                "gpus": rung.num_gpus,
                "run_dir": rung.run_dir,
                "changes": dict(rung.changes),
                "bill": rung.bill.as_json(),
            }
            for rung in rungs
        ]
        if as_json:
            terminal.data_json(rungs=fields, total=total(rungs).as_json())
        else:
            rows = [
                (str(rung.num_gpus), *amounts(rung.bill), _words(rung.changes), rung.run_dir)
                for rung in rungs
            ]
            rows.append(("the ladder", *amounts(total(rungs)), "", ""))
            terminal.table(rows, ("GPUs", *AMOUNTS, "changes", "directory"))
            terminal.next_step(common.typed("ladder"))
        return
    results = climb(rungs, terminal.info, force, limits, checked.waived)
    _show(results, as_json)
    common.exit_if(not all(result.passed for result in results))


def _show(results: Sequence[Result], as_json: bool) -> None:
    from hpctrain.jobs.ladder import checks, log_path, purpose, toggles
    from hpctrain.runs.bills import amounts

    rungs = [result.rung for result in results]
    if as_json:
        terminal.data_json(
            rungs=[
                {
                    "gpus": r.rung.num_gpus,
                    "job_id": r.job_id,
                    "passed": r.passed,
                    "why": r.why,
                    "run_dir": r.rung.run_dir,
                    "toggles": toggles(r.rung),
                    "checks": checks(r.diagnosis),
                    "log": log_path(r.rung, r.job_id) if r.job_id else None,
                    "diagnosis": r.diagnosis.as_json() if r.diagnosis else None,
                }
                for r in results
            ]
        )
    else:
        rows = []
        for r in results:
            name, validates = purpose(rungs, r.rung)
            stopped = "stop" if r.job_id else "not reached"
            verdict = "pass" if r.passed else stopped
            switched = " ".join(
                f"{key.rpartition('.')[2]}={value}" for key, value in toggles(r.rung).items()
            )
            seen = (
                " ".join(f"{check}:{answer}" for check, answer in checks(r.diagnosis).items())
                if r.diagnosis
                else ""
            )
            figures = _figures(r.diagnosis)
            at_most = " = ".join(amounts(r.rung.bill)[1:])
            why = "" if r.passed else r.why
            row = (r.rung.num_gpus, name, validates, switched, verdict, *figures, seen, at_most)
            rows.append((*row, r.job_id, why))
        terminal.table(
            rows,
            (
                "GPUs",
                "rung",
                "validates",
                "toggles",
                "result",
                "loss",
                "speed",
                "checks",
                "at most",
                "job",
                "why",
            ),
        )
        for r in results:
            if r.job_id:
                terminal.info(
                    f"log of the rung of {r.rung.num_gpus} GPUs: {log_path(r.rung, r.job_id)}"
                )
        terminal.next_step(
            "hpctrain chain"
            if all(r.passed for r in results)
            else f"hpctrain triage {next(r for r in results if not r.passed).rung.run_dir}"
        )


def _words(changes: Mapping[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())


def _figures(diagnosis: Diagnosis | None) -> tuple[str, str]:
    """The loss from first to last and the speed, as text; empty where they were not seen."""
    seen = diagnosis.progress if diagnosis else {}
    first, last = seen.get("first_loss"), seen.get("last_loss")
    losses = (
        f"{first:.4g} → {last:.4g}" if isinstance(first, float) and isinstance(last, float) else ""
    )
    return losses, f"{seen['rate']:.4g} {seen['rate_unit']}" if seen.get("rate") else ""
