"""One type of job and one reading of squeue and sacct, whoever asks."""

from __future__ import annotations

import os

import pytest

from hpctrain.base.errors import EnvironmentFault
from hpctrain.slurm import jobs
from hpctrain.slurm.commands import NoAnswer
from hpctrain.slurm.jobs import Job, parse_sacct, parse_squeue

S = "\x1f"
TEN = 1795255200.0  # 2026-11-21T10:00:00Z


def squeue_line(**changes):
    fields = {
        "id": "77",
        "state": "RUNNING",
        "reason": "None",
        "start": "2026-11-21T10:00:00",
        "submit": "2026-11-21T09:00:00",
        "nodes": "n[1-2]",
        "num_nodes": "2",
        "end": "2026-11-21T12:00:00",
        "work_dir": "/a dir/x",
        "name": "ft",
        "comment": "(null)",
        "command": "/a dir/x/job.sbatch 2",
    }
    return S.join({**fields, **changes}.values()) + "\n"


def sacct_line(**changes):
    fields = {
        "raw": "77",
        "id": "77",
        "state": "COMPLETED",
        "code": "0:0",
        "submit": "2026-11-21T09:00:00",
        "start": "2026-11-21T10:00:00",
        "end": "2026-11-21T10:01:00",
        "elapsed": "60",
        "nodes": "n1",
        "num_nodes": "1",
        "work_dir": "/x",
        "name": "ft",
        "comment": "",
    }
    return S.join({**fields, **changes}.values()) + "\n"


def test_every_field_of_squeue_has_its_place():
    (job,) = parse_squeue(squeue_line(comment="hpctrain:u:1:link:ab", reason="Priority"))
    assert job == Job(
        "77",
        "RUNNING",
        "squeue",
        reason="Priority",
        submit_s=TEN - 3600,
        start_s=TEN,
        end_s=TEN + 7200,
        nodes=("n1", "n2"),
        num_nodes=2,
        work_dir="/a dir/x",
        name="ft",
        comment="hpctrain:u:1:link:ab",
        command="/a dir/x/job.sbatch 2",
    )


def test_what_squeue_does_not_know_is_empty():
    empty = {"reason": "None", "start": "N/A", "nodes": "", "num_nodes": "", "end": "Unknown"}
    (job,) = parse_squeue(squeue_line(**empty))
    assert (job.reason, job.start_s, job.end_s, job.nodes, job.num_nodes, job.comment) == (
        "",
        None,
        None,
        (),
        None,
        "",
    )


@pytest.mark.parametrize(
    "line", ["", "slurm_load_jobs error\n", squeue_line(id="x"), squeue_line() + S + "more"]
)
def test_lines_of_another_form_are_left_out(line):
    assert [job.job_id for job in parse_squeue(line)] == (["77"] if "more" in line else [])


def test_every_field_of_sacct_has_its_place():
    changes = {"state": "CANCELLED by 1000", "code": "1:15", "comment": "tag"}
    assert parse_sacct(sacct_line(**changes)) == {
        "77": [
            Job(
                "77",
                "CANCELLED",
                "sacct",
                reason="by 1000",
                exit_code=1,
                signal=15,
                submit_s=TEN - 3600,
                start_s=TEN,
                end_s=TEN + 60,
                elapsed_s=60,
                nodes=("n1",),
                num_nodes=1,
                work_dir="/x",
                name="ft",
                comment="tag",
            )
        ]
    }


def test_the_starts_of_a_requeued_job_come_oldest_first():
    later = sacct_line(submit="2026-11-21T11:00:00", start="2026-11-21T11:30:00", state="FAILED")
    waiting = sacct_line(submit="2026-11-21T11:00:00", start="Unknown", state="PENDING")
    first = sacct_line(state="NODE_FAIL")
    records = parse_sacct(waiting + later + first)["77"]
    assert [record.state for record in records] == ["NODE_FAIL", "FAILED", "PENDING"]


@pytest.mark.parametrize(
    ("state", "pending", "running"),
    [
        ("PENDING", True, False),
        ("REQUEUE_HOLD", True, False),
        ("CONFIGURING", True, False),
        ("RUNNING", False, True),
        ("COMPLETING", False, True),
        ("SUSPENDED", False, True),
        ("COMPLETED", False, False),
        ("TIMEOUT", False, False),
        ("NODE_FAIL", False, False),
        ("", False, False),
    ],
)
def test_a_job_waits_runs_or_is_over(state, pending, running):
    job = Job("1", state)
    assert (job.pending, job.running, job.live) == (pending, running, pending or running)


def test_this_users_jobs_are_asked_once_in_utc(fake):
    fake.says("squeue", squeue_line() + squeue_line(id="78", state="PENDING"))
    assert [job.job_id for job in jobs.of_user()] == ["77", "78"]
    assert [job.job_id for job in jobs.of_user(["78", "79"])] == ["78"]
    asked = fake.asked[0]
    assert asked["zone"] == "UTC0"
    assert {"--noheader", "--states=all", f"--user={os.getuid()}"} <= set(asked["argv"])
    # an unknown id would fail all
    assert not any(word.startswith("--jobs") for word in asked["argv"])


