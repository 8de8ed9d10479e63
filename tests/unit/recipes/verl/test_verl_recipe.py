"""The recipe verl-gad: what verl gets is what run.yaml says, and what cannot work is refused at its
line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpctrain.plan.load import load_plan
from hpctrain.plan.make import Plan
from hpctrain.recipes.verl.hydra import override
from hpctrain.recipes.verl.keys import load_keys
from hpctrain.recipes.verl.memory import GIB, need
from hpctrain.recipes.verl.presets import SIZES, overrides_of

ROOT = Path(__file__).parents[4]
WARMUP: dict[str, Any] = {
    "name": "gad",
    "site": "generic-cuda",
    "recipe": "verl-gad",
    "partition": "gpu",
    "nodes": 1,
    "time": "20h",
    "checkpoint": {"dir": "/data/warmup"},
    "data": {"train": ["/data/t.parquet"], "valid": ["/data/v.parquet"]},
    "recipe_options": {
        "stage": "warmup",
        "size": "3B",
        "verl": "/code/verl",
        "model": "/hf/Qwen2.5-3B-Instruct",
    },
}


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with dotted keys changed; a key of None is taken away."""
    out = json.loads(json.dumps(base))
    for key, value in changes.items():
        *parts, last = key.split("/")
        table = out
        for part in parts:
            table = table.setdefault(part, {})
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    return out


def plan_of(folder: Path, base: dict[str, Any] = WARMUP, **changes: Any) -> Plan:
    (folder / "run.yaml").write_text(yaml.safe_dump(changed(base, changes), sort_keys=False))
    return load_plan(str(folder / "run.yaml")).plan


ADVERSARIAL = changed(
    WARMUP,
    {
        "checkpoint": {"start": "/data/warmup/global_step_2204", "dir": "/data/adversarial"},
        "recipe_options/stage": "adversarial",
        "recipe_options/model": None,
    },
)


def overrides(plan: Plan, mode: str = "scratch") -> dict[str, str]:
    text = plan.resolved.configs[plan.resolved.config_for[mode]]
    return dict(line.split("=", 1) for line in text.splitlines() if not line.startswith("#"))


def decided(plan: Plan) -> dict[str, Any]:
    return {decision.name: decision.value for decision in plan.decisions}


@pytest.mark.parametrize(
    "size,tensor,tokens,train,val,mini,share",
    [
        ("3B", 2, 12288, 256, 600, 256, "0.7"),
        ("7B", 2, 12288, 256, 600, 256, "0.7"),
        ("14B", 4, 8192, 128, 300, 128, "0.8"),
    ],
)
def test_a_size_is_a_row_of_the_table(
    tmp_path: Path, size: str, tensor: int, tokens: int, train: int, val: int, mini: int, share: str
) -> None:
    plan = plan_of(tmp_path, **{"recipe_options/size": size, "nodes": 2})
    found = overrides(plan)

    assert plan.errors == []
    assert found["actor_rollout_ref.rollout.tensor_model_parallel_size"] == str(tensor)
    assert (
        found["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"]
        == found["critic.ppo_max_token_len_per_gpu"]
        == str(tokens)
    )
    assert (found["data.train_batch_size"], found["data.val_batch_size"]) == (str(train), str(val))
    assert found["actor_rollout_ref.actor.ppo_mini_batch_size"] == str(mini)
    assert found["actor_rollout_ref.rollout.gpu_memory_utilization"] == share
    assert (found["trainer.nnodes"], found["trainer.n_gpus_per_node"]) == ("2", "8")


