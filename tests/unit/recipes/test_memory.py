"""GPU memory: the formulas against other people's readings, and what a run is told by them."""

from __future__ import annotations

import csv
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hpctrain.plan.load import load_plan
from hpctrain.recipes.known_models import SHAPES, shape_by_name
from hpctrain.recipes.memory import Layout, Shape, shape_of
from hpctrain.recipes.pace import pace

BENCH = runpy.run_path(str(Path(__file__).parents[3] / "tools/benches/memory.py"))
with (Path(__file__).parents[2] / "data/memory/points.csv").open() as file:
    POINTS = list(csv.DictReader(file))
FIGURES = BENCH["figures_of"](POINTS)
# Published numbers of parameters, in billions.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6.738,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8.030,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": 8.030,
    "meta-llama/Llama-3.3-70B-Instruct": 70.554,
    "meta-llama/Llama-3.1-405B": 405.853,
    "meta-llama/Llama-3.2-1B": 1.236,
    "meta-llama/Llama-3.2-3B": 3.213,
    "mistralai/Mistral-7B-v0.1": 7.242,
    "mistralai/Mixtral-8x7B-v0.1": 46.703,
    "Qwen/Qwen2.5-0.5B": 0.494,
    "Qwen/Qwen2.5-7B": 7.616,
    "Qwen/Qwen2.5-72B": 72.706,
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-30B-A3B": 30.532,
    "Qwen/Qwen3-235B-A22B": 235.094,
    "google/gemma-2b": 2.506,
    "google/gemma-7b": 8.538,
}


@pytest.mark.parametrize("part", ["fitted", "kept back"])
def test_predictions_come_near_the_readings(part):
    figures = FIGURES[part]

    assert figures["n"] >= 60
    assert figures["median"] <= 6 and figures["p90"] <= 18


def test_the_three_levels_accuse_no_run_that_fitted_beyond_what_is_said():
    figures = FIGURES["all"]

    assert figures["cannot_wrong"] == figures["likely_wrong"] == 0
    assert FIGURES["litgpt"]["cannot_wrong"] == 0
    assert figures["tight_wrong"] / figures["fits"] <= 0.05
    assert figures["likely"] / figures["ooms"] >= 0.70
    assert figures["tight"] / figures["ooms"] >= 0.92


def test_the_lower_bound_lies_below_every_reading():
    above = []
    for row in POINTS:
        shape = BENCH["shape_of"](row)
        if shape is None or not BENCH["usable"](row) or not row["peak_gib"]:
            continue
        found = BENCH["need"](shape, BENCH["layout_of"](row, shape))
        if found.least > float(row["peak_gib"]):
            above.append((row["id"], found.least, row["peak_gib"]))
        assert sum(found.parts.values()) == pytest.approx(found.allocated)
        assert found.least <= found.allocated <= found.total

    assert above == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_number_of_parameters(name):
    assert shape_by_name(name).parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=2e-3)


@pytest.mark.parametrize("name", ["org/my-llama", "Llama-3-8B2", "", "x/Qwen3-40B", "gemma-2bx"])
def test_a_name_of_no_published_model_tells_nothing(name):
    assert shape_by_name(name) is None


def test_a_config_json_tells_the_same_as_the_table():
    llama = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }

    assert shape_of(llama).parameters == SHAPES[next(iter(SHAPES))].parameters
    assert shape_of({**llama, "hidden_size": "big"}) is None
    assert shape_of({"text_config": llama}).layers == 32


RUN = {
    "name": "r",
    "site": "lumi",
    "recipe": "dpo",
    "account": "project_465001281",
    "partition": "standard-g",
    "nodes": 1,
    "time": "2h",
    "checkpoint": {"dir": "/scratch/project_465001281/c"},
    "data": {"train": ["/scratch/project_465001281/pairs.jsonl"]},
    "config": {
        "policy_name": "meta-llama/Llama-3.1-8B-Instruct",
        "dataset": {"max_len": 1024},
        "dpo_training": {"max_steps": 10, "batch_size": 1},
    },
}


