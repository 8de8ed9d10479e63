"""A run that was interrupted is the run that never was: weights, optimizer, data order, dropout and schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Bench

COMBINATIONS = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def trained(request: pytest.FixtureRequest, bench: Bench) -> tuple[Bench, str]:
    num_ranks = request.param
    orders = []
    for stage, precision in COMBINATIONS:
        name = f"{num_ranks}r-z{stage}-{precision}"
        keys: dict[str, Any] = {"zero_stage": stage, "precision": precision}
        orders.append(bench.order(name, **keys))
        orders.append(bench.order(f"{name}-resumed", "resume", bench.path / name / "global_step3", **keys))
    answers = bench.train_many(orders, num_ranks)
    assert answers == [(0, [])] * len(orders)
    return bench, f"{num_ranks}r"


@pytest.mark.parametrize("stage,precision", COMBINATIONS)
def test_six_steps_are_three_steps_and_three_resumed_ones_bit_for_bit(
    trained: tuple[Bench, str], same_tensors: Callable[[Path, Path], list[str]], stage: int, precision: str
) -> None:
    bench, prefix = trained
    straight = bench.path / f"{prefix}-z{stage}-{precision}"
    resumed = bench.path / f"{prefix}-z{stage}-{precision}-resumed"

    assert same_tensors(straight / "global_step6", resumed / "global_step6") == []
    assert same_tensors(straight / "global_step3", straight / "global_step6") != []
    for name in (straight.name, resumed.name):
        assert bench.latest(name) == "global_step6"
    losses = {line["iteration"]: line["loss"] for line in bench.metrics(straight.name)}
    assert {line["iteration"]: line["loss"] for line in bench.metrics(resumed.name)}.items() <= losses.items()
    assert losses[6] < losses[1]
