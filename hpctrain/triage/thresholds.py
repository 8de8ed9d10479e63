"""The limits by which triage judges; the defaults are those of the guides that hpctrain grew out
of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.base.errors import Problem, UsageError


@dataclass(frozen=True)
class Thresholds:
    """Each is set with `--threshold NAME=VALUE`."""

    loss_steps: int = 100  # after so many steps the loss is compared with the first
    loss_drop: float = 0.0  # it must have fallen by more than this fraction
    loss_drop_to_scale: float = (
        0.1  # and by this much before more GPUs are worth it (the ladder asks)
    )
    loss_rise: float = 2.0  # RED when the recent loss is so many times the lowest it had been
    grad_norm_low: float = 0.1
    grad_norm_high: float = 10.0  # outside low..high: a remark
    grad_norm_max: float = 1000.0  # beyond, several times in a row or at the end: RED
    in_a_row: int = 3
    skipped_grace: int = 25  # iterations in which fp16 loss scaling may search its scale
    skipped_share: float = (
        0.01  # and of the later ones: its scale grows until one in a thousand or so is skipped
    )
    throughput_drop: float = (
        0.5  # RED when the last window runs below this fraction of the best one
    )
    hang_factor: float = 10.0  # no step line for max(hang_factor x median step, hang_min_s)
    hang_min_s: float = 900.0
    startup_s: float = 3600.0  # no first step line for so long


def parse_thresholds(assignments: Sequence[str]) -> Thresholds:
    """`loss_drop=0.05` and such over the defaults. Raises UsageError naming every one that is not a
    threshold."""
    fields = {field.name: field for field in dataclasses.fields(Thresholds)}
    values: dict[str, float] = {}
    problems = []
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in fields:
            problems.append(
                Problem(f"there is no threshold `{name}`", hint=f"one of {', '.join(fields)}")
            )
            continue
        try:
            number = float(text)
            if not 0 <= number < 1e12:
                raise ValueError
        except ValueError:
            problems.append(
                Problem(f"`{text}` is not a value for threshold `{name}`", hint="a number from 0")
            )
            continue
        values[name] = int(number) if isinstance(getattr(Thresholds, name), int) else number
    if problems:
        raise UsageError(problems)
    return dataclasses.replace(Thresholds(), **values)  # type: ignore[arg-type]
