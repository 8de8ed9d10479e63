"""The hf-sft recipe: what run.yaml says is what the trainer reads; quantised bases and figures that
contradict are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpctrain.config.document import parse_yaml
from hpctrain.config.trainers.trl import parse_config, quantised_name
from hpctrain.plan.load import load_plan
from hpctrain.plan.make import Plan

# The seed's own command line, in its own words.
SEED: dict[str, Any] = {
    "model_name": "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 4,
    "save_steps": 2000,
    "torch_compile": True,
    "dataset_rows": 500_000,
    "learning_rate": "2e-4",
    "lora": {"r": 16},
}
RUN: dict[str, Any] = {
    "name": "phase1a",
    "site": "generic-cuda",
    "recipe": "hf-sft",
    "partition": "gpu",
    "nodes": 1,
    "gpus_per_node": 1,
    "time": "24h",
    "checkpoint": {"dir": "ckpt"},
    "data": {"train": ["data/public_500k.jsonl"]},
    "chain": {"jobs": 9},
    "config": SEED,
}


def plan_of(folder: Path, config: Any = (), options: Any = (), **changes: Any) -> Plan:
    run = {**RUN, **changes, "config": {**SEED, **dict(config)}, "recipe_options": dict(options)}
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    return load_plan(str(folder / "run.yaml")).plan


def decided(plan: Plan) -> dict[str, Any]:
    return {decision.name: decision.value for decision in plan.resolved.decisions}


def what(plan: Plan, level: str = "error") -> list[str]:
    return [problem.what for problem in plan.problems if problem.level == level]


def test_the_trainer_reads_back_what_the_run_says(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.errors == []
    config, problems = parse_config(
        parse_yaml(plan.resolved.configs["config_sft.yaml"], "c"), "/elsewhere"
    )

    assert problems == []
    for key, value in SEED.items():
        assert config.values[key] == value or key in ("learning_rate", "lora"), key
    assert (config.learning_rate, config.lora["r"], config.precision) == (2e-4, 16, "bf16")
    assert config.dataset_path == str(tmp_path / "data/public_500k.jsonl")
    # 500,000 rows / (4 x 2) = 62,500 steps an epoch
    assert config.max_steps == 187_500 == plan.resolved.guard.target
    assert plan.resolved.guard.layout == "hf-trainer" and plan.signal["forward"]
    assert plan.resolved.argv[-2:] == ("-m", "hpctrain.train.trl")
    assert decided(plan)["batch.train_batch_size"] == 8


@pytest.mark.parametrize(
    "rows, ranks, steps",
    [(60, 1, 24), (60, 2, 12), (61, 1, 24), (57, 1, 24), (56, 1, 21), (1, 8, 3)],
)
def test_steps_are_counted_as_transformers_does(rows: int, ranks: int, steps: int) -> None:
    config, _ = parse_config(
        parse_yaml(json.dumps({"model_name": "a", "dataset_path": "b"}), "c"), "/"
    )

    assert config.steps_for(rows, ranks) == steps


def test_a_base_config_is_read_and_its_mistakes_point_at_it(tmp_path: Path) -> None:
    (tmp_path / "training_config.yaml").write_text(
        "model_name: ./base\nmax_length: 512\nnum_epochs: 3\n"
    )
    plan = plan_of(tmp_path, options={"base_config": "training_config.yaml"})

    (problem,) = plan.errors
    assert problem.where == "training_config.yaml:3:1" and "num_train_epochs" in problem.hint
    (tmp_path / "training_config.yaml").write_text("model_name: ./base\nmax_length: 512\n")
    assert (
        "\nmax_length: 512\n"
        in plan_of(tmp_path, options={"base_config": "training_config.yaml"}).resolved.configs[
            "config_sft.yaml"
        ]
    )


@pytest.mark.parametrize(
    "name",
    [
        "unsloth/meta-llama-3.1-8b-instruct-unsloth-bnb-4bit",
        "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
        "a/Llama-8bit",
        "TheBloke/Llama-2-7B-GPTQ",
        "a/Llama-3-8B-AWQ",
        "a/llama-3-8b-awq",
        "a/Llama-3-8B-GPTQ-Int4",
        "/m/Llama-3.1-8B.Q4_K_M",
        "a/Llama-gguf",
        "a/Llama-3.1-8B-FP8",
        "a/Llama-3.1-8B-quantized.w4a16",
        "a/Mixtral-HQQ",
        "a/llama-4-bit",
        "a/gpt-oss-20b-mxfp4",
    ],
)
def test_quantised_bases_are_known_by_their_names(name: str, tmp_path: Path) -> None:
    assert quantised_name(name)
    assert any(
        "is a quantised base" in text for text in what(plan_of(tmp_path, {"model_name": name}))
    )


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "/data/gptq-project/Llama-3.1-8B",
        "mistralai/Mixtral-8x7B-v0.1",
        "Qwen/Qwen2.5-14B-Instruct-1M",
        "a/Llama-3-8B-16k",
        "HuggingFaceTB/SmolLM-135M",
        "a/opt-4b",
        "bits/of-llama",
        "google/gemma-4b-it",
        "a/hawq",
        "a/phi-3-mini-4k-instruct",
    ],
)
def test_full_precision_names_are_let_through(name: str) -> None:
    assert quantised_name(name) == ""


@pytest.mark.parametrize(
    "found, words",
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "(bitsandbytes)",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "(gptq)"),
    ],
)
def test_a_base_whose_config_says_so_is_refused_where_it_can_be_seen(
    found: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base = tmp_path / "innocent name"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(found))

    assert any(words in text for text in what(plan_of(tmp_path, {"model_name": str(base)})))


def test_an_adapter_of_a_quantised_base_is_refused(tmp_path: Path) -> None:
    start = tmp_path / "checkpoint-7"
    start.mkdir()
    (start / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "unsloth/llama-bnb-4bit"})
    )
    plan = plan_of(tmp_path, checkpoint={"dir": "ckpt", "start": str(start)})

    assert any("unsloth/llama-bnb-4bit" in text and "start" in text for text in what(plan))
    (start / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "meta-llama/Llama"})
    )
    assert what(plan_of(tmp_path, checkpoint={"dir": "ckpt", "start": str(start)})) == []
    assert any(
        "is an adapter of" in text for text in what(plan_of(tmp_path, {"model_name": str(start)}))
    )


@pytest.mark.parametrize(
    "config, words",
    [
        ({"load_in_4bit": True}, "would quantise the base"),
        ({"trainer": {"output_dir": "/x"}}, "decided by the run itself"),
        ({"trainer": {"learning_rate": 1}}, "has a key of its own"),
        ({"lora": {"target_modules": []}}, "nothing would be trained"),
        ({"num_train_epochs": 1, "dataset_rows": None}, "must know when the run is done"),
        ({"dataset_path": "/x"}, "named twice"),
        ({"start": "/x"}, "is set as `checkpoint.start`"),
        ({"save_total_limit": 1}, "is less than 2"),
        ({"per_device_batch": 4}, "unknown key `per_device_batch`"),
        ({"warmup_steps": 9, "max_steps": 5}, "above `max_steps: 5`"),
    ],
)
def test_mistakes_point_at_their_line_of_run_yaml(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, config)
    (problem,) = [problem for problem in plan.errors if words in problem.what]

    assert problem.where.startswith(str(tmp_path / "run.yaml:")) and plan.resolved.configs == {}


def test_the_seed_s_throughput_and_duration_cannot_both_hold(tmp_path: Path) -> None:
    seed = {
        "samples_per_hour": 7200,
        "expected_time": "12h",
        "gpu_hour_price": 2.5,
        "expected_cost": 30,
    }
    plan = plan_of(tmp_path, options=seed)
    time, cost = (
        next(problem for problem in plan.errors if word in problem.what)
        for word in ("rows an hour", "a cost of 30")
    )

    assert "7,200 rows an hour and 12 h" in time.what
    assert "500,000 rows x 3 epochs take 208 h" in time.why and "125,000 an hour" in time.why
    assert "208.3 h x 1 GPUs x 2.5 a GPU-hour = 520.83" in cost.why
    # Either of them alone is believed.
    assert (
        decided(plan_of(tmp_path, options={"samples_per_hour": 7200}))["estimate.training_time"]
        == "208 h"
    )
    alone = plan_of(
        tmp_path, options={"expected_time": "12h", "gpu_hour_price": 2.5, "expected_cost": 30}
    )
    assert alone.errors == [] and decided(alone)["estimate.cost"] == "30.00"
    assert (
        plan_of(tmp_path, options={"samples_per_hour": 125_000, "expected_time": "12h"}).errors
        == []
    )


def test_figures_that_contradict_a_measured_step_are_refused(tmp_path: Path) -> None:
    # 8 rows in 4 s are 7,200 an hour.
    assert (
        plan_of(tmp_path, options={"samples_per_hour": 7200}, estimate={"step_time_s": 4}).errors
        == []
    )
    plan = plan_of(tmp_path, options={"samples_per_hour": 7200}, estimate={"step_time_s": 1})

    assert ["`samples_per_hour: 7200` and `step_time_s: 1` cannot both hold"] == what(plan)


def test_a_chain_that_is_too_short_is_warned_of(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, options={"samples_per_hour": 7200}, chain={"jobs": 2})

    (problem,) = [problem for problem in plan.problems if problem.level == "warning"]
    assert (
        "208 h of training do not fit into 2 x 1-00:00:00" in problem.what
        and problem.hint == "`chain: {jobs: 9}`"
    )


def test_checkpoints_further_apart_than_a_job_is_long_are_warned_of(tmp_path: Path) -> None:
    # 2000 steps of 8 rows at 7,200 an hour
    assert (
        decided(plan_of(tmp_path, options={"samples_per_hour": 7200}))["checkpoint.interval"]
        == "2.22 h"
    )
    plan = plan_of(tmp_path, options={"samples_per_hour": 7200}, time="2h", chain={"jobs": 200})

    (problem,) = [problem for problem in plan.problems if problem.level == "warning"]
    assert (
        "no checkpoint comes within `time: 02:00:00`" in problem.what
        and problem.hint == "`save_steps: 450` or so"
    )


@pytest.mark.parametrize(
    "stage, site, folder",
    [
        ("auto", "generic-cuda", "/tmp/{user}-{job}-data"),
        ("auto", "lumi", "none"),
        ("node", "lumi", "/tmp/{user}-{job}-data"),
        ("none", "generic-cuda", "none"),
        ("/local/nvme", "generic-cuda", "/local/nvme/{user}-{job}-data"),
    ],
)
def test_data_is_staged_where_nodes_have_a_disk(
    stage: str, site: str, folder: str, tmp_path: Path
) -> None:
    more = {"account": "project_465000001", "partition": "small-g"} if site == "lumi" else {}
    plan = plan_of(tmp_path, options={"stage": stage}, site=site, **more)

    assert plan.errors == [] and decided(plan)["data.stage"] == folder
    assert (plan.resolved.template["stage"] is None) == (folder == "none")


def test_a_stage_of_one_s_own_is_a_folder_and_seen_in_the_container(tmp_path: Path) -> None:
    assert what(plan_of(tmp_path, options={"stage": "local"})) == [
        "`stage: local` is no folder of a node"
    ]

    plan = plan_of(tmp_path, options={"stage": "/local/nvme"}, container="/images/torch.sif")
    assert plan.errors == [] and "/local/nvme" in plan.container


def test_a_rung_of_the_ladder_is_a_valid_run(tmp_path: Path) -> None:
    from hpctrain.jobs.ladder import plan_rungs

    plan_of(
        tmp_path,
        options={"samples_per_hour": 125_000, "expected_time": "12h"},
        nodes=1,
        gpus_per_node=8,
    )
    rungs = plan_rungs(str(tmp_path / "run.yaml"), [], [1, 2, 8], 100, "30m")

    assert [rung.loaded.plan.resolved.guard.target for rung in rungs] == [100, 100, 100]
    assert [decided(rung.loaded.plan)["batch.train_batch_size"] for rung in rungs] == [64, 64, 64]


def test_as_a_stage_it_takes_the_model_of_the_one_before_and_leaves_its_own(tmp_path: Path) -> None:
    from hpctrain.jobs.pipeline.stages import load_pipeline

    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "chain": {"jobs": 1}}))
    stages = {
        "domain": {
            "run": "run.yaml",
            "set": {
                "name": "domain",
                "checkpoint.dir": "one",
                "config.export_dir": "models/domain",
            },
        },
        "task": {
            "run": "run.yaml",
            "from": "domain",
            "hand_over": "model",
            "set": {"name": "task", "checkpoint.dir": "two"},
        },
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"name": "p", "stages": stages}))

    first, second = load_pipeline(str(tmp_path / "pipeline.yaml")).stages

    left = str(tmp_path / "models" / "domain")
    assert first.plan.errors == second.plan.errors == []
    assert (
        first.plan.resolved.model == left
        and f"export_dir: {left}\n"
        in first.plan.resolved.configs["config_sft.yaml"].replace("'", "").replace('"', "")
    )
    config, _ = parse_config(parse_yaml(second.plan.resolved.configs["config_sft.yaml"], "c"), "/")
    assert config.model_name == left and second.plan.resolved.model is None
