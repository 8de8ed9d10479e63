"""Batches: every pair once an epoch, the same for any number of ranks, and rows that score exactly
the replies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.train.dpo.batches import Pair, lay_out, plan_epoch, rank_slots, steps_per_epoch

SIZES = st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(1, 6))


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 9), st.integers(0, 3))
def test_every_pair_is_in_exactly_one_batch_of_an_epoch(count: int, batch: int, epoch: int) -> None:
    lengths = np.random.default_rng(count).integers(2, 90, count)
    plan = plan_epoch(lengths, batch, 7, epoch)

    assert sorted(np.concatenate(plan).tolist()) == list(range(count))
    assert len(plan) == steps_per_epoch(count, batch)
    assert sorted(map(len, plan))[1:] == [batch] * (len(plan) - 1)
    again = plan_epoch(lengths, batch, 7, epoch)
    assert all(np.array_equal(one, two) for one, two in zip(plan, again))
    if epoch == 0:
        assert lengths[plan[0]].sum() == max(lengths[pairs].sum() for pairs in plan)


def test_epochs_and_seeds_differ_and_lengths_are_bucketed() -> None:
    lengths = np.random.default_rng(0).integers(2, 1000, 4096)
    plans = [
        np.concatenate(plan_epoch(lengths, 8, seed, epoch))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert not np.array_equal(plans[0], plans[1]) and not np.array_equal(plans[0], plans[2])

    def padding(batches: list[np.ndarray]) -> float:
        return 1 - lengths.sum() / sum(lengths[batch].max() * len(batch) for batch in batches)

    random = np.random.default_rng(0).permutation(4096).reshape(-1, 8)
    assert padding(plan_epoch(lengths, 8, 0, 0)) < 0.05 < 0.4 < padding(list(random))


@settings(deadline=None)
@given(st.integers(1, 40), st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1), (2, 2), (3, 1)]))
def test_ranks_share_a_batch_without_gap_or_overlap(count: int, shape: tuple[int, int]) -> None:
    num_ranks, micro = shape
    pairs = np.arange(count) + 100
    passes = [rank_slots(pairs, rank, num_ranks, micro) for rank in range(num_ranks)]

    assert len({len(mine) for mine in passes}) == 1
    counted = [
        (place, pair)
        for mine in passes
        for slots in mine
        for place, pair, counts in zip(slots.places, slots.pairs, slots.counts)
        if counts
    ]
    assert sorted(counted) == [(place, place + 100) for place in range(count)]
    assert all(set(slots.pairs) <= set(pairs.tolist()) for mine in passes for slots in mine)


@pytest.mark.parametrize("shared", [False, True])
@settings(deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=5), multiple=st.sampled_from([1, 8]))
def test_rows_score_every_token_of_a_reply_once_from_the_token_before(
    shared: bool, sizes: list[tuple[int, int, int]], multiple: int
) -> None:
    fresh = iter(range(1, 10_000))
    pairs = [
        Pair(*(np.array([next(fresh) for _ in range(size)], np.int32) for size in row))
        for row in sizes
    ]

    rows = lay_out(pairs, shared, multiple)

    assert rows.input_ids.shape[1] % multiple == 0 and rows.num_tokens == (
        sum(map(sum, sizes)) if shared else sum(2 * p + c + r for p, c, r in sizes)
    )
    expected = []
    for kind, name in enumerate(("chosen", "rejected")):
        for number, pair in enumerate(pairs):
            whole = [*pair.prompt.tolist(), *getattr(pair, name).tolist()]
            start = max(1, len(pair.prompt))
            expected += [
                (whole[at - 1], whole[at], kind * len(pairs) + number)
                for at in range(start, len(whole))
            ]
    before = rows.input_ids.reshape(-1)[rows.select].tolist()
    assert list(zip(before, rows.labels.tolist(), rows.sequence.tolist())) == expected
    assert len(set(zip(rows.sequence.tolist(), rows.offset.tolist()))) == len(expected)
    positions = rows.position_ids[rows.segment < 3]
    assert positions.max() < max(p + max(c, r) for p, c, r in sizes)
