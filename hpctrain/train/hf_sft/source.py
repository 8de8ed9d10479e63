"""Which checkpoint a run, a checkpoint folder or a path means: only a whole one, by the rule that the chain's guard uses."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from hpctrain.base.errors import EnvironmentFault, Problem, UsageError
from hpctrain.runtime.files import Listing
from hpctrain.runtime.layout import Expected
from hpctrain.runtime.layouts import LAYOUTS
from hpctrain.train.program import newest_complete

LAYOUT = LAYOUTS["hf-trainer"]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint-N of the Trainer; `path` is absolute."""

    path: str
    iteration: int


def find_checkpoint(path: str) -> Checkpoint | None:
    """The checkpoint that `path` means; None where it has nothing to do with transformers' Trainer.

    Raises UsageError when it has, and there is no whole one; EnvironmentFault when the folder cannot be read.
    """
    path = os.path.abspath(path)
    plan = os.path.join(path, "plan.json")
    if os.path.isfile(plan):
        try:
            with open(plan, encoding="utf-8") as file:
                guard = json.load(file)["guard"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if guard.get("layout") != LAYOUT.name:
            return None
        return _newest(str(guard.get("checkpoint_dir") or ""))
    number = LAYOUT.number(os.path.basename(path))
    try:
        if number is not None and os.path.isfile(os.path.join(path, "trainer_state.json")):
            faults = _faults(path)
            if faults:
                raise UsageError([Problem(f"the checkpoint is not whole: {fault}", where=path) for fault in faults])
            return Checkpoint(path, number)
        if os.path.isdir(path) and any(LAYOUT.number(name) is not None for name in os.listdir(path)):
            return _newest(path) if not os.path.isfile(os.path.join(path, "latest")) else None
    except OSError as error:
        raise EnvironmentFault(f"cannot read it: {error.strerror or error}", where=path) from error
    return None


def _newest(directory: str) -> Checkpoint:
    found = newest_complete(LAYOUT.name, directory)
    if found is None:
        raise UsageError(f"there is no whole checkpoint in `{directory}` yet",
                         hint=f"`hpctrain checkpoint list {directory} --layout hf-trainer` shows what is there")  # fmt: skip
    return Checkpoint(found, LAYOUT.number(os.path.basename(found)) or 0)


def _faults(path: str) -> tuple[str, ...]:
    return LAYOUT.verdict(path, Listing(), Expected()).faults
