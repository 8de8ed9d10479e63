"""`hpctrain --help`: the verbs by what one wants to do, in the order of use."""

from __future__ import annotations

import re
from pathlib import Path

from hpctrain.cli import SECTIONS, VERBS

ROOT = Path(__file__).parents[3]
HEADINGS = ["Write a run", "Run it", "Watch it", "Data", "Sites", "This machine"]


def test_every_verb_stands_once_under_its_heading(cli):
    code, out, _ = cli("--help")
    assert code == 0 and list(SECTIONS) == HEADINGS
    shown: dict[str, list[str]] = {}
    heading = ""
    for line in out.splitlines():
        if line[:1].strip() and line.endswith(":"):
            heading = line[:-1]
        elif match := re.match(r"  ([a-z]+)  ", line):
            shown.setdefault(heading, []).append(match[1])
    assert [name for name in shown if name != "Options"] == HEADINGS
    assert {name: verbs for name, verbs in shown.items() if name in HEADINGS} == {
        name: list(verbs) for name, verbs in SECTIONS.items()
    }


def test_each_verb_has_its_module_and_no_module_is_left_over():
    modules = {path.stem for path in (ROOT / "hpctrain" / "cli").glob("*.py")}
    assert {module for module, _ in VERBS.values()} == modules - {"__init__", "common", "complete"}


def test_the_flow_of_a_run_is_the_order_of_its_verbs():
    order = list(VERBS)
    flow = ["init", "check", "plan", "render", "ladder", "chain", "status", "triage", "report"]
    assert sorted(flow, key=order.index) == flow


def test_each_verb_is_one_line_of_a_narrow_terminal():
    for verb, (_, text) in VERBS.items():
        assert len(f"  {verb:10}  {text}") <= 78 and not text.endswith("."), verb
