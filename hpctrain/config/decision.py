"""One decided value with its reason and its origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REPEATS = "as the base config says"  # the reason of a value that nobody decided


@dataclass(frozen=True)
class Decision:
    """One decided value: `name` (dotted), `value`, why, and where it comes from (file:line:column,
    or a module's rule)."""

    name: str
    value: Any
    reason: str
    origin: str = ""

    @property
    def repeats(self) -> bool:
        """Whether it only repeats what a base config says."""
        return self.reason == REPEATS
