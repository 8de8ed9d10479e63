"""Two ranks compute what one does, an interrupted run is the run that never was, and the reference
is computed once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import tiny
from .conftest import Answer, Bench

# name -> (keys of dpo_training, other keys); batch_size is that of one rank, and halved with two.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": ({}, {}),
    "bf16": ({}, {"precision": "bf16"}),
    "copies": ({"fsdp": False, "gradient_accumulation_steps": 2, "batch_size": 2}, {}),
    "tied": ({"activation_checkpointing": True}, {"policy_name": "./tied"}),
    "other": (
        {
            "loss_type": "sigmoid_norm",
            "beta": 2.0,
            "learning_rate": 2e-4,
            "label_smoothing": 0.1,
            "weight_decay": 0.1,
            "lr_decay_style": "cosine",
            "warmup_steps": 2,
            "share_prompt": "never",
        },
        {"ref_name": "./other"},
    ),
}


def keys(name: str, num_ranks: int) -> dict[str, Any]:
    training, others = RUNS[name]
    return {
        "training": {**training, "batch_size": training.get("batch_size", 4) // num_ranks},
        **others,
    }


@pytest.fixture(scope="module")
def ran(bench: Bench) -> dict[str, Answer]:
    """Every run with 1 and 2 ranks, straight and resumed from step 3; and each resumed on the other
    number of ranks."""
    answers: dict[str, Answer] = {}
    for num_ranks in (1, 2):
        orders = {}
        for name in RUNS:
            straight = f"{name}-{num_ranks}"
            orders[straight] = bench.order(straight, **keys(name, num_ranks))
            start = bench.path / straight / "step-3"
            orders[f"{straight}-resumed"] = bench.order(
                f"{straight}-resumed",
                "resume",
                start,
                folder=straight + "-r",
                **keys(name, num_ranks),
            )
            if num_ranks == 1:
                orders[f"{name}-learns"] = bench.order(
                    f"{name}-learns", **keys(name, 1), dataset={"subset": 4}
                )
        if num_ranks == 2:
            orders["moved"] = bench.order(
                "moved",
                "resume",
                bench.path / "fp32-1" / "step-3",
                folder="moved",
                **keys("fp32", 2),
            )
            orders["damaged"] = bench.order(
                "damaged", "resume", bench.path / "fp32-1" / "step-3", **keys("fp32", 2)
            )
            (cache,) = (bench.path / "fp32-1").glob("reference-*.npz")
            (bench.path / "damaged").mkdir()
            (bench.path / "damaged" / cache.name).write_bytes(cache.read_bytes()[:-7] + b"damaged")
            orders["stopped"] = {**bench.order("stopped", **keys("fp32", 2)), "STOP_AT_ONCE": "1"}
        answers.update(zip(orders, bench.train_many(list(orders.values()), num_ranks)))
    assert {name: answer[:2] for name, answer in answers.items()} == {
        name: (0, []) for name in answers
    }
    return answers


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_what_one_rank_trains(
    bench: Bench, ran: dict[str, Answer], name: str
) -> None:
    one, two = bench.metrics(f"{name}-1"), bench.metrics(f"{name}-2")
    # bf16 rounds the same sums differently in another layout of rows.
    tolerance = 3e-2 if name == "bf16" else 1e-6

    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6, 7]
    for key in ("loss", "margin"):
        # A loss is about 1. A margin is as large as beta and the distance of policy and reference
        # make it (10 in `other`), and the fp32 weights it comes from agree to so many digits, not
        # to so many places behind the point.
        scale = max(1.0, *(abs(one[n][key]) for n in one)) if key == "margin" else 1.0
        difference = np.abs([one[n][key] - two[n][key] for n in one])
        assert difference.max() < tolerance * scale, (key, difference)
    if name != "bf16":  # which numpy does not know
        a, b = bench.weights(f"{name}-1"), bench.weights(f"{name}-2")
        assert a.keys() == b.keys() and ("lm_head.weight" in a) == (name != "tied")
        assert max(np.abs(a[key] - b[key]).max() for key in a) < 1e-5


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_of_pairs_that_are_trained_again_and_again_falls(
    bench: Bench, ran: dict[str, Answer], name: str
) -> None:
    # All four pairs are in every batch: the losses of different pairs say nothing about learning.
    losses = [metrics["loss"] for metrics in bench.metrics(f"{name}-learns").values()]
    assert len(losses) == 7 and losses[-1] < losses[0]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(
    bench: Bench,
    ran: dict[str, Answer],
    same_state: Callable[[Path, Path], list[str]],
    name: str,
    num_ranks: int,
) -> None:
    straight = bench.path / f"{name}-{num_ranks}"
    resumed = bench.path / f"{name}-{num_ranks}-r"

    assert same_state(straight / "step-7", resumed / "step-7") == []
    assert same_state(straight / "step-3", straight / "step-7") != []
    assert (resumed / "latest").read_text() == "step-7"
    first, second = bench.metrics(straight.name), bench.metrics(f"{straight.name}-resumed")
    assert list(second) == [4, 5, 6, 7]
    assert [second[n]["loss"] for n in second] == [first[n]["loss"] for n in second]
    assert "Caching reference logprobs" in ran[f"{name}-{num_ranks}"].said


def test_every_layer_is_trained_when_the_policy_was_the_reference_too(
    bench: Bench, ran: dict[str, Answer]
) -> None:
    from safetensors.numpy import load_file

    before, after = (
        load_file(str(bench.path / "policy" / "model.safetensors")),
        bench.weights("fp32-2"),
    )

    assert before.keys() == after.keys()
    assert [name for name in before if np.array_equal(before[name], after[name])] == []


def test_a_run_moves_to_another_number_of_ranks(bench: Bench, ran: dict[str, Answer]) -> None:
    one, moved = bench.metrics("fp32-1"), bench.metrics("moved")

    assert list(moved) == [4, 5, 6, 7]
    assert max(abs(one[n]["loss"] - moved[n]["loss"]) for n in moved) < 1e-6


def test_a_damaged_cache_is_computed_again_from_the_reference_and_not_from_the_trained_policy(
    bench: Bench, ran: dict[str, Answer]
) -> None:
    assert (
        "is damaged" in ran["damaged"].said
        and "Caching reference logprobs of 22 pairs" in ran["damaged"].said
    )
    one, again = bench.metrics("fp32-1"), bench.metrics("damaged")
    assert max(abs(one[n]["loss"] - again[n]["loss"]) for n in again) < 1e-6


def test_a_resume_does_not_compute_the_reference_again(bench: Bench) -> None:
    (again,) = bench.train_many(
        [
            bench.order(
                "again",
                "resume",
                bench.path / "fp32-1" / "step-3",
                folder="fp32-1-r",
                **keys("fp32", 1),
            )
        ],
        1,
    )
    assert again.code == 0 and "Caching" not in again.said


def test_a_stop_during_the_cache_keeps_what_was_computed(
    bench: Bench, ran: dict[str, Answer]
) -> None:
    assert not list((bench.path / "stopped").glob("step-*"))
    assert len(list((bench.path / "stopped").glob("reference-*.npz"))) == 1


def test_margins_are_logged_for_every_pair_of_every_batch(
    bench: Bench, ran: dict[str, Answer]
) -> None:
    logs = bench.path / "copies-2.run" / "logs" / "margins"
    lines = [json.loads(line) for line in (logs / "margins_log.jsonl").read_text().splitlines()]
    metrics = bench.metrics("copies-2")

    assert [(line["epoch"], line["step"], line["pairs"]) for line in lines] == [
        (0, 1, 4),
        (0, 2, 4),
        (0, 3, 4),
        (0, 4, 4),
        (0, 5, 4),
        (0, 6, 2),
        (1, 7, 4),
    ] or [line["pairs"] for line in lines].count(2) == 1
    for line in lines:
        array = np.load(logs / line["file"])[slice(*line["rows"])]
        assert array.dtype == np.float32 and array.shape == (line["pairs"],)
        assert np.isclose(array.mean(), line["mean"], atol=1e-6)
        assert np.isclose(metrics[line["step"]]["margin"], line["mean"], atol=1e-6)
    assert (logs / "epoch_001" / "step_00007.npy").is_file()


def test_checkpoints_are_complete_by_the_guards_rule(bench: Bench, ran: dict[str, Answer]) -> None:
    from hpctrain.runtime.files import Listing
    from hpctrain.runtime.layout import Expected
    from hpctrain.runtime.layouts import LAYOUTS

    layout = LAYOUTS["dcp"]
    names = [
        path.name
        for path in (bench.path / "fp32-2").iterdir()
        if layout.number(path.name) is not None
    ]
    assert sorted(names) == ["step-3", "step-6", "step-7"]
    for name in names:
        assert layout.verdict(str(bench.path / "fp32-2" / name), Listing(), Expected()).faults == ()


def test_a_tensor_of_another_shape_is_not_filled_by_half(
    bench: Bench, ran: dict[str, Answer]
) -> None:
    """DCP reads what overlaps and says nothing."""
    import torch

    from hpctrain.base.errors import UsageError
    from hpctrain.train.dpo import checkpoint, model

    tiny.write_model(bench.path / "wider", hidden_size=48, head_dim=12)
    config = model.dpo_model_config(str(bench.path / "wider"), "sdpa")
    wider = model.model_class(config)(config)
    before = {name: value.clone() for name, value in wider.state_dict().items()}

    with pytest.raises(UsageError, match="tensors have another shape, such as lm_head.weight"):
        checkpoint.load(wider, None, str(bench.path / "fp32-1" / "step-3"))
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_no_longer_fits_is_refused_on_all_ranks(
    bench: Bench, ran: dict[str, Answer], num_ranks: int
) -> None:
    start = bench.path / "fp32-1" / "step-3"
    common: dict[str, Any] = {"folder": f"refused-{num_ranks}"}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"training": {"batch_size": 1}}, "the batch"),
        ({"training": {"batch_size": 4 // num_ranks, "seed": 7}}, "dpo_training.seed"),
        (
            {"training": {"batch_size": 4 // num_ranks}, "dataset": {"subset": 12}},
            "the data changed",
        ),
        (
            {"training": {"batch_size": 4 // num_ranks}, "ref_name": "./other"},
            "the reference model changed",
        ),
        ({"training": {"batch_size": 4 // num_ranks}, "precision": "bf16"}, "`precision` changed"),
        ({"training": {}, "dataset": {"max_len": 3}}, "no pair is left"),
        ({"training": {}, "dataset": {"dataset_name": "./bad.jsonl"}}, "bad.jsonl:2"),
    ]
    (bench.path / "bad.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n'
    )
    orders = [
        bench.order(f"r{n}-{num_ranks}", "resume", start, **common, **change)
        for n, (change, _) in enumerate(changes)
    ]
    # A larger model, whose config would then be saved with weights of the smaller one; and a torn
    # file.
    wide = bench.path / f"wide-{num_ranks}"
    tiny.write_model(wide, hidden_size=48, head_dim=12)
    changes.append(({"policy_name": str(wide)}, "hidden_size 32 -> 48"))
    orders.append(
        bench.order(f"wide-order-{num_ranks}", "finetune", start, **common, **changes[-1][0])
    )
    torn = bench.path / f"torn-{num_ranks}" / "step-3"
    shutil.copytree(start, torn)
    (shard,) = torn.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:2000])
    changes.append(({"training": {"batch_size": 4 // num_ranks}}, "cannot load the checkpoint"))
    orders.append(
        bench.order(f"torn-order-{num_ranks}", "resume", torn, **common, **changes[-1][0])
    )

    answers = bench.train_many(orders, num_ranks)

    for answer, (change, words) in zip(answers, changes):
        assert answer.code in (2, 3, 4) and any(words in problem for problem in answer.problems), (
            change,
            answer,
        )
    assert not list((bench.path / f"refused-{num_ranks}").glob("step-*"))
