"""Chains on a real Slurm: queued at once, never lost or doubled, ended by their own guard."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import checkpoints
import pytest

pytestmark = pytest.mark.slurm


def test_a_chain_runs_to_its_target_finetunes_once_resumes_after_that_and_leaves_nothing_queued(
    make, tmp_path
):
    base = checkpoints.save(str(tmp_path / "base"), 50, 2, 1, name="_global_step50_backup")
    before = checkpoints.snapshot(base)
    bench = tmp_path / "bench.sh"
    bench.write_text(
        "#!/bin/bash\n#SBATCH --time=00:05:00\n#SBATCH --partition=small-g\necho"
        ' "$HPCTRAIN_CHECKPOINT" >>bench.txt\nexit 7\n'
    )
    chain = make(
        steps=9,
        checkpoint={"dir": str(tmp_path / "ck"), "start": base},
        chain={"jobs": 5, "after_each": str(bench)},
    )
    (chain.truth / "faults").mkdir(parents=True)
    (chain.truth / "faults" / "1").write_text(
        json.dumps({"kind": "kill_rank", "at_step": 5, "rank": 1})
    )
    chain.ok("chain")
    chain.wait()
    assert [(start["mode"], start["iteration"]) for start in chain.happened("start")] == [
        ("finetune", 0),
        ("resume", 3),
    ]
    assert [record["mode"] for record in chain.records(event="begin")] == [
        "finetune",
        "resume",
        "done",
    ]
    assert chain.happened("end")[-1]["optimizer_steps"] == 9
    assert checkpoints.snapshot(base) == before
    assert (chain.dir / "bench.txt").read_text().split() == [
        f"{chain.ckpt}/global_step3",
        f"{chain.ckpt}/global_step9",
    ]
    assert len(chain.records("ledger.jsonl", event="cancelled")) >= 4


def test_a_chain_without_progress_gives_up_with_93_and_cancels_the_rest(make):
    chain = make(argv=["false"], chain={"jobs": 6, "give_up_after": 2})
    chain.ok("chain")
    chain.wait()
    modes = [record["mode"] for record in chain.records(event="begin")]
    assert modes == ["scratch", "scratch", "gave_up"]
    last = chain.records(event="begin")[-1]
    assert "2 links in a row" in last["reason"]
    assert chain.exit_code(last["job_id"]) == "93"
    assert [chain.exit_code(record["job_id"]) for record in chain.records(event="end")] == [
        "1",
        "1",
    ]
    assert "gives up" in (chain.dir / "logs" / f"ft-{last['job_id']}.out").read_text()


def crashing_sbatch(tmp_path, when):
    """An sbatch that kills hpctrain right before or right after the real one, at the call named in
    a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    real = 'PATH=${PATH#*:} sbatch "$@"'
    body = {
        "before": 'kill -9 "$PPID"; sleep 1',
        "after": f'{real} >"$0.out"; kill -9 "$PPID"; sleep 1',
    }[when]
    script = folder / "sbatch"
    script.write_text(
        f"#!/bin/bash\n[ $1 != --test-only ] || {{ {real}; exit; }}\n"
        f"n=$(($(cat {folder}/n 2>/dev/null || echo 0) + 1)); echo $n >{folder}/n\n"
        f"if [ $n = {2} ]; then {body}; exit 1; fi\n{real}\n"
    )
    script.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_between_two_submissions_and_a_rerun_neither_lose_nor_double_a_link(
    make, tmp_path, when
):
    chain = make(argv=["sleep", "600"], chain={"jobs": 4})
    path = f"{crashing_sbatch(tmp_path, when)}:{chain.sandbox.environ['PATH']}"
    assert chain.hpctrain("chain", PATH=path).returncode == -9
    assert len(chain.queue()) == (1 if when == "before" else 2)
    chain.ok("chain")
    queue = {job_id: dependency for job_id, _, dependency in chain.queue()}
    assert len(queue) == 4
    ids = [record["job_id"] for record in chain.records("ledger.jsonl", event="submitted")]
    assert sorted(ids) == sorted(queue)
    # Each waits for exactly the one before it, also across the crash.
    links = {
        record["link"]: record["job_id"]
        for record in chain.records("ledger.jsonl", event="submitted")
    }
    assert [re.findall(r"\d+", queue[links[link]])[:1] for link in (2, 3, 4)] == [
        [links[link]] for link in (1, 2, 3)
    ]
    again = chain.ok("chain")
    assert len(chain.queue()) == 4, (again.stdout, again.stderr, chain.records("ledger.jsonl"))
    chain.ok("cancel")
    chain.wait()
    assert len(chain.records("ledger.jsonl", event="cancelled")) == 4


