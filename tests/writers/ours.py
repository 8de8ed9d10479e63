"""What hpctrain says of a checkpoint: the only place of the campaign that asks it."""

from __future__ import annotations

import os
from dataclasses import dataclass

try:
    from hpctrain.runtime.judging import judge_path
except ImportError:  # an hpctrain that must be told what it looks at
    judge_path = None  # type: ignore[assignment]

STATES = ("complete", "torn", "unknown", "unreadable")


@dataclass(frozen=True)
class Decision:
    """What a link would start from: the name of a checkpoint, or "" for none; `refusal`: it would
    not start at all."""

    name: str
    refusal: str
    moved: tuple[str, ...]  # out of the framework's folder


def decision(folder: str, layout: str) -> Decision | None:
    """What the guard decides over a folder of checkpoints; None with an hpctrain whose guard knows
    no refusal."""
    from hpctrain.runtime.layouts import LAYOUTS
    from hpctrain.runtime.settings import parse_settings
    from hpctrain.runtime.survey import Choice, Survey, choose

    if layout not in LAYOUTS or "refusal" not in Choice._fields:
        return None
    guard = {"schema_version": 1, "run": "x", "layout": layout, "checkpoint_dir": folder}
    chosen = choose(Survey(parse_settings(guard)))
    refusal = chosen.refusal or chosen.unreadable
    name = (chosen.name or "") if chosen.kind == "made" else ""
    return Decision(name, refusal, tuple(one.name for one in chosen.asides))


def answer(path: str, layout: str) -> tuple[str, str]:
    """(state, reason) for the checkpoint at `path`; `layout` is asked only by an hpctrain that
    cannot tell by itself."""
    if judge_path is None:
        return _as_told(path, layout)
    try:
        name, verdict = judge_path(path)
    except FileNotFoundError:
        return "torn", "there is nothing"
    return str(verdict.state), f"{name}: {verdict.reason}"


def _as_told(path: str, layout: str) -> tuple[str, str]:
    from hpctrain.runtime.files import Listing
    from hpctrain.runtime.layout import Expected
    from hpctrain.runtime.layouts import LAYOUTS

    if layout not in LAYOUTS:
        return "unknown", "no layout of this name"
    try:
        verdict = LAYOUTS[layout].verdict(path, Listing(), Expected())
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return ("torn" if missing else "unreadable"), f"{os.path.basename(path)}: {error}"
    return ("torn" if verdict.faults else "complete"), "; ".join(verdict.faults)
