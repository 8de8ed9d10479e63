"""What a log says does not depend on what launchers, containers and loggers put on its lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
sys.path.insert(0, str(TESTS))
from triage_dress import DRESSES  # noqa: E402
from triage_texts import diagnose  # noqa: E402

SETS = ("triage", "triage-held-out", "triage-open", "triage-2026")
_ENOUGH = 0.99


def logs_of_others():
    """(text, tasks per node) of each labelled log in which no job script of ours speaks: that one
    writes its lines without a prefix."""
    for name in SETS:
        folder = TESTS / "data" / name
        for log, label in json.loads((folder / "labels.json").read_text(encoding="utf-8")).items():
            text = (folder / log).read_bytes() if "files" not in label else b"hpctrain: "
            if b"hpctrain: " not in text:
                yield text, label.get("tasks_per_node")


@pytest.fixture(scope="module")
def undressed():
    return [
        (text, tasks, diagnose(text, tasks_per_node=tasks).verdict)
        for text, tasks in logs_of_others()
    ]


@pytest.mark.parametrize("dress", DRESSES)
def test_the_verdict_is_the_same_whatever_the_lines_wear(dress, undressed):
    same = sum(
        diagnose(DRESSES[dress](text), tasks_per_node=tasks).verdict == verdict
        for text, tasks, verdict in undressed
    )
    assert len(undressed) > 300
    assert same >= _ENOUGH * len(undressed)
