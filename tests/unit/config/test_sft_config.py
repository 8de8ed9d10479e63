"""The trainer's config: every problem at once with its place, the batch arithmetic, the learning
rate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpctrain.base import errors
from hpctrain.config.document import load_yaml
from hpctrain.config.trainers.sft import (
    SftConfig,
    learning_rate,
    load_config,
    parse_config,
    resolve_batch,
)
from hpctrain.train.core.launch import Launch


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("m.json", "d.bin", "d.idx"):
        (tmp_path / name).touch()
    return tmp_path


def load(path: Path, text: str) -> SftConfig:
    (path / "c.yml").write_text(text)
    return load_config(str(path / "c.yml"))


def problems(path: Path, text: str) -> list[errors.Problem]:
    with pytest.raises(errors.UsageError) as caught:
        load(path, text)
    return list(caught.value.problems)


GOOD = "model: m.json\ntrain_data_paths: d\ntrain_iters: 10\n"


def test_a_minimal_config_has_absolute_paths_and_defaults(files: Path) -> None:
    config = load(files, GOOD + "lr: 8e-6\nprecision: bfloat16\nstop_signal: SIGUSR2\n")

    assert config.model == str(files / "m.json") and config.train_data_paths == (str(files / "d"),)
    assert config.lr == 8e-6 and config.precision == "bf16" and config.stop_signal_number == 12


def test_all_problems_come_at_once_in_a_form_that_says_where(files: Path) -> None:
    text = (
        "model: nowhere\ntrain_data_paths: [d, d.bin]\ntrain_iters: 10\ntrain_epochs:"
        " 1\nlearning_rate: 1\nzero_stage: 4\nmin_lr: 1\neod_mask_loss: yes\nseq_length:"
        " 2.5\nstop_signal: HUPP\nloss_mask_pairs: [1, 2, 3]\nadam_eps: 0\nwarmup_iters:"
        " 11\npack_impl: magic\n"
    )
    found = {problem.where.split(":", 1)[1]: problem.what for problem in problems(files, text)}

    name = str(files / "c.yml")
    assert all(problem.where.startswith(name + ":") for problem in problems(files, text))
    for place, words in {
        "1:8": "nowhere` does not exist",
        "2:23": "d.bin.idx` do not exist",
        "4:15": "both",
        "5:1": "learning_rate",
        "6:13": "more than 3",
        "7:9": "above `lr",
        "8:16": "needs `eod_id`",
        "9:13": "whole number",
        "10:14": "signal",
        "11:18": "3 ids",
        "12:11": "less than 1e-30",
        "13:15": "above `train_iters",
        "14:12": "pack_impl: magic` is not one of them",
    }.items():
        assert words in found.get(place, ""), (place, found)


@pytest.mark.parametrize("text", ["", "- a\n", "null\n", "a: [\n", "model: 1\n"])
def test_what_is_not_a_config_is_refused(files: Path, text: str) -> None:
    assert problems(files, text)


def test_the_batch_is_derived_or_checked() -> None:
    base = SftConfig(train_micro_batch_size_per_gpu=3)

    assert resolve_batch(base, 8).train_batch_size == 24
    assert resolve_batch(dataclasses.replace(base, train_batch_size=48), 8).accumulation == 2
    assert (
        resolve_batch(dataclasses.replace(base, gradient_accumulation_steps=4), 2).train_batch_size
        == 24
    )
    with pytest.raises(errors.UsageError, match="3 x accumulation 1 x 64 ranks = 192") as caught:
        resolve_batch(dataclasses.replace(base, train_batch_size=200), 64, "c.yml")
    assert "such as 192" in str(caught.value)
    with pytest.raises(errors.UsageError):
        resolve_batch(
            dataclasses.replace(base, train_batch_size=24, gradient_accumulation_steps=2), 8
        )


def test_the_learning_rate_warms_up_decays_and_ends_above_the_minimum() -> None:
    config = SftConfig(lr=1.0, min_lr=0.1, warmup_iters=4)
    rates = [learning_rate(config, iteration, 20) for iteration in range(1, 21)]

    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0.1 < rates[-1] < 0.12
    assert learning_rate(dataclasses.replace(config, lr_decay_iters=10), 15, 20) == pytest.approx(
        0.1
    )
    assert learning_rate(
        dataclasses.replace(config, lr_decay_style="linear"), 13, 20
    ) == pytest.approx(0.55)
    assert learning_rate(dataclasses.replace(config, lr_decay_style="constant"), 19, 20) == 1.0


def test_the_environment_is_checked_as_a_whole() -> None:
    with pytest.raises(errors.UsageError) as caught:
        Launch.from_environment(
            {"RANK": "2", "WORLD_SIZE": "2", "HPCTRAIN_MODE": "rezume", "LOCAL_RANK": "x"}
        )
    text = str(caught.value)

    for words in (
        "rezume",
        "HPCTRAIN_CONFIG",
        "HPCTRAIN_CHECKPOINT_DIR",
        "RANK=2",
        "MASTER_ADDR",
        "LOCAL_RANK=x",
    ):
        assert words in text


def test_scratch_ignores_a_checkpoint_and_the_others_need_one(tmp_path: Path) -> None:
    env = {
        "HPCTRAIN_CONFIG": "c",
        "HPCTRAIN_CHECKPOINT_DIR": str(tmp_path),
        "HPCTRAIN_CHECKPOINT": "/nowhere",
    }

    assert Launch.from_environment({**env, "HPCTRAIN_MODE": "scratch"}).checkpoint == ""
    with pytest.raises(errors.UsageError, match="not a directory"):
        Launch.from_environment({**env, "HPCTRAIN_MODE": "resume"})


def test_a_key_without_a_value_never_takes_its_default_in_silence(files: Path) -> None:
    (files / "c.yml").write_text(
        "model: m\ntrain_data_paths: [d]\ntrain_iters: 3\nlr:\nzero_stage:\nwandb_project:\n"
    )
    config, found = parse_config(load_yaml(str(files / "c.yml")), str(files))
    told = {problem.what for problem in found}
    assert {"`lr` has no value", "`zero_stage` has no value"} <= told
    assert config.wandb_project is None and not any("wandb" in what for what in told)