LOST = {
    "timed out": (
        'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"'
        " >&2; exit 1"
    ),
    "no contact": (
        'echo "sbatch: error: Batch job submission failed: Unable to contact slurm controller (send'
        ' failure)" >&2; exit 1'
    ),
    "killed": "kill -9 $$",
    "said nothing": "exit 0",
    "said something else": "echo Your job is on its way; exit 0",
}


@pytest.mark.parametrize("how", LOST)
def test_a_lost_answer_is_told_as_one_and_the_same_command_finds_the_job(make, tmp_path, how):
    chain = make(argv=["sleep", "600"], chain={"jobs": 2})
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    real = shutil.which("sbatch", path=chain.sandbox.environ["PATH"])
    fake.write_text(f'#!/bin/bash\n"{real}" "$@" >/dev/null\n{LOST[how]}\n')
    fake.chmod(0o755)
    done = chain.hpctrain("chain", PATH=f"{fake.parent}:{chain.sandbox.environ['PATH']}")

    assert done.returncode == 3, done.stderr
    assert "may be queued" in done.stderr and "refused" not in done.stderr
    assert "hint: run the same command again" in done.stderr
    again = chain.ok("chain")
    assert "was submitted before as job" in again.stderr
    assert len(chain.queue()) == 2


def test_text_around_the_id_loses_nothing(make, tmp_path):
    chain = make(argv=["sleep", "600"], chain={"jobs": 2})
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    real = shutil.which("sbatch", path=chain.sandbox.environ["PATH"])
    fake.write_text(
        f'#!/bin/bash\necho "12 jobs of yours"\n"{real}" "$@"\necho "see https://portal/1"\n'
    )
    fake.chmod(0o755)
    chain.ok("chain", PATH=f"{fake.parent}:{chain.sandbox.environ['PATH']}")

    submitted = [record["job_id"] for record in chain.records("ledger.jsonl", event="submitted")]
    assert (
        sorted(submitted) == sorted(job_id for job_id, *_ in chain.queue()) and len(submitted) == 2
    )


@pytest.mark.parametrize("command", ["uhold", "requeuehold"])
def test_a_held_job_is_told_as_what_it_is_with_the_command_that_releases_it(make, command):
    chain = make(argv=["sleep", "600"], chain={"jobs": 2})
    chain.ok("chain")
    first, second = sorted(job_id for job_id, *_ in chain.queue())
    chain.wait(
        lambda chain: [state for job, state, _ in chain.queue() if job == first] == ["RUNNING"]
    )
    job = second if command == "uhold" else first
    chain.sandbox.ok("scontrol", command, job)
    chain.wait(
        lambda chain: [state for found, state, _ in chain.queue() if found == job] == ["PENDING"]
    )
    done = chain.hpctrain("status", "ft")
    row = next(line for line in done.stdout.splitlines() if job in line)

    assert "will not start by itself" in row and "starts about" not in row
    assert f"scontrol release {job}" in done.stderr
    shown = json.loads(chain.hpctrain("status", "ft", "--json").stdout)
    (link,) = [link for run in shown["runs"] for link in run["links"] if link["job_id"] == job]
    assert link["release"] == f"scontrol release {job}" and link["expected_start"] is None


