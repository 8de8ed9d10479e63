"""Keys: unknown ones, wrong types, and numbers that YAML takes for text."""

import pytest

from hpctrain.recipes.neox.keys import number_as_text, table, with_dot

from .conftest import UPSTREAM


def test_the_plain_case_has_no_error_and_no_warning(neox):
    planned = neox()

    assert planned.said() == [] and planned.said("warning") == []


def test_both_flavors_have_their_own_keys():
    assert "iteration_offset" in table("tilde") and "iteration_offset" not in table("upstream")
    assert "te_mha" in table("upstream") and "te_mha" not in table("tilde")
    assert "k_bin_packed" in table("tilde")["pack_impl"].choices
    assert "k_bin_packed" not in table("upstream")["pack_impl"].choices
    assert len(table("upstream")) == 318 and len(table("tilde")) == 324


def test_a_misspelt_key_names_its_line_and_the_right_one(neox):
    problem = neox("train_itres: 5\n").problem("unknown key `train_itres`")

    assert problem.where == "run.yaml:16:3"
    assert "did you mean `train_iters`" in problem.hint


def test_a_key_of_the_other_flavor_says_so(neox):
    problem = neox("iteration_offset: 423858\n", options=UPSTREAM).problem(
        "unknown key `iteration_offset`"
    )

    assert "Tilde fork only" in problem.why and "flavor: tilde" in problem.hint


def test_an_unknown_key_in_a_base_config_names_the_base_config(neox):
    assert neox(base={"moe_type2": "1"}).problem("moe_type2").where == "base.yml:22:1"


def test_keys_of_ones_own_copy_are_passed_on(neox):
    planned = neox("my_new_loss: 0.5\n", options={"extra_keys": "[my_new_loss]"})

    assert planned.config("finetune")["my_new_loss"] == 0.5


def test_dashes_in_keys_are_underscores(neox):
    assert neox("log-interval: 7\n").config("finetune")["log_interval"] == 7


def test_a_key_given_with_dash_and_underscore_is_refused(neox):
    assert "given twice" in neox("log-interval: 7\nlog_interval: 8\n").said()[0]


def test_the_same_key_in_two_base_configs_is_refused(neox):
    planned = neox(
        options={"base_config": "[base.yml, more.yml]"},
        more_bases={"more.yml": "seed: 1\nnum-layers: 60\n"},
    )

    problem = planned.problem("`num_layers` is in two base configs")
    assert problem.where == "more.yml:2:1" and "base.yml:3:1" in problem.why


@pytest.mark.parametrize("content", ["", "# nothing\n", "[1, 2]\n", "text\n"])
def test_a_base_config_that_is_no_mapping_is_refused(neox, content):
    planned = neox(
        options={"base_config": "[base.yml, more.yml]"}, more_bases={"more.yml": content}
    )

    assert any("more.yml" in line and "mapping" in line for line in planned.said())


@pytest.mark.parametrize(
    "line, hint",
    [
        ("train_iters: 10.0", "write 10"),
        ('train_iters: "10"', "without quotes"),
        ("train_iters: true", ""),
        ("load: 123", 'quote it: "123"'),
        ("min_lr: 8e-6", "write 8.0e-6"),
        ("min_lr: 1.0e3", "write 1.0e+3"),
        ("precision: bf16", "did you mean"),
        ("train_data_paths: /a/b", 'write ["/a/b"]'),
        ("zero_stage: [1, 2]", ""),
        ("attention_config: flash", ""),
    ],
)
def test_a_wrong_type_is_refused_with_the_right_spelling(neox, line, hint):
    problem = next(p for p in neox(line + "\n").plan.errors if p.where.startswith("run.yaml:16:"))

    assert hint in problem.hint


def test_types_follow_neox_own_rule(neox):
    planned = neox(
        "min_lr: 0\nprecision: BFLOAT16\nextra_save_iters: null\ncheckpoint_factor: 50.0\n"
    )

    assert planned.config("finetune")["precision"] == "BFLOAT16"


def test_a_number_read_as_text_inside_a_mapping_is_refused_with_its_place(neox):
    problem = neox("optimizer: {params: {lr: 8e-6}}\n").problem(
        "`optimizer.params.lr: 8e-6` is text"
    )

    assert problem.where == "run.yaml:16:28" and problem.hint == "write 8.0e-6"


def test_a_quoted_number_in_the_optimizer_is_refused(neox):
    assert (
        neox('optimizer: {params: {lr: "0.001"}}\n').problem("must be a number").where
        == "run.yaml:16:28"
    )


@pytest.mark.parametrize(
    "text, good",
    [("8e-6", "8.0e-6"), ("1.0e6", "1.0e+6"), ("-2.E3", "-2.0e+3"), ("1e+5", "1.0e+5")],
)
def test_the_spelling_offered_is_read_as_a_number(text, good):
    import yaml

    assert number_as_text(text) and isinstance(yaml.safe_load(text), str)
    assert with_dot(text) == good and isinstance(yaml.safe_load(good), float)


def test_values_that_cannot_be_carried_are_refused(neox):
    planned = neox('wandb_project: "a\\0b"\nmin_lr: .nan\nhostfile: "x"\n')

    assert any("control character" in line for line in planned.said())
    assert any("not a finite number" in line for line in planned.said())


def test_all_problems_come_at_once(neox):
    planned = neox("train_itres: 5\nmin_lr: 8e-6\nnum_layers: 61\niteration: 5\n")

    assert len(planned.said()) == 4
    assert planned.plan.resolved.configs == {}


def test_null_in_the_run_takes_a_key_of_the_base_out(neox):
    planned = neox(
        "iteration_offset: null\nintermediate_size: null\n",
        options=UPSTREAM,
        base={"iteration_offset": "5", "intermediate_size": "64"},
    )

    assert not {"iteration_offset", "intermediate_size"} & set(planned.config("finetune"))
    assert "unknown key" in neox("iteration_offset: null\n", options=UPSTREAM).said()[0]
