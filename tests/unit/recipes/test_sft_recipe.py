"""The sft recipe: what run.yaml says is what the trainer reads, and mistakes point at run.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hpctrain.config.document import parse_yaml
from hpctrain.config.trainers.sft import parse_config
from hpctrain.plan.load import load_plan
from hpctrain.plan.make import Plan

RUN: dict[str, Any] = {
    "name": "ft",
    "site": "local",
    "recipe": "sft",
    "nodes": 2,
    "tasks_per_node": 2,
    "time": "10m",
    "checkpoint": {"dir": "ckpt"},
    "data": {"train": ["data/set.bin"]},
    "recipe_options": {"model": "tiny model"},
    "config": {"train_iters": 30, "train_batch_size": 8, "seq_length": 128},
}


def plan_of(folder: Path, **changes: Any) -> Plan:
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, **changes}, sort_keys=False))
    return load_plan(str(folder / "run.yaml")).plan


def test_the_trainer_reads_back_what_the_run_says(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, config={**RUN["config"], "lr": "3e-4", "loss_mask_pairs": [5, 5]})
    assert plan.errors == []
    config, problems = parse_config(
        parse_yaml(plan.resolved.configs["config.yml"], "config.yml"), "/elsewhere"
    )

    assert problems == []
    assert config.model == str(tmp_path / "tiny model") and config.train_data_paths == (
        str(tmp_path / "data/set"),
    )
    assert (config.train_iters, config.seq_length, config.lr) == (30, 128, 3e-4)
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (8, 2)
    assert config.loss_mask_pairs == (5, 5) and config.loss_mask_alternating_individual == (8,)
    assert set(plan.resolved.config_for.values()) == {"config.yml"}
    assert (
        plan.resolved.guard.layout,
        plan.resolved.guard.target,
        plan.resolved.guard.data_parallel,
    ) == ("deepspeed", 30, 4)
    assert plan.signal["forward"] and plan.resolved.argv[-2:] == ("-m", "hpctrain.train.sft")


def test_the_signal_of_the_run_is_the_one_the_trainer_stops_on(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, sbatch={"signal": "B:USR2@90"})

    assert (
        plan.signal["name"] == "USR2"
        and "stop_signal: USR2\n" in plan.resolved.configs["config.yml"]
    )


@pytest.mark.parametrize(
    "changes,line,words",
    [
        (
            {"config": {**RUN["config"], "train_batch_size": 10}},
            "train_batch_size: 10",
            "cannot be had with 4 ranks",
        ),
        (
            {"config": {**RUN["config"], "train_iter": 3}},
            "train_iter: 3",
            "unknown key `train_iter`",
        ),
        ({"config": {**RUN["config"], "zero_stage": 9}}, "zero_stage: 9", "more than 3"),
        ({"config": {**RUN["config"], "model": "x"}}, "model: x", "set as `recipe_options.model`"),
        ({"data": {}}, "data:", "no training data"),
        ({"checkpoint": {}}, "checkpoint:", "needs a folder"),
        (
            {"config": {"train_epochs": 2}, "chain": {"jobs": 3}},
            "train_epochs: 2",
            "must know when the run is done",
        ),
    ],
)
def test_mistakes_point_at_their_line_of_run_yaml(
    tmp_path: Path, line_of_error: Any, changes: dict[str, Any], line: str, words: str
) -> None:
    assert line in line_of_error(tmp_path / "run.yaml", plan_of(tmp_path, **changes), words)
