"""What is said and done after acts of people, on a real Slurm: by hand and through hpctrain."""

from __future__ import annotations

import json
import os
import sys
import time

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
            "sbatch",
            "--parsable",
            "--hold",
            "-t5",
            "-psmall-g",
            "-Aproject_465001281",
            "--wrap=sleep 60",
            cwd=chain.dir,
        ).strip()
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
        assert f"job {job} ends after its next checkpoint" in done.stderr
    chain.wait()
    assert chain.happened("saved")[-1]["step"] == chain.happened("step")[-1]["iteration"] < 1000


def change(chain, **fields):
    spec = json.loads((chain.top / "run.yaml").read_text())
    spec["recipe_options"].update(fields)
    (chain.top / "run.yaml").write_text(json.dumps(spec))


def test_chain_after_a_give_up_that_was_mended_goes_on_to_the_target(make):
    chain = make(chain={"jobs": 3, "give_up_after": 2})
    mended = json.loads((chain.top / "run.yaml").read_text())["recipe_options"]["argv"]
    change(chain, argv=["false"])
    chain.ok("chain")
    chain.wait()
    assert [record["mode"] for record in chain.records(event="begin")][-1] == "gave_up"
    change(chain, argv=mended)
    again = chain.ok("chain", "--force")
    assert "3 new links: at most" in again.stderr and "queued 3 links" in again.stderr
    more = chain.ok("chain", "--json")
    assert "nothing to submit: 3 links wait or run" in more.stderr or chain.happened("end")
    assert len(set(json.loads(more.stdout)["live"]) & {"4", "5"}) == 0
    chain.wait()
    assert chain.happened("end")[-1]["iteration"] == 6
    done = chain.ok("chain")
    assert "nothing to submit: the run is done" in done.stderr and not chain.queue()
    numbers = [record["link"] for record in chain.records("ledger.jsonl", event="submitted")]
    assert numbers == [1, 2, 3, 4, 5, 6]


def test_chain_after_cancel_queues_all_again_and_counts_what_runs_by_hand(make):
    chain = make(steps=1000, chain={"jobs": 2})
    chain.ok("chain")
    chain.wait(lambda chain: chain.happened("saved"))
    chain.ok("cancel", "ft")
    chain.wait()
    told = json.loads(chain.hpctrain("status", "ft", "--json").stdout)["runs"][0]
    assert told["links"][1]["reason"] == "`hpctrain cancel`"
    hand = by_hand(chain)
    with chain.held("step"):
        chain.wait(lambda chain: len(chain.records(event="begin")) == 2)
        shown = chain.ok("chain", "--extend", "2")
        assert "2 new links beside 1 that wait or run" in shown.stderr
        waits = {job: behind for job, _, behind in chain.queue()}
        first = min(job for job in waits if job != hand)
        assert f"afterany:{hand}" in waits[first]
        assert "nothing to submit: 3 links wait or run" in chain.ok("chain").stderr
        chain.ok("cancel", "ft")


def test_a_refused_submission_is_no_submission_that_was_cut_off(make):
    chain = make(argv=["sleep", "600"], sbatch={"reservation": "none_such"}, chain={"jobs": 2})
    done = chain.hpctrain("chain", "--no-check")
    assert done.returncode == 3 and "reservation" in done.stderr.lower()
    told = chain.hpctrain("status", "ft")
    assert "cut off" not in told.stderr and "not submitted" in told.stdout


@pytest.mark.parametrize("ignores", ["", "trap '' TERM; "], ids=["leaves", "ignores TERM"])
def test_stop_ends_a_step_that_knows_nothing_of_it_after_its_next_checkpoint(make, ignores):
    chain = make(steps=1000, chain={"jobs": 2})
    argv = json.loads((chain.top / "run.yaml").read_text())["recipe_options"]["argv"]
    change(chain, argv=["bash", "-c", f'{ignores}"$@"', "x", *argv])
    chain.ok("chain", HPCTRAIN_WATCH_S="0.3")
    with chain.held("saved"):
        said = chain.ok("stop", "ft").stderr
        assert "ends after its next checkpoint, at the latest at its time limit, 20" in said
        steps = chain.happened("step")[-1]["iteration"] - chain.happened("saved")[-1]["step"]
        assert f"`hpctrain cancel` would lose {steps} iterations" in said
        assert said.splitlines()[0] in chain.hpctrain("status", "ft").stderr
        time.sleep(3)
        before = chain.happened("saved")[-1]["step"]
        assert len(chain.queue()) == 2  # no newer checkpoint, so it goes on
    chain.wait()
    first, second = chain.records(event="begin")
    (end,) = chain.records(event="end")
    assert second["mode"] == "stopped"
    assert end["exit_code"] == 0 and "STOP" in end["reason"] and end["iteration"] > before
    assert json.loads(chain.hpctrain("status", "ft", "--json").stdout)["runs"][0]["state"] == (
        "stopped"
    )
    log = (chain.dir / "logs" / f"ft-{first['job_id']}.out").read_text()
    assert ("is killed" in log) == bool(ignores)


def test_a_failure_that_would_come_again_is_started_twice_and_named(make, tmp_path):
    argv = [sys.executable, "-c", "import no_such"]
    chain = make(argv=argv, chain={"jobs": 5}, notify=f"tee -a '{tmp_path}/told'")
    chain.ok("chain")
    chain.wait()
    begins = chain.records(event="begin")
    assert [record["mode"] for record in begins] == ["scratch", "scratch", "gave_up"]
    why = "the same failure: ModuleNotFoundError: No module named 'no_such'"
    assert why in begins[-1]["reason"]
    told = chain.hpctrain("status", "ft")
    assert told.returncode == 1 and why in told.stdout
    sent = (tmp_path / "told").read_text()
    counts = [sent.count(f'"event": "{event}"') for event in ("start", "failed", "gave_up")]
    assert counts == [2, 2, 1] and why in sent
