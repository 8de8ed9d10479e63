from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hpctrain.base import errors, terminal
from hpctrain.cli import common

if TYPE_CHECKING:
    from hpctrain.triage.judge import Diagnosis


@click.command()
@common.run_yaml
@common.set_option
@click.option("--rungs", "rungs_text", default="1,2,8", show_default=True, help="Numbers of GPUs, rising.")
@click.option(
    "--steps",
    default=150,
    show_default=True,
    type=click.IntRange(1),
    help="Steps of each rung; 100 are needed to see the loss fall.",
)
@click.option("--time", "time_text", default="00:30:00", show_default=True, help="Time limit of each rung.")
@click.option("--force", is_flag=True, help="Replace what an earlier ladder rendered.")
@common.dry_run
@common.as_json
def command(
    run_yaml: str,
    assignments: tuple[str, ...],
    rungs_text: str,
    steps: int,
    time_text: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Try a run on 1, 2 and 8 GPUs before the whole of it: few steps, the same global batch, the next rung only on GREEN.

    Each rung has a run directory and a checkpoint folder of its own, and each further ladder new ones.

    \b
    hpctrain ladder --dry-run
    hpctrain ladder run.yaml --rungs 1,8,64 --steps 200
    """
    from hpctrain.jobs.ladder import checks, climb, log_path, plan_rungs, purpose, toggles
    from hpctrain.runs.bills import parse_rungs

    rungs = plan_rungs(run_yaml, assignments, parse_rungs(rungs_text), steps, time_text)
    if dry_run:
        fields = [
            {
                "gpus": rung.num_gpus,
                "run_dir": rung.run_dir,
                "changes": dict(rung.changes),
                "bill": rung.bill.as_json() if rung.bill else None,
            }
            for rung in rungs
        ]
        if as_json:
            terminal.data_json(rungs=fields)
        else:
            terminal.table(
                [(r.num_gpus, _bill(r.bill), " ".join(f"{key}={value}" for key, value in r.changes.items()), r.run_dir) for r in rungs],
                ("GPUs", "at most", "changes", "directory"),
            )  # fmt: skip
            terminal.next_step(common.typed("ladder"))
        return
    results = climb(rungs, terminal.info, force)
    if as_json:
        terminal.data_json(
            rungs=[
                {"gpus": r.rung.num_gpus, "job_id": r.job_id, "passed": r.passed, "why": r.why, "run_dir": r.rung.run_dir,
                 "toggles": toggles(r.rung), "checks": checks(r.diagnosis), "log": log_path(r.rung, r.job_id) if r.job_id else None,
                 "diagnosis": r.diagnosis.as_json() if r.diagnosis else None}
                for r in results
            ]
        )  # fmt: skip
    else:
        rows = []
        for r in results:
            name, validates = purpose(rungs, r.rung)
            verdict = "pass" if r.passed else "stop" if r.job_id else "not reached"
            switched = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in toggles(r.rung).items())
            seen = " ".join(f"{check}:{answer}" for check, answer in checks(r.diagnosis).items()) if r.diagnosis else ""
            rows.append((r.rung.num_gpus, name, validates, switched, verdict, *_figures(r.diagnosis), seen, _bill(r.rung.bill),
                         r.job_id, "" if r.passed else r.why))  # fmt: skip
        terminal.table(
            rows, ("GPUs", "rung", "validates", "toggles", "result", "loss", "speed", "checks", "at most", "job", "why")
        )
        for r in results:
            if r.job_id:
                terminal.info(f"log of the rung of {r.rung.num_gpus} GPUs: {log_path(r.rung, r.job_id)}")
        terminal.next_step(
            "hpctrain chain"
            if all(r.passed for r in results)
            else f"hpctrain triage {next(r for r in results if not r.passed).rung.run_dir}"
        )
    if not all(result.passed for result in results):
        raise click.exceptions.Exit(errors.NO)


def _figures(diagnosis: Diagnosis | None) -> tuple[str, str]:
    """The loss from first to last and the speed, as text; empty where they were not seen."""
    seen = diagnosis.progress if diagnosis else {}
    first, last = seen.get("first_loss"), seen.get("last_loss")
    losses = f"{first:.4g} → {last:.4g}" if isinstance(first, float) and isinstance(last, float) else ""
    return losses, f"{seen['rate']:.4g} {seen['rate_unit']}" if seen.get("rate") else ""


def _bill(bill: object) -> str:
    from hpctrain.runs.cost import Bill

    assert bill is None or isinstance(bill, Bill)
    return f"{bill.billed:,.{1 if bill.billed >= 10 else 2}f} {bill.unit}s" if bill and bill.billed is not None else ""
