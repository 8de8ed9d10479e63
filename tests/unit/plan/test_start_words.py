"""What the guard says a link begins with is what that recipe's framework does."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.jobs.chain import plan_chain
from hpctrain.plan.load import load_plan
from hpctrain.plan.render import plan_json
from hpctrain.runtime.link import spoken
from hpctrain.runtime.settings import parse_settings

EXAMPLES = Path(__file__).parents[3] / "examples"
VERL = "starts from the start checkpoint, {} its place in the data, and counts on from its step"
ALONE = "starts from the start checkpoint, without its optimizer"


def words(example, *changes):
    settings = parse_settings(load_plan(str(EXAMPLES / example / "run.yaml"), changes).plan.guard())
    return spoken(settings, "scratch"), spoken(settings, "finetune")


@pytest.mark.parametrize(
    ("example", "scratch", "finetune"),
    [
        # NeoX: `finetune: true` loads neither optimizer nor scheduler (megatron/checkpointing.py
        # `load_checkpoint`).
        ("lumi-neox-sft", "starts from scratch", ALONE),
        (
            "lumi-sft",
            (
                "starts from the weights of `/scratch/project_465001281/models/base`, random ones"
                " where"
            ),
            ALONE,
        ),
        ("lumi-dpo", "starts from the policy model `", ALONE),
        ("hf-sft", "starts from the base model `", ALONE),
        ("open-instruct-sft", "starts from the model `meta-llama/Llama-3.1-8B`", ALONE),
        ("open-instruct-dpo", "starts from the model `/", ALONE),
        # verl loads model, optimizer and random state of actor and critic, and data.pt, whatever
        # the mode.
        ("verl-gad/warmup", "starts from the model `", VERL.format("with its optimizers and")),
        ("verl-gad/adversarial", "starts from the model `", VERL.format("with its optimizers and")),
        (
            "hello",
            "starts from scratch",
            "starts from the start checkpoint, of which the program takes what it likes",
        ),
    ],
)
def test_a_link_says_what_its_framework_begins_with(example, scratch, finetune):
    said = words(example)
    assert said[0].startswith(scratch) and said[1] == finetune, said


def test_the_built_in_trainer_begins_with_random_weights_where_it_is_told_to():
    assert words("lumi-sft", "config.init=random")[0] == "starts from random weights"
    assert "random ones where it has none" in words("lumi-sft", "config.init=auto")[0]


def test_verl_without_its_optimizers_says_so_and_check_warns():
    key, other = (
        f"config.{name}.checkpoint.load_contents" for name in ("actor_rollout_ref.actor", "critic")
    )
    both = words("verl-gad/adversarial", f"{key}=[model, extra]", f"{other}=[model]")
    assert both[1] == VERL.format("without its optimizers, with")
    assert words("verl-gad/adversarial", f"{other}=[model]")[1] == VERL.format(
        "without the critic's optimizer, with the other and"
    )
    plan = load_plan(
        str(EXAMPLES / "verl-gad/adversarial/run.yaml"), [f"{key}=[model, extra]"]
    ).plan
    assert (
        any("without optimizer" in p.what and p.level == "warning" for p in plan.problems)
        and not plan.errors
    )
    plan = load_plan(str(EXAMPLES / "verl-gad/adversarial/run.yaml"), [f"{key}=[optimizer]"]).plan
    assert any("without model" in p.what for p in plan.errors)


def test_a_forecast_of_a_run_whose_start_is_found_later_is_not_from_scratch(tmp_path):
    """verl's start is what the warmup's tracker names when the first link begins; verl counts on
    from it."""
    loaded = load_plan(
        str(EXAMPLES / "verl-gad/adversarial/run.yaml"),
        [f"checkpoint.dir={tmp_path}/to"],
        str(tmp_path / "run"),
    )
    content = plan_json(loaded.plan, loaded.inputs)
    first = plan_chain(str(tmp_path / "run"), content).links[0]
    assert (first.mode, first.first) == ("finetune", None)
    content["guard"]["from"]["checkpoint"] = "/scratch/x/global_step_2204"
    first = plan_chain(str(tmp_path / "run"), content).links[0]
    assert (first.mode, first.first) == ("finetune", 2204)