def test_the_stages_differ_in_branch_epochs_critic_warmup_and_models(tmp_path: Path) -> None:
    warmup, adversarial = plan_of(tmp_path), plan_of(tmp_path, ADVERSARIAL)
    first, second = overrides(warmup), overrides(adversarial, "finetune")

    assert warmup.errors == adversarial.errors == []
    assert (decided(warmup)["code.branch"], decided(adversarial)["code.branch"]) == (
        "warmup",
        "gad",
    )
    assert (first["trainer.total_epochs"], second["trainer.total_epochs"]) == ("2", "4")
    assert (first["trainer.critic_warmup"], second["trainer.critic_warmup"]) == ("10", "0")
    assert (
        first["critic.model.path"]
        == first["actor_rollout_ref.model.path"]
        == "/hf/Qwen2.5-3B-Instruct"
    )
    assert second["actor_rollout_ref.model.path"] == "/data/adversarial/start-model/actor"
    assert second["critic.model.path"] == "/data/adversarial/start-model/critic"
    assert (
        second["trainer.default_local_dir"] == "/data/adversarial"
        and second["trainer.resume_mode"] == "auto"
    )
    assert warmup.resolved.template["merge"] == () and adversarial.resolved.template["merge"]
    assert {line for line in set(first) ^ set(second)} == set()


