"""A run as the text of a run.yaml, with what was thought of the script it came from."""

from __future__ import annotations

from typing import Any

import yaml

from hpctrain.imports.script import Imported


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def run_text(found: Imported, source: str) -> str:
    """The run.yaml, remarks first as comments."""
    told = [f"# Imported from {source}. `hpctrain check` says what is left to do."]
    told += [f"# line {line}: {what}" for line, what in sorted(found.faults)]
    told += [f"# line {line}, left out: {what}" for line, what in sorted(found.left)]
    told += [f"# {remark}" for remark in found.remarks]
    comments = "".join(line.replace("\n", " ") + "\n" for line in told)
    return comments + _dump(found.run)


def _dump(run: dict[str, Any]) -> str:
    return yaml.dump(run, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
