"""The dpo recipe: what run.yaml and a config_dpo.yaml say is what the trainer reads, and mistakes
point at their line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hpctrain.config.document import parse_yaml
from hpctrain.config.trainers.dpo import parse_config
from hpctrain.plan.load import load_plan
from hpctrain.plan.make import Plan

TRAINING = {
    "batch_size": 2,
    "max_steps": 30,
    "learning_rate": "5e-7",
    "gradient_accumulation_steps": 4,
}
RUN: dict[str, Any] = {
    "name": "pref",
    "site": "local",
    "recipe": "dpo",
    "nodes": 2,
    "tasks_per_node": 2,
    "time": "10m",
    "checkpoint": {"dir": "ckpt"},
    "data": {"train": ["data/pairs.jsonl"]},
    "config": {"policy_name": "./tiny model", "dpo_training": TRAINING},
}
SEED = (
    "policy_name: org/a\nref_name: ./ref\nprecision: fp32\ndpo_training:\n  epochs: 3\n  fsdp:"
    " false\n  bta: 0.1\n"
)


def plan_of(folder: Path, **changes: Any) -> Plan:
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, **changes}, sort_keys=False))
    return load_plan(str(folder / "run.yaml")).plan


def test_the_trainer_reads_back_what_the_run_says(tmp_path: Path) -> None:
    (tmp_path / "config_dpo.yaml").write_text(SEED.replace("  bta: 0.1\n", ""))
    plan = plan_of(tmp_path, recipe_options={"base_config": "config_dpo.yaml"})
    assert plan.errors == []
    config, problems = parse_config(
        parse_yaml(plan.resolved.configs["config_dpo.yaml"], "c"), "/elsewhere"
    )

    assert problems == []
    assert config.policy_name == str(tmp_path / "tiny model") and config.ref_name == str(
        tmp_path / "ref"
    )
    assert config.dataset["dataset_name"] == str(tmp_path / "data/pairs.jsonl")
    # run.yaml over config_dpo.yaml over the recipe
    assert (config.training["learning_rate"], config.training["fsdp"], config.precision) == (
        5e-7,
        False,
        "fp32",
    )
    assert set(plan.resolved.config_for.values()) == {"config_dpo.yaml"}
    assert (plan.resolved.guard.layout, plan.resolved.guard.target) == ("dcp", 30)
    assert plan.signal["forward"] and plan.resolved.argv[-2:] == ("-m", "hpctrain.train.dpo")
    decided = {decision.name: decision.value for decision in plan.resolved.decisions}
    assert decided["batch.train_batch_size"] == 2 * 4 * 4


def test_a_run_from_a_checkpoint_is_held_to_that_checkpoint_in_every_link(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, checkpoint={"dir": "ckpt", "start": "sft/exported"}, chain={"jobs": 3})
    assert plan.errors == []

    config, _ = parse_config(
        parse_yaml(plan.resolved.configs["config_dpo.yaml"], "c"), "/elsewhere"
    )
    assert config.ref_name == str(tmp_path / "sft/exported")


def test_the_signal_of_the_run_is_the_one_the_trainer_stops_on(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, sbatch={"signal": "B:USR2@90"})

    assert (
        plan.signal["name"] == "USR2"
        and "  stop_signal: USR2\n" in plan.resolved.configs["config_dpo.yaml"]
    )


@pytest.mark.parametrize(
    "changes,line,words",
    [
        (
            {"config": {"policy_name": "./m", "dpo_training": {"bta": 3}}},
            "bta: 3",
            "unknown key `dpo_training.bta`",
        ),
        (
            {"config": {"policy_name": "./m", "dpo_training": {"beta": "x"}}},
            "beta: x",
            "must be a number",
        ),
        (
            {"config": {"policy_name": "./m", "dpo_training": {"loss_type": "ipo"}}},
            "loss_type: ipo",
            "not one of them",
        ),
        (
            {"config": {"policy_name": "./m", "dataset": {"dataset_name": "/x"}}},
            "- data/pairs",
            "named twice",
        ),
        ({"data": {}}, "policy_name:", "`dataset` is missing"),
        ({"checkpoint": {}}, "checkpoint:", "needs a folder"),
        (
            {"config": {"policy_name": "./m", "dpo_training": {"epochs": 2}}, "chain": {"jobs": 3}},
            "epochs: 2",
            "when the run is done",
        ),
    ],
)
def test_mistakes_point_at_their_line_of_run_yaml(
    tmp_path: Path, line_of_error: Any, changes: dict[str, Any], line: str, words: str
) -> None:
    assert line in line_of_error(tmp_path / "run.yaml", plan_of(tmp_path, **changes), words)


def test_mistakes_of_the_base_config_point_at_their_line_there(tmp_path: Path) -> None:
    (tmp_path / "config_dpo.yaml").write_text(SEED)
    plan = plan_of(tmp_path, recipe_options={"base_config": "config_dpo.yaml"})

    assert [problem.where for problem in plan.errors] == ["config_dpo.yaml:7:3"]


def test_one_process_with_fsdp_is_warned_of(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, nodes=1, tasks_per_node=1)

    assert plan.errors == [] and any("shards nothing" in problem.what for problem in plan.problems)
