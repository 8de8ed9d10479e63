"""`notify:` of run.yaml reaches the guard as it stands there."""

from __future__ import annotations

import json
from pathlib import Path

from hpctrain.plan.load import load_plan
from hpctrain.plan.run_dir import run_files

EXAMPLE = Path(__file__).parents[3] / "examples" / "hello" / "run.yaml"


def test_the_guard_knows_whom_to_tell_and_nothing_of_it_without(tmp_path):
    for given, wanted in ([], None), (["notify=$HOOK"], "$HOOK"):
        loaded = load_plan(str(EXAMPLE), given, str(tmp_path))
        plan = json.loads(run_files(loaded)["plan.json"])
        assert loaded.plan.errors == [] and plan["guard"].get("notify") == wanted