def test_two_chain_commands_at_once_submit_one_chain(make):
    chain = make(argv=["sleep", "600"], chain={"jobs": 5})
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "hpctrain", "chain"],
            cwd=chain.top,
            env=chain.sandbox.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    codes = []
    for command in commands:
        command.communicate()
        codes.append(command.returncode)
    assert 0 in codes and set(codes) <= {0, 4}
    assert len(chain.queue()) == 5


def test_stop_lets_the_step_save_and_ends_the_chain_and_taken_back_it_goes_on(make):
    chain = make(steps=60, more=["--signal"], chain={"jobs": 2})
    chain.ok("chain")
    with chain.held("step"):
        chain.ok("stop", "ft")
    chain.wait()
    assert [record["mode"] for record in chain.records(event="begin")][-1] == "stopped"
    saved = chain.happened("saved")[-1]["step"]
    assert saved < 60 and saved == chain.happened("step")[-1]["iteration"]
    refused = chain.hpctrain("chain", "--extend", "1")
    assert refused.returncode == 4 and "STOP" in refused.stderr
    (chain.dir / "STOP").unlink()
    again = chain.ok("chain")
    assert "queued 1 links" in again.stderr  # link 1 made a checkpoint, link 2 did nothing
    chain.wait()
    starts = chain.happened("start")
    assert (starts[-1]["mode"], starts[-1]["iteration"]) == ("resume", saved)
    assert chain.happened("end")[-1]["iteration"] == 60


def test_a_second_job_submitted_by_hand_does_not_start_while_a_link_runs(make):
    chain = make(steps=6, chain={"jobs": 1})
    chain.ok("chain")
    with chain.held("step"):
        job = chain.sandbox.ok(
            "sbatch", "--parsable", str(chain.dir / "job.sbatch"), HPCTRAIN_LOCK_WAIT_S="1"
        ).strip()
        chain.wait(lambda chain: job not in [job_id for job_id, *_ in chain.queue()])
    chain.wait()
    assert "is running" in (chain.dir / "logs" / f"ft-{job}.out").read_text()
    assert chain.exit_code(job) == "1"
    assert len(chain.happened("start")) == 1 and chain.happened("end")


def test_a_requeue_goes_on_as_the_same_link(make):
    chain = make(steps=30, chain={"jobs": 2})
    chain.ok("chain")
    with chain.held("saved"):
        job = chain.records(event="begin")[0]["job_id"]
        chain.sandbox.ok("scontrol", "requeue", job)
    # Slurm holds a requeued job back for a while; nobody here has to wait for that.
    chain.wait(
        lambda chain: any(
            state == "PENDING" and job_id == job for job_id, state, _ in chain.queue()
        )
    )
    chain.sandbox.ok("scontrol", "update", f"jobid={job}", "StartTime=now")
    chain.wait(seconds=200)
    begins = chain.records(event="begin")
    assert [(r["link"], r["restart"], r["mode"]) for r in begins[:2]] == [
        (1, 0, "scratch"),
        (1, 1, "resume"),
    ]
    assert chain.happened("end")[-1]["optimizer_steps"] == 30


def test_the_submitting_shells_slurm_variables_do_not_reach_the_job(make):
    chain = make(argv=["sleep", "600"])
    chain.ok(
        "chain",
        SBATCH_TIMELIMIT="1",
        SBATCH_JOB_NAME="other",
        SLURM_NTASKS="99",
        SBATCH_DEPENDENCY="afterok:1",
    )
    job = chain.queue()[0][0]
    said = chain.sandbox.ok("scontrol", "show", "job", "-o", job)
    assert "TimeLimit=00:05:00" in said and "JobName=ft " in said


def test_a_refused_submission_says_slurms_words_and_leaves_a_rerun_possible(make):
    chain = make(argv=["sleep", "600"], sbatch={"reservation": "none_such"})
    checked = chain.hpctrain("chain")
    assert checked.returncode == 4 and "Slurm would refuse it" in checked.stderr
    assert not chain.dir.exists()
    done = chain.hpctrain("chain", "--no-check")
    assert "Slurm would refuse it" in chain.records("ledger.jsonl")[0]["problems"][0]
    assert done.returncode == 3 and "reservation" in done.stderr.lower()
    assert chain.queue() == []
    spec = json.loads((chain.top / "run.yaml").read_text())
    del spec["sbatch"]
    (chain.top / "run.yaml").write_text(json.dumps(spec))
    chain.ok("chain", "--force")
    assert len(chain.queue()) == 1


