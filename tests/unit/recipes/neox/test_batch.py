"""Batch and ranks: the identity is derived, or refused with everything that would fit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.config.document import Document
from hpctrain.recipes.neox.batch import decide_batch, decide_shape
from hpctrain.recipes.neox.draft import make_draft

NUMBERS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batch(planned):
    config = planned.config("finetune")
    return tuple(config[name] for name in NUMBERS)


def test_all_three_numbers_are_written(neox):
    planned = neox()

    assert batch(planned) == (576, 3, 1)
    assert planned.decision("data_parallel_size").value == 192
    assert "1536, / pipeline 1 / tensor 8" in planned.decision("data_parallel_size").reason


def test_the_seeds_contradiction_says_what_would_fit(neox):
    problem = neox("train_batch_size: 192\n").problem(
        "`train_batch_size: 192` is no multiple of 3 x 192 = 576"
    )

    assert problem.where == "run.yaml:16:21"
    assert (
        problem.hint
        == "one of: `train_batch_size: 576`; `train_micro_batch_size_per_gpu: 1`; `nodes: 64`"
    )
    assert "192 nodes x 8 ranks = 1536" in problem.why


def test_the_seeds_contradiction_with_accumulation_given(neox):
    problem = neox("train_batch_size: 192\ngradient_accumulation_steps: 1\n").problem(
        "192 is not 3 x 1 x 192 = 576"
    )

    assert "`train_batch_size: 576`" in problem.hint
    assert "`train_micro_batch_size_per_gpu: 1`" in problem.hint
    assert "`nodes: 64`" in problem.hint


def test_accumulation_left_out_is_derived_where_neox_would_fail(neox):
    planned = neox("train_batch_size: 1152\n")

    assert batch(planned) == (1152, 3, 2)
    assert "NeoX would take 1" in planned.decision("config.gradient_accumulation_steps").reason


def test_the_micro_batch_is_derived(neox):
    planned = neox("train_batch_size: 768\n", base={"train_micro_batch_size_per_gpu": None})

    assert batch(planned) == (768, 4, 1)


def test_null_asks_for_deriving(neox):
    planned = neox(
        "gradient_accumulation_steps: null\ntrain_batch_size: 1728\n",
        base={"gradient_accumulation_steps": "1"},
    )

    assert batch(planned) == (1728, 3, 3)


def test_nothing_given_is_refused(neox):
    neox(base={"train_micro_batch_size_per_gpu": None}).problem(
        "neither `train_micro_batch_size_per_gpu` nor"
    )


@pytest.mark.parametrize("number", ["0", "-3"])
def test_numbers_below_one_are_refused(neox, number):
    neox(f"train_micro_batch_size_per_gpu: {number}\n").problem("must be at least 1")


def test_ranks_that_cannot_be_split_are_refused(neox):
    problem = neox("pipe_parallel_size: 5\n").problem("1536 ranks cannot be split")

    assert problem.where.startswith("run.yaml:6:") and "a multiple of 5 nodes" in problem.hint


def test_pipeline_size_zero_counts_as_one_and_splits_otherwise(neox):
    assert neox().plan.resolved.guard.data_parallel == 192
    planned = neox("pipe_parallel_size: 2\n")
    assert (
        planned.plan.resolved.guard.data_parallel,
        planned.plan.resolved.guard.pipeline_parallel,
    ) == (96, 2)


def test_tensor_parallelism_across_nodes_is_warned_about(neox):
    neox("model_parallel_size: 16\nnum_kv_heads: 16\n").problem(
        "does not stay within a node", "warning"
    )


def test_ranks_are_told_to_neox(neox):
    assert neox().config("resume")["global_num_gpus"] == 1536
    neox("global_num_gpus: 512\n").problem("contradicts what hpctrain sets: 1536")


@settings(deadline=None)
@given(
    nodes=st.integers(1, 64),
    ranks=st.sampled_from([1, 2, 4, 8]),
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.integers(0, 4),
    train=st.none() | st.integers(-1, 600),
    micro=st.none() | st.integers(-1, 12),
    steps=st.none() | st.integers(-1, 12),
)
def test_what_is_written_satisfies_neox_and_what_fits_really_fits(
    nodes, ranks, tensor, pipeline, train, micro, steps
):
    def decide(nodes, values):
        values = {name: value for name, value in values.items() if value is not None}
        draft = make_draft(
            "upstream",
            Document({}),
            [],
            Document({**values, "model_parallel_size": tensor, "pipe_parallel_size": pipeline}),
        )
        shape = decide_shape(draft, nodes, ranks, "run.yaml")
        decide_batch(draft, shape, "run.yaml")
        return draft, shape, [p for p in draft.problems if p.level == "error"]

    given_values = dict(zip(NUMBERS, (train, micro, steps)))
    draft, shape, errors = decide(nodes, given_values)
    if not errors:
        # NeoX arguments.py:866-883
        total, each, count = (draft.values[name] for name in NUMBERS)
        assert shape.data and total == each * count * shape.data and min(total, each, count) > 0
        assert all(
            draft.values[name] == value for name, value in given_values.items() if value is not None
        )
        return
    for fit in [
        part for p in errors if p.hint.startswith("one of: ") for part in p.hint[8:].split("; ")
    ]:
        changed, new_nodes = dict(given_values), nodes
        for assignment in fit.replace("`", "").split(" with "):
            name, _, value = assignment.partition(": ")
            if name == "nodes":
                new_nodes = int(value)
            else:
                changed[name] = int(value)
        assert decide(new_nodes, changed)[2] == [], (fit, given_values)
