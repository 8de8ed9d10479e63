"""Twenty faults of the campaign, one of each kind; `tools/faults` runs as many as wanted."""

from __future__ import annotations

import faults
import pytest

pytestmark = pytest.mark.slurm


def test_twenty_faults_one_of_each_kind():
    results = faults.campaign(seed=3, num=len(faults.KINDS), jobs=5, quick=True)
    assert {result.seed: result.wrong for result in results if result.wrong} == {}
    assert sum(len(result.played) for result in results) >= 15
    assert {result.outcome for result in results} <= {"reached", "gave up"}
