"""A recipe is one folder in templates/ and one module in recipes/: one that is added so goes through
every verb, and no other package has to know of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).parents[1] / "toy_recipe"
RUN = """\
name: first
site: local
recipe: toy
nodes: 2
time: 10m
checkpoint: {dir: checkpoints}
chain: {jobs: 2}
recipe_options: {steps: 12}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a run of the toy recipe, whose folder is the project's and whose module is where
    hpctrain's own are."""
    name = "hpctrain.recipes.toy"
    spec = importlib.util.spec_from_file_location(name, TOY / "toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "project"
    shutil.copytree(TOY / "templates", folder / ".hpctrain" / "templates")
    (folder / "run.yaml").write_text(RUN)
    monkeypatch.chdir(folder)
    return folder


def test_a_new_recipe_goes_through_the_verbs_that_write_a_run(project, cli):
    for words in (["check"], ["plan"], ["render"], ["chain", "--dry-run"], ["cost"]):
        code, out, err = cli(*words)
        assert code == 0, (words, out, err)
    run = project / "runs" / "first"
    assert "toy_look.py" in (run / "job.sbatch").read_text() and (run / "toy_look.py").exists()
    assert "steps" in json.loads((run / "plan.json").read_text())["decisions"][-1]["name"]
    code, out, _ = cli("init", "other", "--recipe", "toy", "--site", "local")
    assert code == 0 and "steps: 12" in (project / "other" / "run.yaml").read_text()


def test_a_mistake_in_its_options_is_told_at_its_place(project, cli):
    (project / "run.yaml").write_text(RUN.replace("steps: 12", "step: 0"))
    code, _, err = cli("plan")
    assert code == 2 and "run.yaml:8:" in err and "did you mean `steps`" in err


@pytest.mark.slurm
def test_it_is_rehearsed_with_its_own_stand_in(project, cli):
    code, out, err = cli("rehearse", "--json", "--no-accounting", "--speed", "100000")
    assert code == 0, (out, err)
    answer = json.loads(out)
    assert answer["ok"] and answer["jobs"]
