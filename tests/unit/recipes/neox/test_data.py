"""Data, packing, loss masks, tokenizer."""

import pytest

from .conftest import UPSTREAM

NO_VALID = {"data": "{train: [/scratch/d/a, /scratch/d/b]}"}


def test_the_runs_data_replaces_the_bases(neox):
    base = {
        "train_data_paths": "[/x, /y]",
        "train_data_weights": "[1.0, 2.0]",
        "data_path": "/z",
        "valid_data_paths": "[/v]",
    }
    config = neox(base=base).config("finetune")

    assert config["train_data_paths"] == ["/scratch/d/sft"] and config["valid_data_paths"] == [
        "/scratch/d/v"
    ]
    assert not {"train_data_weights", "data_path"} & set(config)


def test_the_bases_data_is_used_when_the_run_names_none(neox):
    base = {"train_data_paths": "[/x]", "valid_data_paths": "[/v]", "test_data_paths": "[/v]"}

    assert neox(base=base, run={"data": None}).config("finetune")["train_data_paths"] == ["/x"]


def test_validation_data_that_lacks_is_filled_in_and_said(neox):
    planned = neox("train_data_weights: [1.0, 2.0]\n", run=NO_VALID)
    config = planned.config("finetune")

    assert (
        config["valid_data_paths"] == config["test_data_paths"] == ["/scratch/d/a", "/scratch/d/b"]
    )
    assert config["test_data_weights"] == [1.0, 2.0]
    assert "data: {valid:" in planned.problem("no valid and test data", "warning").hint


def test_no_data_at_all_is_refused(neox):
    neox(run={"data": None}).problem("no training data")


def test_a_suffix_is_refused_at_its_place(neox):
    problem = neox(run={"data": "{train: [/d/a, /d/b.bin], valid: [/d/v], test: [/d/v]}"}).problem(
        "wants the prefix"
    )

    assert problem.where == "run.yaml:10:22" and problem.hint == "write /d/b"


@pytest.mark.parametrize(
    "line, message",
    [
        ("data_path: /z", "`data_path` and `data.train` exclude"),
        ("train_data_paths: [/other]", "contradicts what hpctrain sets"),
        ("train_data_weights: [1.0, 2.0]", "`train_data_weights` has 2 entries for 1 data sets"),
        ("train_label_data_paths: [/l, /m]", "`train_label_data_paths` has 2 entries for 1"),
        ("eval_interval: 0", "`eval_interval` must be at least 1"),
        ("pack_impl: packed", "cuts conversations in two"),
        (
            "train_epochs: 2\ntrain_iters: null",
            "`train_epochs` does not work with `pack_impl: k_bin_packed`",
        ),
        ("loss_mask_pairs: [7, 7, 8]", "`loss_mask_pairs` has 3 ids"),
        ("loss_mask_pairs: [[7, 7]]", "must be token ids"),
        ("loss_mask_individual: [true]", "must be token ids"),
        ("vocab_file: null", "`vocab_file` is missing"),
        ("tokenizer_type: GPT2BPETokenizer", "`merge_file` is missing"),
    ],
)
def test_data_mistakes_are_refused(neox, line, message):
    neox(line + "\n").problem(message)


def test_data_impl_is_never_infer(neox):
    assert neox().config("finetune")["data_impl"] == "mmap"
    assert neox(base={"data_impl": "infer"}).config("finetune")["data_impl"] == "mmap"
    neox("data_impl: infer\n").problem("does not work in NeoX", "warning")


def test_the_fork_packs_whole_samples_and_masks_prompts(neox):
    planned = neox()
    config = planned.config("resume")

    assert config["pack_impl"] == "k_bin_packed"
    assert config["loss_mask_pairs"] == [7, 7] and config["loss_mask_alternating_individual"] == [8]
    assert "SFT_ENABLED is only printed" in planned.decision("config.loss_mask_pairs").reason


def test_masks_of_ones_own_are_kept(neox):
    config = neox("loss_mask_pairs: [3, 4]\n").config("finetune")

    assert config["loss_mask_pairs"] == [3, 4] and "loss_mask_alternating_individual" not in config


def test_masks_that_train_on_prompts_are_warned_about(neox):
    neox("loss_mask_pairs: []\n").problem("the loss masks are empty", "warning")
    neox("loss_mask_pairs: null\n").problem("the loss masks are empty", "warning")
    neox("loss_mask_individual: [8]\n").problem("the user's turns are trained on", "warning")
    neox("loss_mask_pairs: [7, 7]\ntrain_label_data_paths: [/l]\n").problem(
        "together with label data", "warning"
    )


def test_overflow_packing_in_the_fork_keeps_samples_whole(neox):
    planned = neox("pack_impl: pack_until_overflow\n")

    assert planned.config("finetune")["allow_chopped"] is False
    planned.problem("more padding than k_bin_packed", "warning")


def test_upstream_packs_and_masks_in_its_own_way(neox):
    planned = neox(options=UPSTREAM)

    assert planned.config("finetune")["pack_impl"] == "pack_until_overflow"
    planned.problem("prompts are trained on like replies", "warning")
    neox("pack_impl: k_bin_packed\n", options=UPSTREAM).problem("is not one of its values")
    neox("pack_impl: unpacked\n", options=UPSTREAM).problem("needs `train_label_data_paths`")
    labelled = neox("train_label_data_paths: [/l]\n", options=UPSTREAM)
    assert labelled.said("warning") == []


def test_labels_stand_in_with_the_data(neox):
    config = neox("train_label_data_paths: [/l, /m]\n", run=NO_VALID, options=UPSTREAM).config(
        "finetune"
    )

    assert config["valid_label_data_paths"] == config["test_label_data_paths"] == ["/l", "/m"]


def test_other_kinds_of_training_are_warned_about(neox):
    neox("train_impl: dpo\n").problem("not plain supervised training", "warning")


def test_every_file_the_job_needs_is_listed(neox):
    base = {"valid_data_paths": "[/base/v, rel/v]", "test_data_paths": "[/base/v]"}
    planned = neox(
        "train_label_data_paths: [/l]\n",
        base=base,
        run={"data": "{train: [/scratch/d/sft]}"},
        options=UPSTREAM,
    )
    paths = {path: (what, where) for what, path, where in planned.plan.resolved.paths}

    assert {what for what, _ in paths.values()} == {
        "NeoX working copy",
        "training script",
        "vocab file",
        "train labels",
        "valid data",
    }
    assert paths["/base/v.idx"] == ("valid data", "base.yml:22:20")
    assert "/project/neox/rel/v.bin" in paths and "/l.bin" in paths
    # run.yaml's own data is looked for by the check of every recipe
    assert "/scratch/d/sft.bin" not in paths
