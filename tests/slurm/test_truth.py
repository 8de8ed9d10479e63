"""What is said and done after acts of people, on a real Slurm: by hand and through hpctrain."""

from __future__ import annotations

import json
import os

import pytest

pytestmark = pytest.mark.slurm


def by_hand(chain, *options, cwd=None):
    """Submit job.sbatch as the README's first way does; the job id."""
    script = str(chain.dir / "job.sbatch")
    return chain.sandbox.ok("sbatch", "--parsable", *options, script, cwd=cwd).strip()


def states(chain):
    """Job id -> state as `hpctrain status` tells it."""
    shown = json.loads(chain.hpctrain("status", "ft", "--json").stdout)
    return {link["job_id"]: link["state"] for run in shown["runs"] for link in run["links"]}


@pytest.mark.parametrize("named_by", ["folder", "name", "id"])
def test_cancel_ends_every_job_of_the_run_however_it_was_submitted(make, tmp_path, named_by):
    chain = make(steps=1000, chain={"jobs": 2})
    chain.ok("render")
    first = by_hand(chain)
    with chain.held("saved"):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        script = str(chain.dir / "job.sbatch")
        options = ("--hold", "--job-name=other", f"--chdir={elsewhere}")
        renamed = chain.sandbox.ok("sbatch", "--parsable", *options, script, "7").strip()
        piped = chain.sandbox.ok("bash", "-c", f'sbatch --parsable --hold <"{script}"').strip()
        foreign = chain.sandbox.ok(
            "sbatch", "--parsable", "--hold", "-t5", "-psmall-g", "-Aproject_465001281",
            "--wrap=sleep 60", cwd=chain.dir
        ).strip()  # fmt: skip
        told = states(chain)
        target = {"folder": "runs/ft", "name": "ft", "id": piped}[named_by]
        dry = chain.ok("cancel", target, "--dry-run")
        done = chain.ok("cancel", target)
    assert told == {first: "RUNNING", renamed: "PENDING", piped: "PENDING"}
    for job in told:
        assert f"would cancel job {job}" in dry.stderr and f"cancelled job {job}" in done.stderr
    steps = chain.happened("step")[-1]["iteration"]
    saved = chain.happened("saved")[-1]
    lost = f"lost: {steps - saved['step']} iterations since the newest complete checkpoint"
    assert lost in done.stderr and saved["tag"] in done.stderr
    chain.wait(lambda chain: [job for job, *_ in chain.queue()] == [foreign])
    again = chain.ok("cancel", "runs/ft")
    assert "Slurm has no job of" in again.stderr and "waits or runs" in again.stderr
    chain.sandbox.ok("scancel", foreign)


@pytest.mark.parametrize("hurt", ["torn", "folder", "unwritable"])
def test_cancel_needs_nothing_but_slurm(make, hurt):
    chain = make(argv=["sleep", "600"], chain={"jobs": 2})
    chain.ok("chain")
    chain.wait(lambda chain: chain.records(event="begin"))
    ledger, lock = chain.dir / "ledger.jsonl", chain.dir / ".submit.lock"
    (chain.dir / "plan.json").write_text('{"run": "f')
    if hurt == "torn":
        ledger.write_bytes(ledger.read_bytes()[:40])
    elif hurt == "folder":
        ledger.unlink()
        ledger.mkdir()
    else:  # root writes where it may not: what nobody can write is a device that is full
        lock.unlink()
        lock.mkdir()
        ledger.unlink()
        os.symlink("/dev/full", ledger)
    done = chain.ok("cancel", "runs/ft")
    assert done.stderr.count("cancelled job") == 2, done.stderr
    assert ("not on record" in done.stderr) == (hurt != "torn")
    chain.wait()


def test_stop_reaches_a_job_that_was_submitted_by_hand(make):
    chain = make(steps=1000, more=["--signal"])
    chain.ok("render")
    job = by_hand(chain)
    with chain.held("step"):
        done = chain.ok("stop", "runs/ft")
        assert f"job {job} runs" in done.stderr
    chain.wait()
    assert chain.happened("saved")[-1]["step"] == chain.happened("step")[-1]["iteration"] < 1000