def test_a_run_of_one_link_that_failed_is_queued_again(make):
    """The new link is the second, and still the only one: no rule of a chain is met."""
    chain = make(checkpoint={})
    spec = json.loads((chain.top / "run.yaml").read_text())
    spec["recipe_options"] = {"argv": ["false"]}
    (chain.top / "run.yaml").write_text(json.dumps(spec))
    chain.ok("chain")
    chain.wait()
    assert "queued 1 links" in chain.ok("chain").stderr
    chain.wait()
    refused = chain.hpctrain("chain", "--extend", "2")
    assert refused.returncode == 2 and "needs to know the checkpoints" in refused.stderr


def test_nodes_that_are_down_now_are_no_refusal(make):
    chain = make(argv=["sleep", "600"])
    names = chain.sandbox.ok("sinfo", "-h", "-p", "small-g", "-o", "%N").strip()
    state = ["scontrol", "update", f"nodename={names}"]
    chain.sandbox.ok(*state, "state=down", "reason=test")
    try:
        checked = chain.hpctrain("check")
        assert checked.returncode == 0, checked.stderr
        assert "Slurm cannot say when it could start" in checked.stderr
        chain.ok("chain")
        assert [state for _, state, _ in chain.queue()] == ["PENDING"]
    finally:
        chain.sandbox.ok(*state, "state=resume")


def test_what_no_node_has_is_a_refusal(make):
    chain = make(argv=["sleep", "600"], sbatch={"constraint": "none_such"})
    checked = chain.hpctrain("check")
    assert checked.returncode == 1 and "Slurm would refuse it" in checked.stderr


def test_waiting_links_are_kept_off_nodes_named_in_two_failures(make):
    chain = make(argv=["sleep", "600"], nodes=3, chain={"jobs": 3})
    chain.ok("chain")
    chain.wait(lambda chain: [state for _, state, _ in chain.queue()].count("RUNNING") == 1)
    logs = chain.dir / "logs"
    for job in ("91", "92"):
        begin = {
            "event": "begin",
            "link": int(job),
            "job_id": job,
            "restart": 0,
            "mode": "scratch",
            "checkpoint": str(job),
            "nodes": "nid[000001-000003]",
        }
        with (chain.dir / "links.jsonl").open("a") as file:
            file.write(json.dumps(begin) + "\n")
        (logs / f"ft-{job}.out").write_text(
            f"hpctrain: job {job}, restart 0, 3 nodes\nsrun: error: nid000002: task 1: Bus error\n"
        )
    done = chain.ok("chain", "--exclude-bad")
    assert "nid000002 was named in 2 failures" in done.stderr
    waiting = [job_id for job_id, state, _ in chain.queue() if state == "PENDING"]
    assert len(waiting) == 2
    for job in waiting:
        assert "ExcNodeList=nid000002 " in chain.sandbox.ok("scontrol", "show", "job", "-o", job)


def test_a_costly_chain_is_not_submitted_unasked(make):
    chain = make(
        argv=["sleep", "600"],
        partition="standard-g",
        nodes=4,
        gpus_per_node=8,
        tasks_per_node=8,
        time="24:00:00",
        chain={"jobs": 5},
    )
    done = chain.hpctrain("chain", HPCTRAIN_SANDBOX="")
    assert done.returncode == 4 and "3840" in done.stderr and "--yes" in done.stderr
    assert chain.queue() == []


def test_dry_run_writes_nothing_and_tells_modes_and_cost(make):
    chain = make(chain={"jobs": 3})
    done = chain.ok("chain", "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert [link["expected"] for link in found["links"]] == ["scratch", "resume", "resume"]
    assert found["submitted"] is False and found["gpu_hours"] == pytest.approx(0.25)
    assert sorted(os.listdir(chain.top)) == ["run.yaml"]
