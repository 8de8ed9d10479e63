"""What must be right before a job is queued: all that `check` knows, asked by whatever submits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hpctrain.base.errors import Problem, Refused, UsageError
from hpctrain.plan.check import find_problems, problems_between
from hpctrain.plan.load import Loaded
from hpctrain.plan.run_dir import rendered


@dataclass(frozen=True)
class Checked:
    """What `check` said of runs that go to Slurm: the `remarks` to show, and the errors that were
    `waived` by --no-check."""

    remarks: tuple[Problem, ...] = ()
    waived: tuple[Problem, ...] = ()


def require_sound(runs: Sequence[Loaded], no_check: bool = False) -> Checked:
    """Check runs as `hpctrain check` does. Raises UsageError, with every problem, where run.yaml or
    a template is wrong, and Refused where the machine or Slurm would refuse a run, unless
    `no_check`.

    Of the notes only the plan's own are told: the rest says what is as it should be.
    """
    each = (problem for run in runs for problem in find_problems(run))
    found = list(dict.fromkeys([*problems_between(runs), *each]))
    errors = [problem for problem in found if problem.level == "error"]
    planned = {problem for run in runs for problem in run.plan.problems}
    if any(run.plan.errors for run in runs):
        raise UsageError(found)
    try:
        for run in runs:
            rendered(run)
    except UsageError as error:  # a template of the user's own: no job without it
        raise UsageError(found) from error
    if errors and not no_check:
        last = errors[-1]
        hint = "; ".join(filter(None, (last.hint, "--no-check goes on in spite of errors")))
        raise Refused([*errors[:-1], replace(last, hint=hint)])
    remarks = [problem for problem in found if problem.level != "note" or problem in planned]
    return Checked(
        tuple(replace(p, level="warning") if p in errors else p for p in remarks), tuple(errors)
    )


def require_sound_as_queued(queued: Loaded, shown: Loaded) -> None:
    """Raise UsageError where a run is wrong only as it will be queued, with more links than it
    asks for; `shown` is the run whose problems were told."""
    if queued.plan.errors:
        told = set(shown.plan.problems)
        raise UsageError([p for p in queued.plan.problems if p not in told])