def test_only_links_that_resume_skip_the_first_validation(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert (
        overrides(plan)["trainer.val_before_train"],
        overrides(plan, "resume")["trainer.val_before_train"],
    ) == ("true", "false")

    plan = plan_of(tmp_path, **{"config/trainer": {"val_before_train": True}})
    assert overrides(plan, "resume")["trainer.val_before_train"] == "true"


def test_config_is_laid_over_the_size_in_nested_and_dotted_form(tmp_path: Path) -> None:
    config = {
        "trainer": {"save_freq": 50, "logger": ["console"]},
        "data.train_batch_size": 512,
        "+data.mine": "it's",
        "actor_rollout_ref.rollout": {"n": 4},
    }
    plan = plan_of(tmp_path, config=config)
    found = overrides(plan)

    assert plan.errors == []
    assert (
        found["trainer.save_freq"],
        found["data.train_batch_size"],
        found["actor_rollout_ref.rollout.n"],
    ) == ("50", "512", "4")
    assert (found["trainer.logger"], found["+data.mine"]) == ("[console]", r"'it\'s'")
    text = plan.resolved.configs["overrides.txt"]
    assert text.count("save_freq") == text.count("train_batch_size") == 1
    assert decided(plan)["checkpoint.every"] == 50


def test_steps_are_absolute_and_tell_the_guard_when_the_run_is_done(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, ADVERSARIAL, **{"recipe_options/records": 282112, "chain": {"jobs": 3}}
    )

    assert plan.errors == []
    assert plan.resolved.guard.target == 4408 and plan.resolved.cadence.iterations == 2204
    assert plan.resolved.guard.layout == "verl" and plan.resolved.guard.data_parallel == 8
    plan = plan_of(
        tmp_path, **{"recipe_options/records": 282112, "recipe_options/size": "14B", "nodes": 2}
    )
    assert plan.resolved.guard.target == 4408  # a batch of 128: twice the steps
    plan = plan_of(
        tmp_path,
        **{"recipe_options/records": 282112, "config/trainer": {"total_training_steps": 30}},
    )
    assert plan.resolved.guard.target == 30


def test_wandb_is_used_where_it_can_be(tmp_path: Path) -> None:
    assert overrides(plan_of(tmp_path))["trainer.logger"] == "[console]"
    assert (
        overrides(plan_of(tmp_path, env={"WANDB_MODE": "offline"}))["trainer.logger"]
        == "[console,wandb]"
    )
    assert overrides(plan_of(tmp_path, secrets="~/s.env"))["trainer.logger"] == "[console,wandb]"


OPTION, CONFIG = "recipe_options/", "config/"
# Budgets that a long sequence fits into.
BUDGETS = {
    f"config/{key}.ppo_max_token_len_per_gpu": 65536
    for key in ("actor_rollout_ref.actor", "critic")
}


@pytest.mark.parametrize(
    "base,changes,line,words",
    [
        (
            WARMUP,
            {CONFIG + "data": {"train_batch_size": 100}, "nodes": 3},
            "train_batch_size: 100",
            "800 are no multiple of 24 GPUs",
        ),
        (
            WARMUP,
            {CONFIG + "data": {"train_batch_size": 128}},
            "size: 3B",
            "is more than `train_batch_size: 128`",
        ),
        (
            WARMUP,
            {CONFIG + "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 96}}},
            "ppo_mini_batch_size: 96",
            "does not divide",
        ),
        (
            WARMUP,
            {CONFIG + "actor_rollout_ref": {"actor": {"use_dynamic_bsz": False}}},
            "use_dynamic_bsz: false",
            "without `critic.ppo_micro_batch_size_per_gpu`",
        ),
        (
            WARMUP,
            {
                CONFIG + "actor_rollout_ref": {
                    "actor": {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 3}
                }
            },
            "size_per_gpu: 3",
            "does not divide the 256 answers",
        ),
        (
            WARMUP,
            {
                CONFIG + "actor_rollout_ref": {
                    "actor": {
                        "use_dynamic_bsz": False,
                        "ppo_micro_batch_size_per_gpu": 4,
                        "ppo_micro_batch_size": 8,
                    }
                }
            },
            "size_per_gpu: 4",
            "verl takes one",
        ),
        (
            WARMUP,
            {
                CONFIG + "actor_rollout_ref": {
                    "actor": {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": "all"}
                }
            },
            "size_per_gpu: all",
            "is not a whole number above 0",
        ),
        (WARMUP, {OPTION + "records": 100}, "records: 100", "less than one batch of 256"),
        (
            WARMUP,
            {CONFIG + "actor_rollout_ref": {"rollout": {"n": 1}}},
            "n: 1",
            "an advantage of 0",
        ),
        (
            WARMUP,
            {CONFIG + "actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 3}}},
            "size: 3",
            "does not divide the GPUs",
        ),
        (
            WARMUP,
            {
                OPTION + "size": "7B",
                CONFIG + "actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 8}},
            },
            "parallel_size: 8",
            "28 heads",
        ),
        (
            WARMUP,
            {CONFIG + "critic": {"ppo_max_token_len_per_gpu": 2048}},
            "token_len_per_gpu: 2048",
            "less than the longest sequence",
        ),
        (
            WARMUP,
            {
                CONFIG + "data": {"max_prompt_length": 40000},
                OPTION + "model_shape": {"positions": 40000},
                **BUDGETS,
            },
            "prompt_length: 40000",
            "the model knows 40000 positions",
        ),
        (
            WARMUP,
            {CONFIG + "data": {"max_response_length": 31000}, **BUDGETS},
            "response_length: 31000",
            "= 33048, and the model knows 32768 positions",
        ),
        (
            WARMUP,
            {CONFIG + "actor_rollout_ref": {"rollout": {"max_model_len": 3583}}},
            "model_len: 3583",
            "is less than max_prompt_length 2048",
        ),
        (
            WARMUP,
            {CONFIG + "actor_rollout_ref": {"rollout": {"max_model_len": 65536}}},
            "model_len: 65536",
            "more than the 32768 positions",
        ),
        (
            WARMUP,
            {CONFIG + "trainer": {"max_actor_ckpt_to_keep": 3}},
            "max_actor_ckpt_to_keep: 3",
            "halves of checkpoints",
        ),
        (
            WARMUP,
            {CONFIG + "trainer": {"max_actor_ckpt_to_keep": 1, "max_critic_ckpt_to_keep": 1}},
            "actor_ckpt_to_keep: 1",
            "only complete checkpoint",
        ),
        (
            WARMUP,
            {CONFIG + "trainer": {"del_local_ckpt_after_load": True}},
            "after_load: true",
            "may delete",
        ),
        (WARMUP, {CONFIG + "trainer": {"save_freq": 0}}, "save_freq: 0", "saves nothing"),
        (
            WARMUP,
            {CONFIG + "trainer": {"save_freq": "often"}},
            "save_freq: often",
            "not a whole number",
        ),
        (
            WARMUP,
            {CONFIG + "actor_rollout_ref": {"actor": {"checkpoint": {"contents": ["model"]}}}},
            "- model",
            "without optimizer, extra",
        ),
        (
            WARMUP,
            {CONFIG + "trainer": {"default_local_dir": "/x"}},
            "default_local_dir",
            "is not the run's to set",
        ),
        (
            WARMUP,
            {CONFIG + "ray_kwargs": {"ray_init": {"num_cpus": 8}}},
            "num_cpus: 8",
            "is not the run's to set",
        ),
        (WARMUP, {CONFIG + "trainer": {"a b": 1}}, "a b: 1", "is not a dotted name"),
        (
            WARMUP,
            {CONFIG + "trainer": {"project_name": "${x}"}},
            "project_name",
            "takes for a reference",
        ),
        (
            WARMUP,
            {CONFIG + "trainer": {"project_name": "a\nb"}},
            "project_name",
            "control character",
        ),
        (WARMUP, {OPTION + "model": None}, "stage: warmup", "`recipe_options.model` is missing"),
        (
            WARMUP,
            {OPTION + "model": "/hf/Qwen2.5-235B-Instruct"},
            "235B-Instruct",
            "there is no Qwen2.5-235B",
        ),
        (
            WARMUP,
            {OPTION + "model_shape": {"layrs": 3}},
            "layrs: 3",
            "unknown key `model_shape.layrs`",
        ),
        (WARMUP, {"data": {"train": ["/d/t.parquet"]}}, "train:", "no validation data"),
        (WARMUP, {"checkpoint": None}, "name: gad", "needs a folder for its checkpoints"),
        (WARMUP, {"chain": {"jobs": 3}}, "size: 3B", "when the run is done"),
        (
            WARMUP,
            {OPTION + "size": "235B", "model": "/hf/Qwen3-235B-A22B"},
            "size: 235B",
            "GiB of each GPU",
        ),
        (ADVERSARIAL, {OPTION + "model": "/hf/m"}, "model: /hf/m", "it takes the warmup's own"),
        (ADVERSARIAL, {"checkpoint": {"dir": "/d"}}, "dir: /d", "needs the warmup's checkpoint"),
        (
            ADVERSARIAL,
            {OPTION + "records": 282112, CONFIG + "trainer": {"total_epochs": 2}},
            "total_epochs: 2",
            "nothing to train",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_its_line(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], line: str, words: str
) -> None:
    plan = plan_of(tmp_path, base, **changes)
    problems = [problem for problem in plan.errors if words in problem.what]
    lines = (tmp_path / "run.yaml").read_text().splitlines()

    assert len(problems) == 1, plan.errors
    assert plan.resolved.configs == {}
    number = int(problems[0].where.removeprefix(str(tmp_path / "run.yaml")).split(":")[1])
    assert line in lines[number - 1], lines[number - 1]


def test_the_students_own_config_says_how_long_it_can_read_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()

    def said(config: dict[str, Any], **option: Any) -> list[str]:
        (tmp_path / "student" / "config.json").write_text(json.dumps(config))
        changes = {
            "recipe_options/model": str(tmp_path / "student"),
            "config/data": {"max_response_length": 6144},
        }
        plan = plan_of(
            tmp_path,
            **{**changes, **{f"recipe_options/{key}": value for key, value in option.items()}},
        )
        return [
            f"{problem.what} ({problem.why})"
            for problem in plan.errors
            if "positions" in problem.what
        ]

    (problem,) = said({"max_position_embeddings": 4096})
    assert (
        problem
        == "max_prompt_length 2048 + max_response_length 6144 = 8192, and the model knows 4096"
        f" positions (`max_position_embeddings` of {tmp_path}/student/config.json)"
    )
    assert said({"max_position_embeddings": 8192}) == []
    assert (
        said(
            {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
        )
        == []
    )
    assert said({"max_position_embeddings": 4096}, model_shape={"positions": 8192}) == []
    assert said({"max_position_embeddings": "many"}) == []  # then as the size has it
    assert (
        "8192, and the model knows 8191 positions" in said({}, model_shape={"positions": 8191})[0]
    )


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        config={"data.train_batch_size": 100, "trainer.save_freq": 0, "trainer.nnodes": 2},
        nodes=3,
    )

    # the mini-batch, more than the batch and no multiple of the ranks, too
    assert len(plan.errors) == 5


def test_a_key_that_no_verl_knows_is_a_warning_with_the_nearest(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        config={
            "trainer": {"save_frq": 10},
            "+mine": {"own": 1},
            "actor_rollout_ref.model.override_config": {"x": 1},
        },
    )
    (problem,) = [problem for problem in plan.problems if "save_frq" in problem.what]

    assert plan.errors == [] and "`trainer.save_freq`" in problem.hint
    assert not [
        problem
        for problem in plan.problems
        if "override_config" in problem.what or "mine" in problem.what
    ]


def test_every_key_of_the_presets_is_one_of_verls_since_0_4() -> None:
    keys = load_keys()

    assert keys.versions[:2] == ("0.3.0", "0.4.1") and len(keys.known) > 700
    for stage in ("warmup", "adversarial"):
        for key in overrides_of(stage, SIZES["7B"]):
            assert set(keys.versions[1:]) <= set(keys.known[key]), key


def test_words_are_those_that_hydra_read_back() -> None:
    for value, word in json.loads((ROOT / "tests/data/verl/hydra.json").read_text())["vectors"]:
        assert override("a", value) == word


def test_the_memory_estimate_is_its_formula(tmp_path: Path) -> None:
    shape = SIZES["7B"].shape
    values = {"actor_rollout_ref.rollout.free_cache_engine": False}
    least = need(shape, values, 8, 8, 2, 12288)
    by_hand = 7.62e9 / 8 * (16 + 12 + 2) + 7.62e9 * 2 / 2 + 2 * 12288 * (28 * 3584 + 152064)

    assert least.total == pytest.approx(by_hand / GIB)
    freed = need(
        shape, {**values, "actor_rollout_ref.rollout.free_cache_engine": True}, 8, 8, 2, 12288
    )
    assert freed.training == pytest.approx(least.training - least.rollout)
    offloaded = need(
        shape,
        {
            **values,
            "critic.model.fsdp_config.param_offload": True,
            "critic.model.fsdp_config.optimizer_offload": True,
        },
        8,
        8,
        2,
        12288,
    )
    # The resting critic is on the host; the resting actor is not.
    assert offloaded.host == pytest.approx(
        12 * 7.62e9 / GIB
    ) and offloaded.training == pytest.approx(least.training)


def test_the_bound_knows_masters_in_bf16_fused_logits_and_both_spellings_of_the_critic() -> None:
    shape, critic = SIZES["7B"].shape, "critic.fsdp"
    actor = "+actor_rollout_ref.actor.fsdp_config.model_dtype"
    plain = need(shape, {}, 8, 8, 2, 3584)
    half = need(shape, {actor: "bf16", f"{critic}.model_dtype": "bf16"}, 8, 8, 2, 3584)
    one = need(shape, {actor: "bf16"}, 8, 8, 2, 3584)
    fused = need(shape, {"actor_rollout_ref.model.use_fused_kernels": True}, 8, 8, 2, 3584)
    away = need(shape, {f"{critic}.optimizer_offload": True}, 8, 8, 2, 3584)

    assert half.trained == pytest.approx(plain.trained / 2) and half.total < plain.total
    assert one.trained == plain.trained  # the critic's masters are fp32 still
    assert plain.activations - fused.activations == pytest.approx(2 * 3584 * 152064 / GIB)
    assert away.generating < plain.generating


def test_a_ceiling_of_packing_is_no_need_and_a_measured_peak_stands_for_the_bound(
    tmp_path: Path,
) -> None:
    budget = {"actor_rollout_ref": {"actor": {"ppo_max_token_len_per_gpu": 10**6}}}
    assert not any("GiB" in one.what for one in plan_of(tmp_path, config=budget).errors)

    huge = {"recipe_options/size": "235B", "recipe_options/model": "/hf/Qwen3-235B-A22B"}
    assert plan_of(tmp_path, estimate={"memory_gib": 70}, **huge).errors == []
    (problem,) = plan_of(tmp_path, estimate={"memory_gib": 90}, **huge).errors
    assert "GiB of each GPU" in problem.what


def test_what_cannot_fit_is_refused_with_the_number_of_gpus_that_could(tmp_path: Path) -> None:
    large = {"recipe_options/size": "14B", "gpus_per_node": 4}
    (problem,) = plan_of(tmp_path, **large).errors
    assert (
        "trained model 55.0 + resting model 41.3" in problem.why
        and "could fit on 8 such GPUs (2 nodes)" in problem.hint
    )
    assert plan_of(tmp_path, nodes=2, **large).errors == []

    huge = {"recipe_options/size": "235B", "recipe_options/model": "/hf/Qwen3-235B-A22B"}
    (problem,) = plan_of(tmp_path, **huge).errors
    number = int(problem.hint.split("fit on ")[1].split(" ")[0])
    for nodes, refused in ((number // 8, False), (number // 8 - 1, True)):
        errors = plan_of(tmp_path, nodes=nodes, **huge).errors
        assert any("GiB of each GPU" in problem.what for problem in errors) == refused


def test_the_ladder_keeps_what_one_gpu_can_do(tmp_path: Path) -> None:
    from hpctrain.jobs.ladder import plan_rungs

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(WARMUP, sort_keys=False))
    one, two, eight = plan_rungs(str(tmp_path / "run.yaml"), [], [2, 4, 8], 20, "1h")

    for rung in (one, two, eight):
        found = overrides(rung.loaded.plan)
        assert found["trainer.total_training_steps"] == "20" and found[
            "trainer.n_gpus_per_node"
        ] == str(rung.num_gpus)
        assert found["actor_rollout_ref.rollout.tensor_model_parallel_size"] == "2"
        assert found["trainer.default_local_dir"].endswith(f"-ladder-{rung.num_gpus}gpu")


@pytest.mark.parametrize("site", ["lumi", "generic-cuda"])
@pytest.mark.parametrize("stage", ["warmup", "adversarial"])
def test_the_examples_render_on_both_sites(tmp_path: Path, site: str, stage: str) -> None:
    path = ROOT / "examples" / "verl-gad" / stage / "run.yaml"
    plan = load_plan(str(path), [f"site={site}"]).plan

    assert plan.errors == [] and plan.resolved.guard.target == (2204 if stage == "warmup" else 4408)


@pytest.mark.parametrize("way", ["hardlink", "copy"])
def test_a_start_is_a_folder_or_one_checkpoint_of_it(tmp_path: Path, way: str) -> None:
    named = plan_of(tmp_path, ADVERSARIAL, **{"recipe_options/handover": way}).guard()
    assert (named["start"], named["start_as"], named["start_needs"]) == (
        None,
        way,
        ["actor", "critic", "data.pt"],
    )
    assert (named["from"]["run_dir"], named["from"]["checkpoint"]) == (
        "/data/warmup",
        "/data/warmup/global_step_2204",
    )

    folder = changed(ADVERSARIAL, {"checkpoint/start": "/data/warmup"})
    assert plan_of(tmp_path, folder).guard()["from"] == {**named["from"], "checkpoint": None}
    chosen = plan_of(tmp_path, folder, **{"recipe_options/resume_step": 2150})
    assert chosen.guard()["from"]["checkpoint"] == "/data/warmup/global_step_2150"
    assert "2150" in next(
        decision.reason for decision in chosen.decisions if decision.name == "checkpoint.handover"
    )
    (problem,) = plan_of(tmp_path, ADVERSARIAL, **{"recipe_options/resume_step": 2150}).errors
    assert "is not the step of `global_step_2204`" in problem.what
    (problem,) = plan_of(tmp_path, WARMUP, **{"recipe_options/resume_step": 2150}).errors
    assert "chooses nothing" in problem.what


def test_the_example_pipeline_hands_the_warmups_last_checkpoint_on() -> None:
    from hpctrain.jobs.pipeline.stages import load_pipeline

    pipeline = load_pipeline(str(ROOT / "examples/verl-gad/pipeline.yaml"))
    guard = pipeline.stages[1].plan.guard()

    assert pipeline.errors == []
    assert guard["from"]["stage"] == "warmup" and guard["start_as"] == "hardlink"
    assert guard["from"]["checkpoint"].endswith("chai-3b-warmup/global_step_2204")


def test_doctor_is_told_the_branch_of_the_stage(tmp_path: Path) -> None:
    assert (
        decided(plan_of(tmp_path, **{"recipe_options/branch": "my-warmup"}))["code.branch"]
        == "my-warmup"
    )


@pytest.mark.parametrize("step", [None, 2150])
def test_a_rehearsal_finds_the_start_in_the_warmups_folder(
    tmp_path: Path, step: int | None
) -> None:
    from hpctrain.runtime.handover import receive
    from hpctrain.runtime.settings import parse_settings
    from hpctrain.sandbox.rehearse import play, scene

    path, files = ROOT / "examples/verl-gad/adversarial/run.yaml", str(tmp_path / "files")
    words = [f"recipe_options.resume_step={step}"] if step else []
    plan = load_plan(str(path), words, str(tmp_path / "run")).plan
    (shown,) = scene.plan_scenes(
        [plan],
        plan.run_dir,
        "me",
        lambda path: not path.startswith(("/scratch", "/project", "/pfs", "/appl", "/users")),
    )
    scene.build(shown, files, plan, {})
    guard = plan.guard()
    guard["from"] = {
        key: shown.real_path(files, value) if key in ("run_dir", "checkpoint") and value else value
        for key, value in guard["from"].items()
    }
    settings, _ = receive(str(tmp_path), parse_settings(guard), "now")

    assert settings.start and settings.start.endswith(f"chai-3b-warmup/global_step_{step or 2204}")
    scenario = play.make_scenario(plan, play.Request())
    assert (scenario["offset"], scenario["target"]) == (step or 2204, 4408)


def test_what_follows_from_a_mistake_is_not_said_as_well(tmp_path: Path) -> None:
    """A length that is no number says nothing of the chain; an unknown stage nothing of .bin and
    .idx files."""
    from hpctrain.plan.check import find_problems

    (problem,) = plan_of(
        tmp_path, **{"config/trainer": {"total_epochs": "two"}, "chain": {"jobs": 3}}
    ).errors
    assert "`trainer.total_epochs: two` is not a whole number" in problem.what
    plan_of(
        tmp_path,
        **{
            "recipe_options/stage": "warm",
            "site": "lumi",
            "partition": "small-g",
            "account": "project_465000001",
        },
    )
    found = find_problems(load_plan(str(tmp_path / "run.yaml")))
    assert "did you mean `warmup`" in next(
        problem.hint for problem in found if problem.level == "error"
    )
    assert any("/data/t.parquet` is not there" in problem.what for problem in found)
    assert not any(".bin" in f"{problem.what} {problem.hint}" for problem in found)


def test_without_dynamic_batches_the_four_sizes_that_verl_asks_for_are_enough(
    tmp_path: Path,
) -> None:
    each = {"log_prob_micro_batch_size_per_gpu": 16}
    actor = {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": 4}
    config = {
        "actor_rollout_ref": {"actor": actor, "rollout": each, "ref": each},
        "critic": {"ppo_micro_batch_size_per_gpu": 8},
    }
    assert plan_of(tmp_path, config=config).errors == []
