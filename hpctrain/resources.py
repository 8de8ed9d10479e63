"""Where the shipped templates and site profiles lie: inside the wheel, or beside the package in a checkout."""

from __future__ import annotations

import os

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def shipped_dir(name: str) -> str:
    """The folder `name` (`templates` or `site_profiles`) that this hpctrain came with."""
    in_wheel = os.path.join(_PACKAGE, "_shipped", name)
    return in_wheel if os.path.isdir(in_wheel) else os.path.join(os.path.dirname(_PACKAGE), name)
