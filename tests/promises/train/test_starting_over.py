"""Finetune takes weights only and any number of ranks; resume refuses what would not be exact, and says what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import Bench, dialogues, write_indexed

QUIET: dict[str, Any] = {"train_iters": 2, "checkpoint_factor": 2}


@pytest.fixture(scope="module")
def by_two(bench: Bench) -> Bench:
    """Two-rank runs of every stage, two steps each; and the same without dropout, for comparison with one rank."""
    orders = [bench.order(f"z{stage}", zero_stage=stage, precision="bf16", **QUIET) for stage in range(4)]
    orders.append(bench.order("neox-2r", model="neox.json", **QUIET))
    (bench.path / "calm.json").write_text(
        json.dumps({**json.loads((bench.path / "llama.json").read_text()), "attention_dropout": 0.0})
    )
    orders.append(bench.order("calm-2r", model="calm.json", train_iters=6, zero_stage=2))
    assert bench.train_many(orders, 2) == [(0, [])] * len(orders)
    return bench


@pytest.fixture(scope="module")
def by_one(by_two: Bench) -> dict[str, tuple[int, list[str]]]:
    """One-rank runs that start from those."""
    b = by_two
    write_indexed(b.path / "other", dialogues(seed=1))
    step = {name: b.path / name / "global_step2" for name in ("z0", "z1", "z2", "z3", "neox-2r")}
    names = {}
    for stage in range(4):
        names[f"finetune-z{stage}"] = b.order(
            f"finetune-z{stage}", "finetune", step[f"z{stage}"], zero_stage=1, **QUIET
        )
    names["finetune-neox"] = b.order("finetune-neox", "finetune", step["neox-2r"], model="neox.json", **QUIET)
    names["finetune-wrong"] = b.order("finetune-wrong", "finetune", step["neox-2r"], **QUIET)
    more = {"train_iters": 3, "precision": "bf16"}
    names["resume-z0"] = b.order("resume-z0", "resume", step["z0"], zero_stage=0, **more)
    names["resume-z1"] = b.order("resume-z1", "resume", step["z1"], zero_stage=1, **more)
    names["resume-mixed"] = b.order("resume-mixed", "resume", step["z0"], zero_stage=2, train_iters=3)
    names["resume-data"] = b.order(
        "resume-data", "resume", step["z0"], zero_stage=0, train_data_paths=["other"], **more
    )
    names["done"] = b.order("done", "resume", step["z0"], zero_stage=0, precision="bf16", **QUIET)
    names["calm-1r"] = b.order(
        "calm-1r", model="calm.json", train_iters=6, zero_stage=0, train_micro_batch_size_per_gpu=4
    )
    names["nan"] = b.order("nan", lr=1e30, warmup_iters=0, max_skipped_in_a_row=2, checkpoint_factor=1, train_iters=6)
    names["nan-z0"] = b.order("nan-z0", lr=1e30, warmup_iters=0, max_skipped_in_a_row=2, zero_stage=0, train_iters=6)
    names["nan-z0-bf16"] = b.order("nan-z0-bf16", lr=1e30, warmup_iters=0, max_skipped_in_a_row=2, zero_stage=0,
                                   precision="bf16", train_iters=6)  # fmt: skip
    names["nan-z3"] = b.order("nan-z3", lr=1e30, warmup_iters=0, max_skipped_in_a_row=2, zero_stage=3, train_iters=6)
    answers = b.train_many(list(names.values()), 1)
    return dict(zip(names, answers))


@pytest.mark.parametrize("stage", range(4))
def test_finetune_takes_the_weights_of_any_stage_and_number_of_ranks(
    by_two: Bench, by_one: dict[str, tuple[int, list[str]]], stage: int
) -> None:
    name = f"finetune-z{stage}"
    assert by_one[name] == (0, [])

    first, before = by_two.metrics(name)[0], by_two.metrics(f"z{stage}")
    assert first["iteration"] == 1 and first["lr"] == pytest.approx(5e-4)  # the warm-up starts again
    assert first["consumed_samples"] == 4
    assert first["loss"] < before[0]["loss"]  # and the weights do not


def test_finetune_of_the_other_family_and_of_a_model_that_does_not_fit(
    by_one: dict[str, tuple[int, list[str]]],
) -> None:
    assert by_one["finetune-neox"] == (0, [])
    code, found = by_one["finetune-wrong"]
    assert code == 2 and "do not fit `model`" in found[0]


def test_resume_with_another_number_of_ranks_works_without_zero_and_is_refused_with_it(
    by_two: Bench, by_one: dict[str, tuple[int, list[str]]]
) -> None:
    assert by_one["resume-z0"] == (0, [])
    assert [line["iteration"] for line in by_two.metrics("resume-z0")] == [3]

    code, found = by_one["resume-z1"]
    assert code == 4 and len(found) == 1
    assert "the number of ranks was 2 and is 1" in found[0] and "finetune" in found[0]
    assert not (by_two.path / "resume-z1").exists()


def test_resume_names_everything_that_stands_against_it(by_one: dict[str, tuple[int, list[str]]]) -> None:
    code, found = by_one["resume-mixed"]
    assert code == 4
    assert ["precision" in found[0], "zero_stage" in found[1], "number of ranks" in found[2]] == [True] * 3

    code, found = by_one["resume-data"]
    assert code == 4 and "the data is not what the run was trained on" in found[0]


def test_a_finished_run_trains_and_writes_nothing(by_two: Bench, by_one: dict[str, tuple[int, list[str]]]) -> None:
    assert by_one["done"] == (0, [])
    assert not (by_two.path / "done").exists() and not (by_two.path / "done.run").exists()


def test_one_rank_and_two_ranks_learn_the_same(by_two: Bench, by_one: dict[str, tuple[int, list[str]]]) -> None:
    assert by_one["calm-1r"] == (0, [])
    one, two = ([line["loss"] for line in by_two.metrics(name)] for name in ("calm-1r", "calm-2r"))

    assert one == pytest.approx(two, rel=1e-5)
    assert np.ptp(one) > 0.01


@pytest.mark.parametrize("name", ["nan", "nan-z0", "nan-z0-bf16", "nan-z3"])
def test_a_gradient_that_stays_not_finite_ends_the_run_and_is_never_saved(
    by_two: Bench, by_one: dict[str, tuple[int, list[str]]], name: str
) -> None:
    assert by_one[name][0] == 1

    last = by_two.metrics(name)[-1]
    assert last["skipped"] == 2 and last["iteration"] < 6
    saved = sorted(path.name for path in Path(by_two.path / name).glob("global_step*"))
    assert f"global_step{last['iteration']}" not in saved
