"""The arithmetic of a run by hand: bills, links, and how often to save."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from hpctrain.config.billing import cost, links_needed, mean_time_to_failure_s, young_daly_s


def partition(**billing):
    rates = {"unit": "GPU-hour", "per_node_hour": None, "per_slice_hour": None, "slice": {}}
    return SimpleNamespace(billing={**rates, **billing})


def test_hours_are_counted_whatever_the_site_bills():
    for where in (None, SimpleNamespace(billing=None)):
        bill = cost(where, 3, 56, 480, 8, 5400)
        assert (bill.node_hours, bill.gpu_hours, bill.billed, bill.unit) == (4.5, 36.0, None, "")
        assert "does not say" in bill.formula
    assert cost(None, 3, 56, 480, 0, 5400).gpu_hours == 0


def test_a_price_a_node_hour():
    bill = cost(partition(per_node_hour=4), 192, 56, 480, 8, 2 * 86400)
    assert (bill.billed, bill.unit, bill.formula) == (36864, "GPU-hour", "4 x 192 nodes x 48 h")


@pytest.mark.parametrize(
    ("cores", "memory_gib", "gpus", "slices", "by"),
    [
        (7, 60, 1, 1, "cores"),
        (8, 60, 1, 2, "cores"),
        (7, 60.5, 1, 2, "memory_gib"),
        (7, 60, 2, 2, "gpus"),
        (56, 480, 8, 8, "cores"),
        (1, 1, 0, 1, "cores"),
    ],
)
def test_the_largest_share_of_a_slice_is_billed_rounded_up(cores, memory_gib, gpus, slices, by):
    """LUMI's small-g: half a GPU-hour for each begun slice of 7 cores, 60 GiB or one GCD."""
    sliced = partition(per_slice_hour=0.5, slice={"cores": 7, "memory_gib": 60, "gpus": 1})
    bill = cost(sliced, 2, cores, memory_gib, gpus, 3600)
    assert bill.billed == 0.5 * 2 * slices
    assert bill.formula == f"0.5 x 2 nodes x {slices} slices a node (by {by}) x 1 h"


def test_a_slice_of_one_kind_only_and_of_none():
    assert (
        cost(
            partition(per_slice_hour=1, slice={"cores": 4, "memory_gib": None}), 1, 9, 999, 0, 3600
        ).billed
        == 3
    )
    bare = cost(partition(per_slice_hour=1, slice={}), 2, 9, 999, 0, 1800)
    assert bare.billed == 1 and "by nodes" in bare.formula


@pytest.mark.parametrize(
    ("iterations", "step_s", "every", "time_s", "lead_s", "on_signal", "links"),
    [
        (100, 10, 10, 1000, 0, False, 1),
        (101, 10, 10, 1000, 0, False, 2),
        (100, 10, 10, 999, 0, False, 2),  # 99 steps keep 90
        (180, 10, 10, 999, 0, False, 2),
        (181, 10, 10, 999, 0, False, 3),
        (100, 10, 60, 500, 0, False, None),  # 50 steps reach no save
        (100, 10, 60, 500, 0, True, 2),
        (100, 10, None, 500, 0, False, 2),
        (100, 10, 60, 500, 100, True, 3),  # 40 steps before the signal
        (40, 10, 60, 500, 100, True, 1),
        (10, 10, 5, 50, 60, True, None),  # the signal comes before the first step ends
        (1, 10, None, 9, 0, False, None),
        (200, 10, 100, 1000, 0, False, 2),
    ],
)
def test_how_many_links_a_run_needs(iterations, step_s, every, time_s, lead_s, on_signal, links):
    assert links_needed(iterations, step_s, every, time_s, lead_s, on_signal) == links


def test_when_some_node_fails():
    """6.5 failures per 1000 node-days (arXiv 2410.21680): 192 nodes fail about every 19 hours."""
    assert mean_time_to_failure_s(1) == pytest.approx(1000 * 86400 / 6.5)
    assert mean_time_to_failure_s(192) / 3600 == pytest.approx(19.23, abs=0.01)
    assert mean_time_to_failure_s(0) == mean_time_to_failure_s(1)
    assert mean_time_to_failure_s(10, 1) == 100 * 86400


def test_the_interval_of_saves_that_loses_least():
    assert young_daly_s(120, 60000) == pytest.approx(math.sqrt(2 * 120 * 60000))
