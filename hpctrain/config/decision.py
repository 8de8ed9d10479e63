"""One decided value with its reason and its origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decision:
    """One decided value: `name` (dotted), `value`, why, and where it comes from (file:line:column,
    or a module's rule)."""

    name: str
    value: Any
    reason: str
    origin: str = ""