def test_waiting_and_running_jobs_by_name(fake):
    fake.says("squeue", squeue_line(id="5_1") + squeue_line(id="5_2", state="PENDING"))
    assert [job.job_id for job in jobs.queued("--name=tok")] == ["5_1", "5_2"]
    asked = fake.asked[0]["argv"]
    assert "--array" in asked and "--name=tok" in asked and "--states=all" not in asked


def test_an_answer_that_did_not_come_is_an_error(fake):
    with pytest.raises(EnvironmentFault, match="there is no `squeue` here"):
        jobs.of_user()
    fake.says("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
    for call in (jobs.of_user, jobs.queued):
        with pytest.raises(NoAnswer, match="Unable to contact"):
            call()
    fake.says("squeue", "", "squeue: error: Invalid user\n", 1)
    with pytest.raises(EnvironmentFault, match="squeue failed: squeue: error: Invalid user"):
        jobs.of_user()


def test_a_job_is_found_by_its_tag_in_accounting(fake):
    assert jobs.ended_by_comment("tag") == []  # no sacct here
    lines = [
        sacct_line(id="5", comment="tag"),
        sacct_line(id="6", comment="tags"),
        sacct_line(id="7_1", comment="tag"),
    ]
    fake.says("sacct", "".join(lines))
    assert jobs.ended_by_comment("tag") == ["5"]
    assert f"--user={os.getuid()}" in fake.asked[0]["argv"]
    fake.says("sacct", "", "accounting storage is disabled\n", 1)
    assert jobs.ended_by_comment("tag") == []
    fake.says("sacct", "", "sacct: error: Problem talking to the database: Connection refused\n", 1)
    with pytest.raises(NoAnswer):  # the job may be there
        jobs.ended_by_comment("tag")


def test_the_expected_start_of_a_job_that_was_put_back_or_held_is_not_the_one_it_had(fake):
    waiting = {"state": "PENDING", "submit": "2026-11-20T20:00:00"}
    cases = [
        ({"reason": "Priority", "start": "2026-11-21T02:00:00"}, True),
        ({"reason": "BeginTime", "start": "2026-11-20T19:00:00"}, False),
        ({"reason": "JobHeldUser", "start": "2026-11-21T02:00:00"}, False),
        ({"reason": "Priority", "start": "N/A"}, False),
    ]
    for fields, expected in cases:
        fake.says("squeue", squeue_line(id="7", **waiting, **fields))
        (job,) = jobs.of_user()
        assert (job.expected_start_s is not None) == expected, fields
        assert bool(job.stuck[1]) == (fields["reason"] == "JobHeldUser")
    fake.says("squeue", squeue_line(id="7", state="RUNNING", reason="JobHeldUser"))
    assert jobs.of_user()[0].stuck == ("", "")


def test_squeue_and_sacct_are_put_together(fake):
    fake.says(
        "squeue",
        squeue_line(id="1") + squeue_line(id="2", state="FAILED", reason="NonZeroExitCode"),
    )
    fake.says(
        "sacct",
        sacct_line(id="1", state="NODE_FAIL", submit="2026-11-21T08:00:00")
        + sacct_line(id="1", state="RUNNING", end="Unknown", elapsed="30")
        + sacct_line(id="2", state="FAILED", code="3:0", nodes="")
        + sacct_line(id="3"),
    )
    answer = jobs.query(["1", "2", "3", "4"])
    running, failed, gone = (answer.jobs[job_id] for job_id in "123")
    assert (running.source, running.state, running.elapsed_s) == ("squeue", "RUNNING", 30)
    assert (failed.source, failed.exit_code, failed.reason) == (
        "squeue+sacct",
        3,
        "NonZeroExitCode",
    )
    assert failed.nodes == ("n1", "n2")  # squeue's, where accounting has none
    assert (gone.source, gone.state) == ("sacct", "COMPLETED")
    assert [job.state for job in answer.earlier["1"]] == ["NODE_FAIL"]
    assert answer.complete and answer.unseen == ()
    assert answer.forgotten(["3", "4"]) == [
        "Slurm knows nothing (any more) of job 4: how they ended is not seen"
    ]


def test_the_time_of_an_earlier_start_is_not_the_present_ones(fake):
    fake.says("squeue", squeue_line(id="1", start="2026-11-21T11:00:00"))
    fake.says("sacct", sacct_line(id="1", state="RUNNING", elapsed="30"))
    assert jobs.query(["1"]).jobs["1"].elapsed_s is None
    fake.says("squeue", squeue_line(id="1", state="PENDING"))
    assert jobs.query(["1"]).jobs["1"].elapsed_s is None


def test_what_does_not_answer_is_told_and_the_other_still_asked(fake):
    fake.says("sacct", sacct_line(id="1"))
    answer = jobs.query(["1"])
    assert answer.unseen == ("squeue: there is no `squeue` here",) and not answer.complete
    assert answer.jobs["1"].state == "COMPLETED" and answer.forgotten(["9"]) == []
    assert jobs.query([]).jobs == {} and len(fake.asked) == 1


def test_the_working_directory_of_a_job(fake):
    fake.says("squeue", squeue_line())
    assert jobs.work_dir_of("77") == "/a dir/x"
    assert jobs.work_dir_of("78") is None