def told(folder, training, **changes):
    run = {**RUN, **changes}
    run["config"] = {**RUN["config"], "dpo_training": {**RUN["config"]["dpo_training"], **training}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    plan = load_plan(str(folder / "run.yaml")).plan
    about = [one for one in plan.problems if one.what.startswith("it ")]
    decided = [one for one in plan.decisions if one.name == "memory.gpu_gib"]
    return about, decided[0]


def test_what_cannot_fit_is_refused_with_the_smallest_change_that_would(tmp_path):
    (problem,), decision = told(tmp_path, {"fsdp": False})

    assert problem.level == "error" and "cannot fit" in problem.what
    assert "weights 29.9" in problem.why and "optimizer 59.8" in problem.why
    assert "`fsdp: true`" in problem.hint and problem.where.startswith(str(tmp_path / "run.yaml:"))
    assert "of 63.4" in decision.reason


def test_what_was_measured_stands_in_for_the_estimate(tmp_path):
    many = {"batch_size": 16, "activation_checkpointing": False}
    (problem,), _ = told(tmp_path, many)
    fits, decision = told(tmp_path, many, estimate={"memory_gib": 41.5})
    (too_much,), _ = told(tmp_path, {}, estimate={"memory_gib": 70})

    assert problem.level == "error" and fits == [] and decision.value == 41.5
    assert "70 GiB expected" in too_much.what


def test_a_run_that_fits_is_told_nothing_but_its_need(tmp_path):
    about, decision = told(tmp_path, {"activation_checkpointing": True})

    assert about == [] and 10 < decision.value < 40


def test_a_site_that_does_not_say_its_gpus_memory_is_not_compared(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("extends: lumi\nname: mine\nnode_types: {lumi-g: {gpu_memory_gib: null}}\n")
    about, decision = told(tmp_path, {"fsdp": False}, site="./site.yaml")

    assert about == [] and "not compared" in decision.reason


def paced(gpu, style="megatron", stated=None, experts=0, adapters=None):
    """The step time said of seed 002's run: 30B on 192 nodes of eight, 576 rows of 8,192."""
    shape = Shape(60, 6144, 6144, 1024, 21504, 131072, experts=experts)
    layout = Layout("zero1", 8192 * 3, 8192, 192, 1536, 8, style=style, adapters=adapters)
    context = SimpleNamespace(
        node_type=SimpleNamespace(gpu_type=gpu),
        spec=SimpleNamespace(step_time_s=stated),
        gpus_per_node=8,
    )
    return {one.name: one for one in pace(context, shape, layout, 576, 1337)}


def test_a_step_time_is_a_range_of_runs_like_it_with_its_source():
    found = paced("mi250")
    low, high = map(float, re.findall(r"[\d.]+", found["estimate.step_time"].value))

    assert low < 17 < high  # what the run itself was measured to take
    assert "five 175B runs" in found["estimate.step_time"].reason
    assert "GPU-hours" in found["estimate.training_time"].reason


@pytest.mark.parametrize(
    "unknown",
    [
        {"gpu": "h200"},
        {"gpu": None},
        {"gpu": "mi250", "style": "hf"},
        {"gpu": "mi250", "stated": 17.0},
        {"gpu": "mi250", "experts": 8},
        {"gpu": "a100", "style": "hf", "adapters": 10},
    ],
)
def test_of_what_nobody_measured_no_time_is_said(unknown):
    assert paced(**unknown) == {}


LORA = {
    "recipe": "hf-sft",
    "gpus_per_node": 1,
    "config": {
        "model_name": "meta-llama/Llama-3.1-70B",
        "max_steps": 10,
        "per_device_train_batch_size": 1,
    },
}


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"trainer": {"fsdp": "full_shard"}},
        {"trainer": {"deepspeed": "zero3.json"}},
        {"optim": "adafactor"},
        {"precision": "fp32"},
        {},
    ],
)
def test_what_is_not_reckoned_is_not_refused(elsewhere, tmp_path):
    run = {**RUN, **LORA, "config": {**LORA["config"], **elsewhere}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    plan = load_plan(str(tmp_path / "run.yaml")).plan

    assert bool(elsewhere) != any("it cannot fit" in one.what for one in plan.problems)
