"""The ladder's rungs as they are planned: own output, the same global batch, the toggles of the recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hpctrain.errors import UsageError
from hpctrain.ladder import plan_rungs

EXAMPLE = Path(__file__).parents[2] / "examples" / "lumi-neox-sft"


@pytest.fixture
def example(tmp_path):
    shutil.copytree(EXAMPLE, tmp_path / "run", ignore=shutil.ignore_patterns("runs"))
    return str(tmp_path / "run" / "run.yaml")


def test_the_global_batch_stays_the_same_and_every_rung_has_its_own_output(example):
    rungs = plan_rungs(example, [], [8, 16, 64], 150, "00:30:00")
    assert [rung.changes["config.gradient_accumulation_steps"] for rung in rungs] == [192, 96, 24]
    for rung in rungs:
        plan = rung.loaded.plan
        config = plan.spec.config
        data = plan.spec.num_nodes * plan.gpus_per_node // 8  # tensor parallelism 8
        assert config["train_batch_size"] == 576 == 3 * config["gradient_accumulation_steps"] * data
        assert config["train_iters"] == 150 and plan.spec.num_links == 1
    assert len({rung.run_dir for rung in rungs}) == len({rung.loaded.plan.spec.checkpoint_dir for rung in rungs}) == 3


def test_every_rung_that_cannot_be_is_named_at_once(example):
    with pytest.raises(UsageError) as error:
        plan_rungs(example, [], [1, 2, 8], 150, "00:30:00")
    text = str(error.value)
    assert "1 ranks cannot be split" in text and "2 ranks cannot be split" in text


def test_a_batch_that_does_not_divide_is_refused(example):
    with pytest.raises(UsageError, match="cannot be kept"):
        plan_rungs(example, [], [40], 150, "00:30:00")


def test_a_dry_run_writes_nothing(hpctrain, example):
    top = Path(example).parent
    before = sorted(top.rglob("*"))
    done = hpctrain("ladder", example, "--rungs", "8,16", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert [rung["gpus"] for rung in json.loads(done.stdout)["rungs"]] == [8, 16]
    assert sorted(top.rglob("*")) == before
