"""All writers by name."""

from __future__ import annotations

import importlib

from .contract import Writer

MODULES = ("dcp", "trees", "megatron", "pl", "zero", "own", "accelerated", "hf", "olmo")


def writers() -> dict[str, Writer]:
    found = {}
    for module in MODULES:
        for one in importlib.import_module(f".{module}", __package__).WRITERS:
            found[one.name] = one()
    return found
