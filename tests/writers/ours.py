"""What hpctrain says of a checkpoint: the only place of the campaign that asks it."""

from __future__ import annotations

import os

from hpctrain.runtime import layouts
from hpctrain.runtime.files import Listing

STATES = ("complete", "torn", "unknown", "unreadable")


def answer(path: str, layout: str) -> tuple[str, str]:
    """(state, reason) for the checkpoint at `path`; `layout` is asked only by an hpctrain that cannot tell by itself."""
    judge_path = getattr(layouts, "judge_path", None)
    if judge_path is not None:
        name, verdict = judge_path(path)
        return str(verdict.state), f"{name}: {verdict.reason}"
    if layout not in layouts.LAYOUTS:
        return "unknown", "no layout of this name"
    from hpctrain.runtime.layout import Expected

    known = layouts.LAYOUTS[layout]
    try:
        verdict = known.verdict(path, Listing(), Expected())
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return ("torn" if missing else "unreadable"), f"{os.path.basename(path)}: {error}"
    return ("torn" if verdict.faults else "complete"), "; ".join(verdict.faults)
