"""What doctor finds, and its score. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OK, PROBLEM, WARNING, NOT_SEEN = "ok", "problem", "warning", "not seen"


@dataclass(frozen=True)
class Finding:
    """One check: `area` groups them; `hint` says what to do. A check that saw nothing neither
    passes nor fails."""

    area: str
    name: str
    result: str
    what: str
    hint: str = ""

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def score(findings: Sequence[Finding]) -> int | None:
    """Passed checks of those that could see something, in percent; a warning counts half. None when
    nothing was seen."""
    seen = [finding for finding in findings if finding.result != NOT_SEEN]
    points = sum({OK: 1.0, WARNING: 0.5}.get(finding.result, 0.0) for finding in seen)
    return round(100 * points / len(seen)) if seen else None
