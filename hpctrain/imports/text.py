"""A run as the text of a run.yaml, with what was thought of the script it came from."""

from __future__ import annotations

from typing import Any

import yaml

from hpctrain.imports.script import Imported


def run_text(found: Imported, source: str) -> str:
    """The run.yaml, remarks first as comments."""
    told = [f"# Imported from {source}. `hpctrain check` says what is left to do."]
    told += [f"# line {line}: {what}" for line, what in sorted(found.faults)]
    told += [f"# line {line}, left out: {what}" for line, what in sorted(found.left)]
    told += [f"# {remark}" for remark in found.remarks]
    comments = "".join(line.replace("\n", " ") + "\n" for line in told)
    return comments + _dump(found.run)


def _dump(run: dict[str, Any]) -> str:
    """YAML in the order of the keys; `setup` as a block, whatever blanks its lines hold."""
    out = []
    for key, value in run.items():
        if key == "setup":
            lines = "".join(
                f"  {line}" if line.strip() else "\n" for line in value.splitlines(True)
            )
            out.append(f"setup: |{'2' if value[:1] in ' ' else ''}\n{lines}")
        else:
            out.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=100))
    return "".join(out)
