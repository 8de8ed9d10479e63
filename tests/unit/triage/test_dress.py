"""What a log says does not depend on what launchers, containers and loggers put on its lines."""

from __future__ import annotations

import json
import random
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


def test_a_healthy_log_is_not_called_red_wherever_it_is_cut():
    """Of a job that runs the end is not there yet, of a log that was rotated the beginning."""
    rnd, told = random.Random(5), []
    for name in SETS:
        folder = TESTS / "data" / name
        for log, label in json.loads((folder / "labels.json").read_text(encoding="utf-8")).items():
            if label["verdict"] != "GREEN" or not label.get("scored", True) or "files" in label:
                continue
            lines = (folder / log).read_bytes().splitlines(keepends=True)
            at = rnd.randrange(len(lines))
            told += [diagnose(b"".join(part)).verdict for part in (lines[: at + 1], lines[at:])]
    assert len(told) > 200 and told.count("RED") <= 0.01 * len(told)
