"""The open-instruct recipes: what run.yaml says is what the programs get, and mistakes point at
their line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpctrain.jobs.ladder import changes_for
from hpctrain.jobs.pipeline.stages import load_pipeline
from hpctrain.plan.load import load_plan
from hpctrain.plan.make import Plan
from hpctrain.recipes.open_instruct.arguments import flags, known_commits, match_commit, table
from hpctrain.recipes.open_instruct.draft import DPO, SFT

ROOT = Path(__file__).parents[3]
OLD, NEW = known_commits()
CONFIG = {"chat_template_name": "tulu", "max_train_steps": 200, "checkpointing_steps": 50}
OPTIONS = {"dir": "oi", "commit": NEW, "model": "org/base", "hf_home": "hf"}
RUN: dict[str, Any] = {
    "name": "tulu",
    "site": "generic-cuda",
    "recipe": "open-instruct-sft",
    "partition": "gpu",
    "nodes": 2,
    "time": "1h",
    "gpus_per_node": 4,
    "checkpoint": {"dir": "/data/ckpt/tulu"},
    "data": {"train": ["/data/sft.jsonl"]},
    "config": CONFIG,
    "recipe_options": OPTIONS,
}


def plan_of(
    folder: Path,
    options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Plan:
    run = {**RUN, **changes}
    run["config"] = {**run["config"], **(config or {})}
    run["recipe_options"] = {**run["recipe_options"], **(options or {})}
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    return load_plan(str(folder / "run.yaml")).plan


def words(plan: Plan, part: str) -> list[str]:
    return [word for flag in plan.resolved.template[part] for word in flag]


def value_of(plan: Plan, flag: str) -> str:
    found = words(plan, "arguments")
    return found[found.index(f"--{flag}") + 1]


def whats(plan: Plan, level: str = "error") -> list[str]:
    return [problem.what for problem in plan.problems if problem.level == level]


def test_the_run_becomes_two_lists_of_flags(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, config={"learning_rate": "5e-6", "additional_model_arguments": {"a b": 1.5}}
    )
    launch, arguments = words(plan, "launch"), words(plan, "arguments")

    assert whats(plan) == []
    assert plan.tasks_per_node == 1 and plan.resolved.argv == (
        "python",
        "-u",
        "-m",
        "accelerate.commands.launch",
    )
    assert launch == [
        "--num_machines",
        "2",
        "--num_processes",
        "8",
        "--rdzv_backend",
        "static",
        "--mixed_precision",
        "bf16",
        "--dynamo_backend",
        "no",
        "--use_deepspeed",
        "--deepspeed_config_file",
        f"{plan.run_dir}/deepspeed.json",
        "--deepspeed_multinode_launcher",
        "standard",
        "--module",
        "open_instruct.finetune",
    ]
    assert arguments[arguments.index("--dataset_mixer_list") :][:3] == [
        "--dataset_mixer_list",
        "/data/sft.jsonl",
        "1.0",
    ]
    assert (
        value_of(plan, "learning_rate") == "5e-6"
        and value_of(plan, "output_dir") == "/data/ckpt/tulu"
    )
    assert json.loads(value_of(plan, "additional_model_arguments")) == {"a b": 1.5}
    # What open-instruct would do on its own, and must not.
    for flag in (
        "push_to_hub",
        "try_launch_beaker_eval_jobs",
        "try_auto_save_to_beaker",
        "clean_checkpoints_at_end",
    ):
        assert value_of(plan, flag) == "false"
    assert (
        value_of(plan, "do_not_randomize_output_dir") == "true"
        and value_of(plan, "keep_last_n_checkpoints") == "-1"
    )
    assert (
        plan.resolved.guard.layout,
        plan.resolved.guard.target,
        plan.resolved.guard.exported,
    ) == ("open-instruct", 200, True)
    assert plan.guard()["exported"] is True and plan.guard()["data_parallel"] == 8


def test_null_is_not_a_way_to_publish(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        config={
            "push_to_hub": None,
            "clean_checkpoints_at_end": None,
            "do_not_randomize_output_dir": None,
        },
    )

    assert [
        value_of(plan, flag)
        for flag in ("push_to_hub", "clean_checkpoints_at_end", "do_not_randomize_output_dir")
    ] == ["false", "false", "true"]


def test_the_environment_asks_no_hub_unless_told(tmp_path: Path) -> None:
    inside = {variable.name: variable.value for variable in plan_of(tmp_path).env}
    outside = plan_of(tmp_path, {"offline": False})

    assert inside["HF_HOME"] == f"{tmp_path}/hf" and inside["HF_HUB_OFFLINE"] == "1"
    assert (
        "HF_HUB_OFFLINE" not in {variable.name for variable in outside.env}
        and outside.resolved.hub == ()
    )


def test_deepspeed_gets_the_clipping_that_the_programs_ignore(tmp_path: Path) -> None:
    given = json.loads(
        plan_of(tmp_path, config={"clip_grad_norm": 0.5}).resolved.files["deepspeed.json"]
    )
    usual = json.loads(plan_of(tmp_path).resolved.files["deepspeed.json"])

    assert given["gradient_clipping"] == 0.5 and usual["gradient_clipping"] == 1.0
    assert usual["zero_optimization"]["stage"] == 3
    assert usual["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "optimizer" not in usual, "the programs make their own, and accelerate refuses two"


@pytest.mark.parametrize(
    "num_gpus,sharding,eight_bit,gas",
    [(1, "none", True, 16), (2, "zero3", False, 8), (8, "zero3", False, 2)],
)
def test_the_ladder_sets_the_toggles_and_keeps_the_global_batch(
    tmp_path: Path, num_gpus: int, sharding: str, eight_bit: bool, gas: int
) -> None:
    path = tmp_path / "run.yaml"
    full = plan_of(tmp_path, config={"gradient_accumulation_steps": 2})
    changes = changes_for(full, num_gpus, 100, "10m")
    rung = load_plan(
        str(path), [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    ).plan
    decided = {decision.name: decision.value for decision in rung.decisions}

    assert whats(rung) == []
    assert decided["launch.deepspeed"] == sharding and (
        "deepspeed.json" in rung.resolved.files
    ) == (num_gpus > 1)
    assert value_of(rung, "use_8bit_optimizer") == str(eight_bit).lower()
    assert (value_of(rung, "gradient_accumulation_steps"), decided["batch.train_batch_size"]) == (
        str(gas),
        128,
    )
    assert rung.spec.checkpoint_dir == f"/data/ckpt/tulu-ladder-{num_gpus}gpu", (
        "rungs would resume each other"
    )
    assert ("has no effect" in " ".join(whats(rung, "warning"))) == eight_bit, (
        "finetune.py uses it only with use_qlora"
    )


DPO_CHANGES: dict[str, Any] = {"recipe": "open-instruct-dpo"}
ONE_GPU = {"nodes": 1, "gpus_per_node": 1}


@pytest.mark.parametrize(
    "options,config,changes,line,said",
    [
        (
            {},
            {"use_8bit_optimizer": True},
            {},
            "use_8bit_optimizer: true",
            "does not work with DeepSpeed",
        ),
        (
            {"deepspeed": "none"},
            {"use_8bit_optimizer": True},
            {},
            "use_8bit_optimizer: true",
            "on 8 processes",
        ),
        ({}, {"use_qlora": True}, {}, "use_qlora: true", "does not work with DeepSpeed"),
        ({}, {"push_to_hub": True}, {}, "push_to_hub: true", "asks the Hugging Face hub"),
        ({}, {"clean_checkpoints_at_end": True}, {}, "clean_checkpoints", "deletes every step_N"),
        ({}, {"keep_last_n_checkpoints": 1}, {}, "keep_last", "no complete checkpoint"),
        ({}, {"do_not_randomize_output_dir": False}, {}, "do_not_rand", "named after `exp_name`"),
        ({}, {"resume_from_checkpoint": "/x"}, {}, "resume_from", "has no effect"),
        ({}, {"output_dir": "/x"}, {}, "output_dir: /x", "is set as `checkpoint.dir`"),
        ({}, {"dataset_mixer": {"a": 1}}, {}, "dataset_mixer:", "does not work on a command line"),
        ({}, {"dataset_mixer_list": ["a/b"]}, {"data": {}}, "dataset_mixer_list:", "must be pairs"),
        ({}, {"dataset_mixer_list": ["a/b", 0.5]}, {}, "- /data/sft.jsonl", "named twice"),
        (
            {},
            {"dataset_mixer_list": ["/d/x.csv", 1.0]},
            {"data": {}},
            "- /d/x.csv",
            "neither .jsonl nor .parquet",
        ),
        ({}, {"learning_rate": "fast"}, {}, "learning_rate: fast", "must be a number"),
        ({}, {"lr_scheduler_type": "cosin"}, {}, "lr_scheduler_type", "is not one of its values"),
        ({}, {"lerning_rate": 1}, {}, "lerning_rate", "has no argument `lerning_rate`"),
        ({}, {"use_flash_attn": True}, {}, "use_flash_attn", "has no argument"),
        (
            {},
            {"max_train_steps": 201},
            {"chain": {"jobs": 2}},
            "max_train_steps: 201",
            "would be step_200",
        ),
        ({}, {"max_train_steps": None}, {"chain": {"jobs": 2}}, "jobs: 2", "when the run is done"),
        ({}, {"checkpointing_steps": "Epoch"}, {}, "checkpointing_steps: Epoch", "saves nothing"),
        ({}, {"sequence_parallel_size": 3}, {}, "sequence_parallel_size: 3", "does not divide 8"),
        ({"commit": "main"}, {}, {}, "commit: main", "is no git commit"),
        (
            {"extra_arguments": ["--mine", "--push_to_hub=true"]},
            {},
            {},
            "- --mine",
            "has `--push_to_hub`, which the program knows",
        ),
        (
            {"extra_arguments": ["--output-dir", "/x"]},
            {},
            {},
            "- --output-dir",
            "has `--output_dir`",
        ),
        (
            {"entrypoint": "open_instruct/dpo.py"},
            {},
            DPO_CHANGES,
            "entrypoint",
            "started by torchrun",
        ),
        ({"entrypoint": "../finetune.py"}, {}, {}, "entrypoint", "no Python file below"),
        ({"model": "a/b/c"}, {}, {}, "model: a/b/c", "no name on the Hugging Face hub"),
        ({"model": None}, {}, {}, "recipe_options:", "no model to start from"),
        ({"hf_home": None}, {}, {}, "", "needs to know where"),
        (
            {},
            {},
            {"checkpoint": {"start": "/data/ckpt/sft/step_50", "dir": "/data/ckpt/dpo"}},
            "start:",
            "not a model",
        ),
        ({}, {"zero_stage": 3}, DPO_CHANGES, "zero_stage: 3", "second DeepSpeed configuration"),
        (
            {},
            {"dpo_use_paged_optimizer": True},
            DPO_CHANGES,
            "dpo_use_paged",
            "does not work with DeepSpeed",
        ),
        (
            {},
            {"checkpointing_steps": "epoch"},
            DPO_CHANGES,
            "checkpointing_steps: epoch",
            "must be a whole number",
        ),
    ],
)
def test_mistakes_point_at_their_line_of_run_yaml(
    tmp_path: Path,
    options: dict[str, Any],
    config: dict[str, Any],
    changes: dict[str, Any],
    line: str,
    said: str,
) -> None:
    plan = plan_of(tmp_path, options, config, **changes)
    (problem,) = [problem for problem in plan.errors if said in problem.what]
    lines = (tmp_path / "run.yaml").read_text().splitlines()

    assert plan.resolved.files == {}
    number = problem.where.removeprefix(str(tmp_path / "run.yaml")).split(":")[1:2]
    assert not line or line in lines[int(number[0]) - 1]


@pytest.mark.parametrize(
    "content,said",
    [
        ({"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}, None),
        (
            {"zero_optimization": {"stage": 2}},
            "has ZeRO stage 2, and the run is planned with zero3",
        ),
        ({}, "has ZeRO stage 0"),
        ({"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}, "has an `optimizer`"),
        (
            {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 99},
            "has `gradient_accumulation_steps: 99`",
        ),
        ([], "has ZeRO stage 0"),
        ("{", "is not JSON"),
    ],
)
def test_a_deepspeed_file_of_ones_own_must_fit_the_run(
    tmp_path: Path, content: Any, said: str | None
) -> None:
    (tmp_path / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    plan = plan_of(tmp_path, {"deepspeed_config": str(tmp_path / "ds.json")})

    assert [what for what in whats(plan) if "deepspeed_config" in what] == [
        what for what in whats(plan) if said and said in what
    ]
    assert bool(whats(plan)) == bool(said)
    assert whats(plan_of(tmp_path, {"deepspeed_config": "/at/the/site.json"})) == []


def test_the_8_bit_optimizer_is_fine_on_one_gpu_with_the_switch_that_upstream_asks_for(
    tmp_path: Path,
) -> None:
    plan = plan_of(
        tmp_path,
        config={"use_8bit_optimizer": True, "dpo_use_paged_optimizer": True},
        **{**DPO_CHANGES, **ONE_GPU},
    )

    assert whats(plan) == [] and not any("has no effect" in what for what in whats(plan, "warning"))


def test_epochs_end_a_chain_too(tmp_path: Path) -> None:
    config = {"max_train_steps": None, "num_train_epochs": 3, "checkpointing_steps": "epoch"}
    plan = plan_of(tmp_path, config=config, chain={"jobs": 3})

    assert whats(plan) == [] and plan.resolved.guard.target == 2, "epoch_0, epoch_1, epoch_2"


def test_a_share_stays_a_share_and_a_count_is_pointed_out(tmp_path: Path) -> None:
    mixer = ["a/b", 0.1, "c/d", 1.0, "e/f", 1, "g/h", "0.25", "i/j", 1.0e-3]
    plan = plan_of(tmp_path, config={"dataset_mixer_list": mixer}, data={})
    found = words(plan, "arguments")
    start = found.index("--dataset_mixer_list")

    assert found[start + 1 : start + 11] == [
        "a/b",
        "0.1",
        "c/d",
        "1.0",
        "e/f",
        "1",
        "g/h",
        "0.25",
        "i/j",
        "0.001",
    ]
    assert [what for what in whats(plan, "warning") if "1 samples of `e/f`" in what]


def test_a_folder_is_shown_to_finetune_py_as_a_repository_and_to_the_others_as_it_is(
    tmp_path: Path,
) -> None:
    start = {"start": "/data/models/my model", "dir": "/data/ckpt/x"}
    aliased, plain = (
        plan_of(tmp_path, checkpoint=start),
        plan_of(tmp_path, {"commit": OLD[:8]}, checkpoint=start),
    )
    dpo = plan_of(tmp_path, checkpoint=start, **DPO_CHANGES)

    assert value_of(aliased, "model_name_or_path") == "local/my-model"
    assert json.loads(aliased.resolved.files["caches.json"])["model"]["alias"] is True
    assert (
        value_of(plain, "model_name_or_path")
        == value_of(dpo, "model_name_or_path")
        == "/data/models/my model"
    )
    assert "/data/models/my model/config.json" in [path for _, path, _ in dpo.resolved.paths]
    assert [repo.repo_id for repo in dpo.resolved.hub] == []


def test_the_reference_is_kept_for_losses_that_have_one(tmp_path: Path) -> None:
    with_one = json.loads(plan_of(tmp_path, **DPO_CHANGES).resolved.files["caches.json"])
    without = json.loads(
        plan_of(tmp_path, config={"loss_type": "simpo"}, **DPO_CHANGES).resolved.files[
            "caches.json"
        ]
    )

    assert with_one["reference"]["concatenated_forward"] is True and without["reference"] is None
    assert with_one["cache_dir"] == "/data/ckpt/open-instruct-cache"


def test_an_argument_of_another_commit_names_that_commit(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"commit": OLD}, {"sequence_parallel_size": 2})
    (problem,) = [problem for problem in plan.errors if "sequence_parallel_size" in problem.what]

    assert (
        NEW[:7] in problem.why and match_commit(NEW[:9]) == NEW and match_commit("f" * 40) is None
    )


def test_an_unknown_commit_is_noted_and_checked_against_the_known_ones(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, {"commit": "f" * 40}, {"use_flash_attn": False, "sequence_parallel_size": 2}
    )

    assert whats(plan) == [] and any("are not known here" in what for what in whats(plan, "note"))


def test_the_working_copys_own_arguments_pass_as_they_are(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"extra_arguments": ["--mine", "$(touch canary)"]})

    assert words(plan, "arguments")[-2:] == ["--mine", "$(touch canary)"]


def test_the_examples_render_on_both_sites_and_hand_the_model_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT / "examples" / "open-instruct-pipeline")
    sft, dpo = load_pipeline("pipeline.yaml").stages
    assert sft.plan.errors == dpo.plan.errors == []
    assert (
        value_of(dpo.plan, "model_name_or_path")
        == sft.plan.resolved.model
        == sft.plan.spec.checkpoint_dir
    )
    assert not any(what == "model" for what, _, _ in dpo.plan.resolved.paths), (
        "it is not there before the first stage ends"
    )
    for name in ("sft", "dpo"):
        path, elsewhere = (
            f"../open-instruct-{name}/run.yaml",
            ["site=generic-cuda", "partition=gpu", "account=mine"],
        )
        assert load_plan(path).plan.errors == load_plan(path, elsewhere).plan.errors == []


@pytest.mark.parametrize("program", [SFT, DPO])
def test_words_read_back_as_the_values_they_came_from(program: str) -> None:
    arguments = table(program, NEW)
    values = {
        "seed": 7,
        "weight_decay": 1e-5,
        "packing": True,
        "exp_name": "-a b",
        "wandb_entity": "it's",
        "timeout": None,
        "oe_eval_tasks": ["x", "y z"],
        "additional_model_arguments": {"k": "v"},
    }
    found = [word for flag in flags(values, arguments) for word in flag]

    assert shlex.split(shlex.join(found)) == found
    assert found == [
        "--seed",
        "7",
        "--weight_decay",
        "1e-05",
        "--packing",
        "true",
        "--exp_name=-a b",
        "--wandb_entity",
        "it's",
        "--oe_eval_tasks",
        "x",
        "y z",
        "--additional_model_arguments",
        '{"k": "v"}',
    ]
