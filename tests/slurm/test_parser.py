"""The real sbatch reads every golden job script and finds exactly the options that the plan
decided."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpctrain.plan.load import load_plan

pytestmark = pytest.mark.slurm
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/run.yaml"))


@pytest.mark.parametrize("case", CASES)
def test_sbatch_reads_back_every_directive(case, sandbox, monkeypatch):
    monkeypatch.chdir(GOLDEN / case)
    script = GOLDEN / case / "expected" / "job.sbatch"
    done = sandbox.run("sbatch", "-vvvv", "--test-only", str(script))
    found = re.findall(r"Found in script, argument \"(.*)\"$", done.stderr, re.MULTILINE)
    plan = load_plan("run.yaml", (), '/users/o\'hara/$(touch canary) `id` "runs" 100%/' + case).plan
    wanted = [f"--{d.option}={d.value}" if d.value else f"--{d.option}" for d in plan.directives]

    assert found == wanted


@pytest.mark.parametrize(
    "case", [case for case in CASES if (GOLDEN / case / "expected" / "export.sbatch").exists()]
)
def test_sbatch_reads_back_the_export_jobs_directives(case, sandbox, monkeypatch):
    monkeypatch.chdir(GOLDEN / case)
    done = sandbox.run(
        "sbatch", "-vvvv", "--test-only", str(GOLDEN / case / "expected" / "export.sbatch")
    )
    found = re.findall(r"Found in script, argument \"(.*)\"$", done.stderr, re.MULTILINE)
    plan = load_plan("run.yaml", (), '/users/o\'hara/$(touch canary) `id` "runs" 100%/' + case).plan

    wanted = plan.resolved.template["export"]["directives"]
    assert found == [
        f"--{d['option']}={d['value']}" if d["value"] else f"--{d['option']}" for d in wanted
    ]
