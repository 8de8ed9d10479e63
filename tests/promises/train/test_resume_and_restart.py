"""A run that was interrupted is the run that never was; finetune takes weights only; resume refuses
what is not exact."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpctrain.runtime

from .conftest import Bench, dialogues, write_indexed

COMBINATIONS = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
QUIET: dict[str, Any] = {"train_iters": 2, "checkpoint_factor": 2}
Answers = dict[str, tuple[int, list[str]]]


def straight_and_resumed(bench: Bench, num_ranks: int) -> dict[str, dict[str, str]]:
    """For every stage and precision: six steps with a checkpoint after three, and the last three
    again from there."""
    out = {}
    for stage, precision in COMBINATIONS:
        name = f"{num_ranks}r-z{stage}-{precision}"
        keys: dict[str, Any] = {"zero_stage": stage, "precision": precision}
        out[name] = bench.order(name, **keys)
        out[f"{name}-resumed"] = bench.order(
            f"{name}-resumed", "resume", bench.path / name / "global_step3", **keys
        )
    return out


@pytest.fixture(scope="module")
def by_two(bench: Bench) -> Answers:
    """Everything that two ranks train."""
    calm = {**json.loads((bench.path / "llama.json").read_text()), "attention_dropout": 0.0}
    (bench.path / "calm.json").write_text(json.dumps(calm))
    documents = dialogues(40)
    documents[17] = np.array([7, 20, 7, 8, 999, 8, 2], dtype=np.uint16)
    write_indexed(bench.path / "strange", documents)
    orders = {
        f"z{stage}": bench.order(f"z{stage}", zero_stage=stage, precision="bf16", **QUIET)
        for stage in range(4)
    }
    orders["neox-2r"] = bench.order("neox-2r", model="neox.json", **QUIET)
    orders["calm-2r"] = bench.order("calm-2r", model="calm.json", train_iters=6, zero_stage=2)
    (bench.path / "blocked").mkdir()
    (bench.path / "blocked" / "partial_global_step2").write_text("in the way")
    orders["blocked"] = bench.order("blocked", **QUIET)
    orders["strange"] = bench.order("strange", train_data_paths=["strange"], train_iters=40)
    orders.update(straight_and_resumed(bench, 2))
    return dict(zip(orders, bench.train_many(list(orders.values()), 2)))


@pytest.fixture(scope="module")
def by_one(bench: Bench, by_two: Answers) -> Answers:
    """Everything that one rank trains, much of it from what two ranks left."""
    b = bench
    write_indexed(b.path / "other", dialogues(seed=1))
    step = {name: b.path / name / "global_step2" for name in ("z0", "z1", "z2", "z3", "neox-2r")}
    names: dict[str, dict[str, str]] = {}
    for stage in range(4):
        names[f"finetune-z{stage}"] = b.order(
            f"finetune-z{stage}", "finetune", step[f"z{stage}"], zero_stage=1, **QUIET
        )
    names["finetune-neox"] = b.order(
        "finetune-neox", "finetune", step["neox-2r"], model="neox.json", **QUIET
    )
    names["finetune-wrong"] = b.order("finetune-wrong", "finetune", step["neox-2r"], **QUIET)
    more = {"train_iters": 3, "precision": "bf16"}
    names["resume-z0"] = b.order("resume-z0", "resume", step["z0"], zero_stage=0, **more)
    names["resume-z1"] = b.order("resume-z1", "resume", step["z1"], zero_stage=1, **more)
    names["resume-mixed"] = b.order(
        "resume-mixed", "resume", step["z0"], zero_stage=2, train_iters=3
    )
    names["resume-data"] = b.order(
        "resume-data", "resume", step["z0"], zero_stage=0, train_data_paths=["other"], **more
    )
    same_lengths = dialogues()
    same_lengths[3][2] += 1
    write_indexed(b.path / "edited", same_lengths)
    names["resume-edited"] = b.order(
        "resume-edited", "resume", step["z0"], zero_stage=0, train_data_paths=["edited"], **more
    )
    llama = json.loads((b.path / "llama.json").read_text())
    (b.path / "eps.json").write_text(json.dumps({**llama, "rms_norm_eps": 1e-3}))
    (b.path / "nan.json").write_text(json.dumps({**llama, "rms_norm_eps": float("nan")}))
    (b.path / "short.json").write_text(json.dumps({**llama, "max_position_embeddings": 16}))
    names["resume-eps"] = b.order(
        "resume-eps", "resume", step["z0"], zero_stage=0, model="eps.json", **more
    )
    names["no-finite-step"] = b.order("no-finite-step", model="nan.json", **QUIET)
    names["short"] = b.order("short", model="short.json", **QUIET)
    torn = b.path / "torn" / "global_step2"
    shutil.copytree(step["z0"], torn)
    states = torn / "mp_rank_00_model_states.pt"
    states.write_bytes(states.read_bytes()[:-2000])
    names["torn"] = b.order("torn", "resume", torn, zero_stage=0, **more)
    names["done"] = b.order("done", "resume", step["z0"], zero_stage=0, precision="bf16", **QUIET)
    names["calm-1r"] = b.order(
        "calm-1r", model="calm.json", train_iters=6, zero_stage=0, train_micro_batch_size_per_gpu=4
    )
    names["nan"] = b.order(
        "nan", lr=1e30, warmup_iters=0, max_skipped_in_a_row=2, checkpoint_factor=1, train_iters=6
    )
    names["nan-z0"] = b.order(
        "nan-z0", lr=1e30, warmup_iters=0, max_skipped_in_a_row=2, zero_stage=0, train_iters=6
    )
    names["nan-z0-bf16"] = b.order(
        "nan-z0-bf16",
        lr=1e30,
        warmup_iters=0,
        max_skipped_in_a_row=2,
        zero_stage=0,
        precision="bf16",
        train_iters=6,
    )
    names["nan-z3"] = b.order(
        "nan-z3", lr=1e30, warmup_iters=0, max_skipped_in_a_row=2, zero_stage=3, train_iters=6
    )
    names.update(straight_and_resumed(bench, 1))
    return dict(zip(names, b.train_many(list(names.values()), 1)))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage,precision", COMBINATIONS)
def test_six_steps_are_three_steps_and_three_resumed_ones_bit_for_bit(
    bench: Bench,
    by_one: Answers,
    by_two: Answers,
    same_tensors: Callable[[Path, Path], list[str]],
    stage: int,
    precision: str,
    num_ranks: int,
) -> None:
    straight = bench.path / f"{num_ranks}r-z{stage}-{precision}"
    resumed = bench.path / f"{straight.name}-resumed"
    answers = {**by_one, **by_two}
    assert answers[straight.name] == answers[resumed.name] == (0, [])

    assert same_tensors(straight / "global_step6", resumed / "global_step6") == []
    assert same_tensors(straight / "global_step3", straight / "global_step6") != []
    for name in (straight.name, resumed.name):
        assert bench.latest(name) == "global_step6"
    losses = {line["iteration"]: line["loss"] for line in bench.metrics(straight.name)}
    assert {
        line["iteration"]: line["loss"] for line in bench.metrics(resumed.name)
    }.items() <= losses.items()
    assert losses[6] < losses[1]


def test_the_runtime_guard_takes_every_checkpoint_for_complete_and_one_without_a_shard_for_incomplete(
    bench: Bench, by_one: Answers, by_two: Answers, tmp_path: Path
) -> None:
    runtime = Path(hpctrain.runtime.__file__).parent / "__main__.py"

    def verify(*checkpoints: Path) -> int:
        command = [
            sys.executable,
            str(runtime),
            "verify",
            "--layout",
            "deepspeed",
            *map(str, checkpoints),
        ]
        return subprocess.run(command, capture_output=True, check=False).returncode

    found = sorted(bench.path.glob("[12]r-z*/global_step*"))
    assert len(found) == 2 * 8 * 3
    assert verify(*found) == 0

    for name, victim in (
        ("2r-z1-bf16", "*rank_1_*optim*"),
        ("2r-z0-fp32", "mp_rank*"),
        ("2r-z3-fp32", "*rank_1_*model*"),
    ):
        torn = tmp_path / name / "global_step6"
        shutil.copytree(bench.path / name / "global_step6", torn)
        next(torn.glob(victim)).unlink()
        assert verify(torn) == 1


def test_a_token_outside_the_vocabulary_ends_all_ranks_and_names_its_document(
    by_two: Answers,
) -> None:
    code, found = by_two["strange"]

    assert code == 2 and len(found) == 1
    assert "token 999" in found[0] and "strange#17" in found[0]


@pytest.mark.parametrize("stage", range(4))
def test_finetune_takes_the_weights_of_any_stage_and_number_of_ranks(
    bench: Bench, by_one: Answers, stage: int
) -> None:
    name = f"finetune-z{stage}"
    assert by_one[name] == (0, [])

    first, before = bench.metrics(name)[0], bench.metrics(f"z{stage}")
    # the warm-up starts again
    assert first["iteration"] == 1 and first["lr"] == pytest.approx(5e-4)
    assert first["consumed_samples"] == 4
    assert first["loss"] < before[0]["loss"]  # and the weights do not


def test_finetune_of_the_other_family_and_of_a_model_that_does_not_fit(by_one: Answers) -> None:
    assert by_one["finetune-neox"] == (0, [])
    code, found = by_one["finetune-wrong"]
    assert code == 2 and "do not fit the model" in found[0]


def test_resume_with_another_number_of_ranks_works_without_zero_and_is_refused_with_it(
    bench: Bench, by_one: Answers
) -> None:
    assert by_one["resume-z0"] == (0, [])
    assert [line["iteration"] for line in bench.metrics("resume-z0")] == [3]

    code, found = by_one["resume-z1"]
    assert code == 4 and len(found) == 1
    assert "the number of ranks was 2 and is 1" in found[0] and "finetune" in found[0]
    assert not (bench.path / "resume-z1").exists()


def test_resume_names_everything_that_stands_against_it(by_one: Answers) -> None:
    code, found = by_one["resume-mixed"]
    assert code == 4
    assert ["precision" in found[0], "zero_stage" in found[1], "number of ranks" in found[2]] == [
        True
    ] * 3

    code, found = by_one["resume-data"]
    assert code == 4 and "the data is not what the run was trained on" in found[0]


def test_an_edited_document_or_another_model_is_no_resume(by_one: Answers) -> None:
    code, found = by_one["resume-edited"]
    assert code == 4 and "the data has other tokens" in found[0]

    code, found = by_one["resume-eps"]
    assert code == 4 and "`model` is another one: rms_norm_eps 1e-06 -> 0.001" in found[0]


def test_a_save_that_fails_and_a_torn_checkpoint_are_told_and_nothing_of_them_is_left(
    bench: Bench, by_one: Answers, by_two: Answers
) -> None:
    code, found = by_two["blocked"]
    assert (
        code == 3
        and len(found) == 2
        and all("cannot save `global_step2`: " in text for text in found)
    )
    assert [path.name for path in (bench.path / "blocked").iterdir()] == ["partial_global_step2"]

    code, found = by_one["torn"]
    assert code == 3 and "cannot load the checkpoint: PytorchStreamReader failed" in found[0]


def test_documents_longer_than_the_model_s_positions_are_refused(by_one: Answers) -> None:
    code, found = by_one["short"]
    assert code == 2 and "the model knows 16 positions" in found[0]


def test_a_finished_run_trains_and_writes_nothing(bench: Bench, by_one: Answers) -> None:
    assert by_one["done"] == (0, [])
    assert not (bench.path / "done").exists() and not (bench.path / "done.run").exists()


def test_one_rank_and_two_ranks_learn_the_same(bench: Bench, by_one: Answers) -> None:
    assert by_one["calm-1r"] == (0, [])
    one, two = ([line["loss"] for line in bench.metrics(name)] for name in ("calm-1r", "calm-2r"))

    assert one == pytest.approx(two, rel=1e-5)
    assert np.ptp(one) > 0.01


def test_a_run_without_one_finite_step_is_not_done(bench: Bench, by_one: Answers) -> None:
    assert by_one["no-finite-step"][0] == 1
    assert not list(bench.path.glob("no-finite-step/global_step*"))


@pytest.mark.parametrize("name", ["nan", "nan-z0", "nan-z0-bf16", "nan-z3"])
def test_a_gradient_that_stays_not_finite_ends_the_run_and_is_never_saved(
    bench: Bench, by_one: Answers, name: str
) -> None:
    assert by_one[name][0] == 1

    last = bench.metrics(name)[-1]
    assert last["skipped"] == 2 and last["iteration"] < 6
    saved = sorted(path.name for path in Path(bench.path / name).glob("global_step*"))
    assert f"global_step{last['iteration']}" not in saved
