"""Twenty faults of the campaign, one of each kind; `tools/faults` runs as many as wanted."""

from __future__ import annotations

import faults
import pytest

pytestmark = pytest.mark.slurm


def test_twenty_faults_one_of_each_kind():
    results = faults.campaign(seed=3, num=len(faults.KINDS), jobs=5, quick=True)
    assert {result.seed: result.wrong for result in results if result.wrong} == {}
    assert sum(len(result.played) for result in results) >= 15
    # A fault is told when status, triage and report each name it. Two faults in one start of a job
    # have one cause.
    untold = [line for result in results for line in result.untold]
    faults_untold = {
        (result.seed, line.split()[-1]) for result in results for line in result.untold
    }
    assert len(faults_untold) <= 0.1 * sum(len(result.played) for result in results), untold
    assert {result.outcome for result in results} <= {"reached", "gave up"}
