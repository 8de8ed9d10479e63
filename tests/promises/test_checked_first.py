"""Whoever submits, checks first: what `check` would refuse is not rendered, and not queued."""

from __future__ import annotations

import json

import pytest

from hpctrain.base.errors import Refused
from hpctrain.plan import gate
from hpctrain.plan.load import load_plan

RUN = {
    "name": "r",
    "site": "local",
    "recipe": "command",
    "time": "10m",
    "secrets": "secrets.env",
    "recipe_options": {"argv": ["hostname"], "workdir": "/"},
}
STAGED = {"name": "p", "stages": {"a": {"run": "run.yaml"}}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(json.dumps(RUN))
    (tmp_path / "pipeline.yaml").write_text(json.dumps(STAGED))
    (tmp_path / "secrets.env").write_text("TOKEN=x\n")
    (tmp_path / "secrets.env").chmod(0o644)
    monkeypatch.chdir(tmp_path)
    return tmp_path


VERBS = [
    ("render",),
    ("render", "--dry-run"),
    ("chain", "--dry-run"),
    ("chain",),
    ("pipeline", "--dry-run"),
    ("pipeline",),
    ("preflight", "--submit"),
]


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_what_check_refuses_is_not_submitted_and_nothing_is_written(words, folder, cli):
    before = sorted(folder.rglob("*"))

    code, out, said = cli(*words)

    assert (code, out) == (4, "")
    assert "others can read the secrets file" in said
    assert "chmod 600" in said and "--no-check" in said
    assert sorted(folder.rglob("*")) == before


def test_no_check_renders_all_the_same_and_the_ledger_keeps_what_was_waived(folder, cli):
    code, out, said = cli("render", "--no-check")

    assert code == 0 and out.strip().endswith("job.sbatch")
    assert "others can read the secrets file" in said
    (line,) = (folder / "runs/r/ledger.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["event"] == "unchecked"
    assert any("others can read the secrets file" in what for what in record["problems"])
    code, out, _ = cli("status", "runs/r", "--json")
    (run,) = json.loads(out)["runs"]
    assert (code, run["state"], run["links"], run["unseen"]) == (1, "not submitted", [], [])


def test_a_sound_run_leaves_no_such_record(folder, cli):
    (folder / "secrets.env").chmod(0o600)

    assert cli("render")[0] == 0
    assert not (folder / "runs/r/ledger.jsonl").exists()


def test_no_check_never_passes_a_wrong_run_yaml(folder, cli):
    (folder / "run.yaml").write_text(json.dumps({**RUN, "nodes": 0}))

    assert cli("render", "--no-check")[0] == 2


def test_more_links_than_the_run_asks_for_meet_the_rules_of_a_chain(folder, cli):
    """`argv` that writes no checkpoints may run once; five links of it would train the same
    again."""
    (folder / "secrets.env").chmod(0o600)
    for words in (("--jobs", "5"), ("--extend", "2")):
        code, _, said = cli("chain", "--dry-run", *words)

        assert code == 2 and "needs to know the checkpoints" in said, said
    assert cli("chain", "--dry-run")[0] == 0


def test_all_problems_of_all_runs_are_told_at_once(folder):
    (folder / "other.env").write_text("TOKEN=x\n")
    (folder / "other.env").chmod(0o640)
    runs = [load_plan("run.yaml", [f"secrets={name}.env"]) for name in ("secrets", "other")]

    with pytest.raises(Refused) as refused:
        gate.require_sound(runs)

    said = [problem.what for problem in refused.value.problems]
    assert [" ".join(what.split()[:6]) for what in said] == ["others can read the secrets file"] * 2
