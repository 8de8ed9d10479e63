"""What some tests need beyond hpctrain's own requirements."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

# tools/test installs everything, and a CI without it would pass by leaving tests out.
ALL_IS_HERE = bool(os.environ.get("CI"))


def needed(module: str) -> Any:
    """The module. Where tools/test set the environment up its absence is an error, elsewhere the
    test is skipped."""
    return importlib.import_module(module) if ALL_IS_HERE else pytest.importorskip(module)
