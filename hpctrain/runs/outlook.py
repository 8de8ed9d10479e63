"""When a chain will be done, by what its own jobs took."""

from __future__ import annotations

import os
import time

from hpctrain.base.units import format_duration
from hpctrain.runs.records import offset_of, read_run
from hpctrain.runs.starts import measured_step_time_s, starts_of


def outlook(run_dir: str, iterations: int | None) -> str:
    """How long an iteration took in the jobs of `run_dir` that ended, what is left of `iterations`,
    and the day on which that would end; empty where nothing was measured."""
    if not iterations or not os.path.isfile(os.path.join(run_dir, "links.jsonl")):
        return ""
    run = read_run(run_dir)
    starts = starts_of(run)
    step_s = measured_step_time_s(starts)
    if step_s is None:
        return ""
    numbers = [start.iteration_to for start in starts if start.iteration_to is not None]
    offset = offset_of(run.plan) if run.plan.get("guard") else 0
    left = max(iterations - max(numbers, default=0) + offset, 0)
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left * step_s))
    return (
        f"measured by this chain: {step_s:.3g} s an iteration, start-up included; the"
        f" {left:,} that are left take {format_duration(left * step_s)}, until {end} if they begin"
        " now and nothing waits"
    )
