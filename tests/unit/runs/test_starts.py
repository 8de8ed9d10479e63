"""One history of a run's starts: whoever tells what became of a run tells the same starts and
times.
"""

from __future__ import annotations

import itertools
import json
import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.jobs import bad_nodes
from hpctrain.runs import cost
from hpctrain.runs.diagnose import Subject
from hpctrain.runs.records import read_run
from hpctrain.runs.report.gather import gather
from hpctrain.runs.starts import jobs_of, starts_of
from hpctrain.runs.status import status_of
from hpctrain.slurm.jobs import Answer, Job
from hpctrain.triage.records import utc
from hpctrain.triage.thresholds import Thresholds

ZERO = 1795219200.0  # 2026-11-21T00:00:00Z
NOBODY = Answer({}, {}, ("Slurm was not asked",))
PLAN = {
    "run": "r",
    "guard": {"target": 1000, "counter": "latest"},
    "job": {
        "time_s": 3600,
        "num_nodes": 1,
        "tasks_per_node": 1,
        "iterations": 1000,
        "num_links": 2,
    },
    "cost": {
        "node_hours": 1.0,
        "gpu_hours": 8.0,
        "billed": 4.0,
        "unit": "GPU-hour",
        "formula": "f",
    },
}


def record(event, minute, restart=0, job="7", link=1, **fields):
    mode = fields.pop("mode", "resume")
    return {
        "event": event,
        "link": link,
        "job_id": job,
        "restart": restart,
        "mode": mode,
        "checkpoint": None,
        "iteration": None,
        "exit_code": None,
        "nodes": "n1",
        "reason": "",
        "time": utc(ZERO + 60 * minute),
        **fields,
    }


@pytest.fixture
def run_of(tmp_path):
    """A run directory with these records of links; `logs`: file name -> (text, minute of its last
    write).
    """
    number = itertools.count()

    def make(*links, ledger=(), logs=()):
        folder = tmp_path / f"run{next(number)}"
        (folder / "logs").mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps(PLAN))
        (folder / "links.jsonl").write_text("".join(json.dumps(one) + "\n" for one in links))
        (folder / "ledger.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ledger))
        for name, (text, minute) in dict(logs).items():
            (folder / "logs" / name).write_text(text)
            os.utime(folder / "logs" / name, (ZERO + 60 * minute,) * 2)
        return read_run(str(folder))

    return make


def slurm_job(job="7", state="COMPLETED", start=None, end=None, **fields):
    elapsed = None if start is None or end is None else max(int(60 * (end - start)), 0)
    elapsed = fields.pop("elapsed_s", elapsed)
    return Job(
        job,
        state,
        start_s=None if start is None else ZERO + 60 * start,
        end_s=None if end is None else ZERO + 60 * end,
        elapsed_s=elapsed,
        **{"source": "sacct", "nodes": ("n1",), **fields},
    )


def told(run, answer=NOBODY, minute=600):
    """The same question asked of status, cost and report."""
    now_s = ZERO + 60 * minute
    status = status_of(run, answer, now_s)
    spent = cost.spent(run, answer, now_s)
    report = gather(run.run_dir, ask_slurm=False, now_s=now_s) if answer is NOBODY else None
    return SimpleNamespace(
        status=status, spent=spent, report=report, starts=starts_of(run, answer, now_s)
    )


REQUEUED = (
    record("begin", 0),
    record("begin", 5, restart=1),
    record("end", 7, restart=1, exit_code=0),
)


def test_a_requeued_job_ran_as_long_for_status_as_for_cost_and_report(run_of):
    """Ended twice after 5 and 2 minutes; status forgot the first start, cost did not."""
    found = told(run_of(*REQUEUED))
    (link,) = found.status.links

    assert (link.elapsed_s, link.restarts) == (420, 1)
    assert (utc(link.start_s), utc(link.end_s)) == (utc(ZERO), utc(ZERO + 420))
    assert [start["elapsed_s"] for start in link.as_json()["starts"]] == [300, 120]
    assert [start.elapsed_s for start, _ in found.spent.starts] == [300, 120]
    assert found.spent.used.time_s == 420
    assert [(row.restart, row.elapsed_s) for row in found.report.rows] == [(0, 300), (1, 120)]


def test_accounting_and_records_are_put_together_start_by_start(run_of):
    first = slurm_job(state="NODE_FAIL", start=0, end=4, nodes=("n1", "n2"))
    second = slurm_job(state="FAILED", start=5, end=9, nodes=("n3",), exit_code=1)
    begins = (record("begin", 0.2, iteration=0), record("begin", 5.2, restart=1, iteration=100))
    end = record("end", 8.9, restart=1, exit_code=3, iteration=150, checkpoint="c150")
    one, two = told(run_of(*begins, end), Answer({"7": second}, {"7": [first]})).starts

    assert (one.state, one.nodes, one.elapsed_s, one.exit_code) == (
        "NODE_FAIL",
        ("n1", "n2"),
        240,
        None,
    )
    assert (two.state, two.nodes, two.elapsed_s) == ("FAILED", ("n3",), 240)
    assert two.exit_code == 3  # the step's own, rather than the batch script's
    assert (one.iteration_from, two.iteration_from, two.iteration_to) == (0, 100, 150)
    assert two.checkpoint == "c150" and (one.source, two.source) == ("sacct", "sacct")


def test_what_only_the_newest_answer_tells_is_of_the_newest_start(run_of):
    """squeue alone, or accounting that forgot the earlier starts: restart 1 is not taken for
    restart 0.
    """
    begins = (record("begin", 0), record("begin", 5, restart=1))
    for job in (
        slurm_job(state="RUNNING", start=5, source="squeue"),
        slurm_job(state="TIMEOUT", start=5, end=65),
    ):
        starts = told(run_of(*begins), Answer({"7": job}, {}), minute=15).starts
        assert [(start.restart, start.elapsed_s) for start in starts] == [
            (0, 300),
            (1, 600 if job.running else 3600),
        ]
        assert [start.active for start in starts] == [False, job.running]


def test_a_start_that_never_reached_the_guard_is_one_too(run_of):
    """Its node failed before the job script ran: Slurm knows it, links.jsonl does not."""
    failed = slurm_job(state="NODE_FAIL", start=0, end=1)
    good = slurm_job(state="COMPLETED", start=5, end=10)
    run = run_of(record("begin", 5.1, restart=1), record("end", 9.9, restart=1, exit_code=0))
    starts = told(run, Answer({"7": good}, {"7": [failed]})).starts
    assert [(start.restart, start.state, start.mode) for start in starts] == [
        (0, "NODE_FAIL", None),
        (1, "COMPLETED", "resume"),
    ]


def test_a_job_that_waits_again_has_had_its_starts(run_of):
    waiting = slurm_job(state="PENDING", start=90, reason="BeginTime", source="squeue", nodes=())
    first = slurm_job(state="NODE_FAIL", start=0, end=4)
    found = told(run_of(record("begin", 0)), Answer({"7": waiting}, {"7": [first]}))
    (link,) = found.status.links
    assert [(start.restart, start.elapsed_s) for start in found.starts] == [(0, 240)]
    assert (link.pending, link.elapsed_s, utc(link.expected_start_s)) == (
        True,
        240,
        utc(ZERO + 5400),
    )
    assert found.spent.still.time_s == 3600 and found.spent.used.time_s == 240


def test_a_job_that_was_cancelled_before_it_began_never_started(run_of):
    gone = slurm_job(state="CANCELLED", elapsed_s=0, reason="by 1000", nodes=())
    ledger = [{"event": "submitted", "link": 1, "job_id": "7", "kind": "link"}]
    found = told(run_of(ledger=ledger), Answer({"7": gone}, {}))
    assert found.starts == [] and found.spent.used.time_s == 0
    assert [(link.state, link.start_s, link.elapsed_s) for link in found.status.links] == [
        ("CANCELLED", None, None)
    ]


def test_a_start_without_an_end_lasted_until_its_log_was_last_written(run_of):
    run = run_of(
        record("begin", 0), logs={"r-7.out": ("hpctrain: job 7, restart 0, 1 nodes: n1\n", 30)}
    )
    found = told(run)
    (start,) = found.starts
    assert (start.elapsed_s, start.source, start.state) == (1800, "log", "began, no end recorded")
    assert found.status.links[0].elapsed_s == 1800
    # A log that is older than the start says nothing of it.
    old = run_of(record("begin", 0), logs={"r-7.out": ("x\n", -5)})
    assert [start.elapsed_s for start in told(old).starts] == [None]


def test_a_running_job_has_run_until_now(run_of):
    job = slurm_job(state="RUNNING", start=0, source="squeue", elapsed_s=17)
    found = told(run_of(record("begin", 0)), Answer({"7": job}, {}), minute=10)
    assert [start.elapsed_s for start in found.starts] == [600]
    assert found.status.links[0].elapsed_s == 600 and found.spent.still.time_s == 3000


def test_the_iterations_of_a_finetune_count_from_zero_unless_the_counter_is_the_folders(run_of):
    begins = (
        record("begin", 0, mode="finetune", iteration=423858),
        record("begin", 5, restart=1, mode="resume", iteration=100),
    )
    run = run_of(*begins)
    assert [start.iteration_from for start in jobs_of(run)[0].starts] == [0, 100]
    assert told(run).status.links[0].iteration_from == 0
    run.plan["guard"]["counter"] = "greatest_folder"
    assert [start.iteration_from for start in jobs_of(run)[0].starts] == [423858, 100]


def test_every_job_comes_once_in_the_order_of_links_with_what_queued_it(run_of):
    ledger = [
        {"event": "submitted", "link": 2, "job_id": "8", "kind": "link"},
        {"event": "submitted", "link": 1, "job_id": "9", "kind": "link"},
        {"event": "submitted", "link": 1, "job_id": "11", "kind": "side"},
        {"event": "cancelled", "link": 2, "job_id": "8"},
    ]
    run = run_of(record("begin", 0, job="9"), ledger=ledger, logs={"r-12.out": ("x\n", 1)})
    jobs = jobs_of(run)
    assert [(job.job_id, job.link, job.submitted, job.cancelled) for job in jobs] == [
        ("9", 1, True, False),
        ("11", 1, True, False),
        ("8", 2, True, True),
        ("12", None, False, False),
    ]
    assert [len(job.starts) for job in jobs] == [1, 0, 0, 0]


def test_triage_and_bad_nodes_read_the_same_starts(run_of):
    log = "hpctrain: job {0}, restart {1}, 3 nodes: n[1-3]\nsrun: error: n2: task 5: Killed\n"
    begins = [
        record("begin", 0, nodes="n[1-3]"),
        record("begin", 5, restart=1, nodes="n[1-3]", link=1),
        record("begin", 20, job="8", link=2, nodes="n[1-3]"),
        record("end", 30, job="8", link=2, exit_code=0),
    ]
    logs = {"r-7.out": (log.format(7, 0) + log.format(7, 1), 6), "r-8.out": (log.format(8, 0), 30)}
    run = run_of(*begins, logs=logs)
    assert bad_nodes.find(run) == [bad_nodes.BadNode("n2", ("7", "7.1"))]

    failed = slurm_job(state="NODE_FAIL", start=0, end=4)
    again = slurm_job(state="FAILED", start=5, end=9, exit_code=9, signal=9)
    subject = Subject(list(run.logs), Thresholds(), run, Answer({"7": again}, {"7": [failed]}))
    subject.diagnose()
    attempts = {(one.job_id, one.restart): one for one in subject.engine.attempts}
    assert attempts["7", 0].slurm_state == "NODE_FAIL"
    assert (attempts["7", 1].slurm_state, attempts["7", 1].slurm_signal) == ("FAILED", 9)
    assert (attempts["8", 0].slurm_state, attempts["8", 0].exit_code, attempts["8", 0].link) == (
        None,
        0,
        2,
    )


MINUTES = st.integers(0, 200)
RECORDS = st.builds(
    record,
    st.sampled_from(["begin", "end", "preflight"]),
    MINUTES,
    restart=st.sampled_from([0, 1, 2, None]),
    job=st.sampled_from(["7", "8"]),
    link=st.sampled_from([1, 2, None]),
    mode=st.sampled_from(["scratch", "finetune", "resume", "done", "gave_up", None]),
    exit_code=st.sampled_from([None, 0, 1, 137]),
    iteration=st.sampled_from([None, 0, 100]),
)
JOBS = st.builds(
    slurm_job,
    st.sampled_from(["7", "8"]),
    st.sampled_from(["RUNNING", "PENDING", "COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED"]),
    start=st.none() | MINUTES,
    end=st.none() | MINUTES,
    source=st.sampled_from(["sacct", "squeue"]),
)


@given(st.lists(RECORDS, max_size=8), st.lists(JOBS, max_size=5))
def test_whatever_is_on_record_status_and_cost_agree_and_no_start_comes_twice(
    tmp_path_factory, links, slurm_jobs
):
    folder = tmp_path_factory.mktemp("run")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "links.jsonl").write_text("".join(json.dumps(one) + "\n" for one in links))
    newest, earlier = {}, {}
    for job in slurm_jobs:
        if job.job_id in newest:
            earlier.setdefault(job.job_id, []).append(newest[job.job_id])
        newest[job.job_id] = job
    found = told(read_run(str(folder)), Answer(newest, earlier), minute=300)

    keys = [(start.job_id, start.restart) for start in found.starts]
    assert len(keys) == len(set(keys))
    assert all(start.elapsed_s is None or start.elapsed_s >= 0 for start in found.starts)
    by_status = sum(link.elapsed_s or 0 for link in found.status.links)
    assert by_status == pytest.approx(found.spent.used.time_s)
    assert [start for link in found.status.links for start in link.starts] == found.starts
    begun = {(one["job_id"], one["restart"] or 0) for one in links if one["event"] == "begin"}
    assert begun <= set(keys)
    json.dumps(found.status.as_json(), allow_nan=False)
