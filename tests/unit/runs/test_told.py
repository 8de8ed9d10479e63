"""Someone who did not run the job can say what happened: recorded runs of the fault campaign, and
folders hurt here."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.base.errors import EnvironmentFault
from hpctrain.runs import daemons
from hpctrain.runs.diagnose import Subject
from hpctrain.runs.logs import sections
from hpctrain.runs.records import read_run
from hpctrain.runs.report.gather import gather
from hpctrain.runs.starts import Start
from hpctrain.runs.status import observe
from hpctrain.slurm.jobs import Answer
from hpctrain.triage.thresholds import Thresholds

DATA = Path(__file__).parents[2] / "data" / "told"
RUNTIME = Path(__file__).parents[3] / "hpctrain" / "runtime" / "__main__.py"
sys.path.insert(0, str(Path(__file__).parents[2] / "standin"))

import checkpoints  # noqa: E402

NO_SLURM = Answer({}, {}, ("Slurm was not asked",))


def triage(run_dir):
    run = read_run(str(run_dir))
    return Subject(list(run.logs), Thresholds(), run, NO_SLURM).diagnose()


@pytest.mark.parametrize(
    ("name", "verdict", "incidents", "why"),
    [
        # A person cancelled link 1, link 2 met its limit, one rank of link 3 was killed in a save,
        # link 4's node failed and it went on.
        (
            "cancelled-limit-killed-node",
            "GREEN",
            [("cancelled", 1, 0), ("time_limit", 2, 0), ("killed", 3, 0), ("node", 4, 0)],
            {1: "cancelled by a person", 2: "time limit", 3: "killed from outside on nid000001"},
        ),
        # The node lost power, then was set down, then the disk was full.
        (
            "gone-node-disk",
            "RED",
            [("node", 1, 0), ("node", 1, 1), ("disk", 1, 2)],
            {1: "disk, quota"},
        ),
        # The job script of link 1 was killed; the node of link 2 failed, and it was started twice
        # more: once it could not say a word.
        (
            "script-killed-node",
            "GREEN",
            [("script_killed", 1, 0), ("node", 2, 0)],
            {
                1: "the job script itself was killed",
                2: "before restart 2: node failure on nid000005",
            },
        ),
        ("requeued", "GREEN", [("preemption", 1, 0)], {}),
        ("gone", "GREEN", [("node", 1, 0)], {}),
    ],
)
def test_a_recorded_run_is_told_from_its_directory_alone(name, verdict, incidents, why):
    diagnosis = triage(DATA / name)
    told = [(i.event.failure, i.attempt.link, i.attempt.restart) for i in diagnosis.incidents]
    assert told == incidents
    assert diagnosis.verdict == verdict
    status = observe([str(DATA / name)], ask_slurm=False)[0]
    for link, words in why.items():
        assert words in next(found.reason for found in status.links if found.link == link)
    assert (status.state == "done") == (verdict == "GREEN")
    rows = [
        (row.link, row.restart, row.cause)
        for row in gather(str(DATA / name), ask_slurm=False).rows
        if row.cause
    ]
    assert rows == [(link, restart, failure) for failure, link, restart in incidents]


def test_a_start_that_left_no_word_is_said():
    assert any(
        "job 12936: restart 1 left no word" in remark
        for remark in triage(DATA / "script-killed-node").remarks
    )


@pytest.mark.parametrize(
    "line", [b"JOB 9208 ON nid000001 CANCELLED AT 2026-11-21T10:17:12 ***\n", b""]
)
def test_what_slurm_started_again_was_neither_cancelled_nor_just_cut_off(tmp_path, line):
    shutil.copytree(DATA / "requeued", tmp_path / "r")
    log = next((tmp_path / "r" / "logs").iterdir())
    text = log.read_bytes()
    second = text.index(b"hpctrain: job 9208, restart 1")
    kept = [
        part
        for part in text[:second].splitlines(True)
        if b"REQUEUE" not in part and b"rc=" not in part and b"exit code" not in part
    ]
    log.write_bytes(
        b"".join(kept)
        + (b"slurmstepd-nid000001: error: *** " + line if line else b"")
        + text[second:]
    )
    records = [
        part
        for part in (tmp_path / "r" / "links.jsonl").read_text().splitlines(True)
        if not ('"event": "end"' in part and '"restart": 0' in part)
    ]
    (tmp_path / "r" / "links.jsonl").write_text("".join(records))
    wanted = "preemption" if line else "node"
    assert [(i.event.failure, i.attempt.restart) for i in triage(tmp_path / "r").incidents] == [
        (wanted, 0)
    ]


def test_a_job_that_was_submitted_by_hand_is_told(tmp_path):
    shutil.copytree(DATA / "gone", tmp_path / "r")
    (tmp_path / "r" / "logs" / "ft-9999.out").write_text(
        "hpctrain: job 9999, restart 0, 1 nodes: n2\nhpctrain: link 9: nothing to do, the run is"
        " done (`global_step9` is complete)\n"
    )
    words = "job 9999 is none that `hpctrain chain` queued: job.sbatch was submitted by hand"
    assert words in triage(tmp_path / "r").remarks
    assert words in observe([str(tmp_path / "r")], ask_slurm=False)[0].notes
    (tmp_path / "r" / "ledger.jsonl").unlink()  # then nothing tells what was queued
    assert words not in triage(tmp_path / "r").remarks


def test_a_link_that_was_cut_off_in_its_last_save_is_told(tmp_path):
    """All iterations are in the log, but the job script never came to its end."""
    shutil.copytree(DATA / "gone", tmp_path / "r")
    log = tmp_path / "r" / "logs" / "ft-9200.out"
    text = log.read_text()
    text = text[: text.rindex("iteration 9/ 9")] + "iteration 9/ 9 | lm_loss: 1.1111 |\n"
    log.write_text(
        text
        + "slurmstepd-n1: error: *** JOB 9200 ON n1 CANCELLED AT 2026-11-21T10:17:12 DUE TO TIME"
        " LIMIT ***\n"
    )
    records = (tmp_path / "r" / "links.jsonl").read_text().splitlines(True)
    (tmp_path / "r" / "links.jsonl").write_text(
        "".join(line for line in records if '"event": "end"' not in line)
    )
    assert triage(tmp_path / "r").incidents[-1].event.failure == "time_limit"


CONFIG = (
    "Configuration data as of 2026-11-21T10:20:00\nBOOT_TIME               ="
    " 2026-11-21T10:02:00\nSlurmctldPort = 6817\n"
)
NODES = (
    "NodeName=n1 Arch=x86_64 State=IDLE BootTime=2026-11-20T00:00:00"
    " SlurmdStartTime=2026-11-21T10:01:30 LastBusyTime=2026-11-21T10:09:00\nNodeName=n2 State=DOWN*"
    " BootTime=2026-11-20T00:00:00 SlurmdStartTime=2026-11-20T00:01:00 Reason=Not responding"
    " [slurm@2026-11-21T10:05:00]\nNodeName=n3 State=MIXED BootTime=2026-11-21T10:03:00"
    " SlurmdStartTime=2026-11-21T10:03:30\njunk without a name \0\n"
)


def test_what_slurm_and_the_nodes_went_through_is_told_of_the_starts_it_touched():
    ten = 1795255200.0  # 2026-11-21T10:00:00Z

    def start(link, job_id, begin_s, end_s, *nodes):
        return Start(
            link, job_id, "RUNNING", source="squeue", start_s=begin_s, end_s=end_s, nodes=nodes
        )

    starts = [start(1, "5", ten, ten + 115, "n1", "n3"), start(2, "6", ten + 160, None, "n2", "n3")]
    found = daemons.read_happenings(CONFIG, NODES)
    assert daemons.remarks(found, starts, ten + 1200) == [
        (
            "2026-11-21T10:02:00Z, right after link 1 (job 5) ran: Slurm's controller (slurmctld)"
            " was started again; jobs run on without it"
        ),
        (
            "2026-11-21T10:01:30Z, while link 1 (job 5) ran: the slurmd of n1 was started again;"
            " jobs run on without it"
        ),
        "n2 is DOWN* now: Not responding",
        "2026-11-21T10:03:00Z, while link 2 (job 6) ran: n3 booted",
    ]
    late = [start(1, "5", ten + 600, ten + 700, "n1")]
    assert daemons.remarks(found, late, ten + 1200) == ["n2 is DOWN* now: Not responding"]
    assert (
        daemons.read_happenings("", "")
        == daemons.read_happenings("BOOT_TIME = n/a", "NodeName=x State=IDLE\0")
        == []
    )


def latest(folder, text):
    (folder / "latest").write_bytes(text)


HURTS = {
    "latest_empty": (lambda ck: latest(ck, b""), "`latest` is empty"),
    "latest_gone": (lambda ck: os.unlink(ck / "latest"), "`latest` is missing"),
    "latest_garbage": (lambda ck: latest(ck, b"\0\xffglobal_step"), "names no checkpoint"),
    "shard_cut": (
        lambda ck: os.truncate(ck / "global_step6" / "mp_rank_00_model_states.pt", 90),
        "`global_step6`, which is not complete",
    ),
    "shard_gone": (
        lambda ck: os.unlink(ck / "global_step6" / "mp_rank_01_model_states.pt"),
        "`global_step6`, which is not complete",
    ),
    "folder_gone": (
        lambda ck: os.rename(ck / "global_step6", ck.parent / "away"),
        "`latest` names `global_step6`, which is not there",
    ),
}


@pytest.mark.parametrize("how", HURTS)
def test_a_hurt_checkpoint_folder_is_told_by_triage_and_status(tmp_path, how):
    """By the real guard, as the next link runs it, on a folder that was hurt after its last
    save."""
    hurt, words = HURTS[how]
    run, ck = tmp_path / "ft", tmp_path / "ck"
    (run / "logs").mkdir(parents=True)
    plan = json.loads((DATA / "gone" / "plan.json").read_text())
    plan["guard"].update(checkpoint_dir=str(ck), start=None)
    (run / "plan.json").write_text(json.dumps(plan))
    for step in (3, 6):
        checkpoints.save(str(ck), step, 2, 1)
    hurt(ck)
    environ = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "8", "SLURM_JOB_NODELIST": "n1"}
    begun = subprocess.run(
        [sys.executable, "-B", str(RUNTIME), "begin", "--run-dir", str(run)],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert begun.returncode == 0, begun.stderr
    log = "hpctrain: job 8, restart 0, 1 nodes: n1\n" + begun.stderr
    (run / "logs" / "ft-8.out").write_text(
        log
        + "hpctrain: starting: resume, link 1, 2 tasks, rendezvous n1:1\niteration 7/ 9 | lm_loss:"
        " 1.0 |\n"
    )
    remarks = triage(run).remarks
    assert any(words in remark and "before link 1 (job 8)" in remark for remark in remarks), remarks
    assert words in observe([str(run)], ask_slurm=False)[0].links[0].reason


def test_a_job_kept_out_by_anothers_lock_does_not_make_the_run_red(tmp_path):
    for name in ("plan.json", "links.jsonl", "ledger.jsonl"):
        (tmp_path / name).write_bytes((DATA / "requeued" / name).read_bytes())
    (tmp_path / "logs").mkdir()
    for path in (DATA / "requeued" / "logs").iterdir():
        (tmp_path / "logs" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "logs" / "ft-9999.out").write_text(
        "hpctrain: job 9999, restart 0, 1 nodes: n2\nhpctrain: error: job 9208 of run `ft` is"
        " running and works in `/ck`: two at once would corrupt its checkpoints; if you are sure"
        " that it has ended, remove `/ck/.lock`\n"
    )
    diagnosis = triage(tmp_path)
    assert diagnosis.verdict == "GREEN"
    assert ("refused", "9999") in [(i.event.failure, i.attempt.job_id) for i in diagnosis.incidents]


def test_whatever_is_torn_or_replaced_by_junk_status_triage_logs_and_report_still_answer(tmp_path):
    """Every file of a run cut at a random place, then full of bytes, then a folder, then gone; what
    could not be seen is said."""
    rnd = random.Random(7)
    source = DATA / "cancelled-limit-killed-node"
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    for number, name in enumerate(names):
        for how in ("cut", "junk", "folder", "gone"):
            run = tmp_path / f"{number}-{how}"
            shutil.copytree(source, run)
            hurt, whole = run / name, (run / name).read_bytes()
            hurt.unlink()
            if how == "cut":
                hurt.write_bytes(whole[: rnd.randrange(len(whole))])
            elif how == "junk":
                hurt.write_bytes(
                    whole[:200] + rnd.randbytes(3000) + b"\r\x1b[31m\0\n" + whole[200:]
                )
            elif how == "folder":
                hurt.mkdir()
            status = observe([str(run)], ask_slurm=False)[0]
            assert status.state
            report = gather(str(run), ask_slurm=False)
            assert report.diagnosis.verdict in ("GREEN", "RED", "NOT OBSERVED")
            assert [section.lines for section in sections(read_run(str(run)), 10)]
            if how in ("folder", "gone") and not name.startswith("logs"):
                assert any(name in what or Path(name).name in what for what in report.unseen), (
                    name,
                    how,
                    report.unseen,
                )


def test_a_log_that_cannot_be_read_is_said_and_the_others_are_judged(tmp_path):
    run = read_run(str(DATA / "requeued"))
    subject = Subject([str(tmp_path / "gone.out"), *run.logs], Thresholds(), run, NO_SLURM)
    assert subject.diagnose().verdict == "GREEN"
    assert subject.unseen[-1] == f"{tmp_path / 'gone.out'}: No such file or directory"
    with pytest.raises(EnvironmentFault):
        Subject([str(tmp_path / "gone.out")], Thresholds()).diagnose()


def everything_of(run_dir):
    """What status, triage and report together say of a run directory, and what they could not
    see."""
    status = observe([str(run_dir)], ask_slurm=False)[0]
    json.dumps(status.as_json())
    assert status.state
    assert triage(run_dir).verdict == "GREEN"
    report = gather(str(run_dir), ask_slurm=False)
    assert report.diagnosis.verdict == "GREEN"
    assert set(status.unseen) <= set(report.unseen)
    return status, " ".join(status.unseen)


@pytest.fixture
def whole(tmp_path):
    shutil.copytree(DATA / "requeued", tmp_path / "requeued")
    return tmp_path / "requeued"


def test_a_plan_of_a_newer_version_is_read_as_far_as_it_is_known(whole):
    plan = json.loads((whole / "plan.json").read_text(encoding="utf-8"))
    plan.update(schema_version=7, job="of another kind", guard=[1], shape={"new": True})
    (whole / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert (
        "plan.json has schema_version 7, and 1 is known here: a newer hpctrain wrote it"
        in everything_of(whole)[1]
    )


def test_a_torn_last_record_is_left_out_and_said(whole):
    before = everything_of(whole)[0].links
    for name in ("links.jsonl", "ledger.jsonl"):
        with (whole / name).open("ab") as file:
            file.write(b'{"event": "end", "link": 1, "job_i')
    status, unseen = everything_of(whole)
    assert (
        "links.jsonl: 1 torn or foreign line, left out" in unseen
        and "ledger.jsonl: 1 torn" in unseen
    )
    assert status.links == before


def test_records_of_other_types_are_no_reason_to_fail(whole):
    strange = {
        "event": "begin",
        "link": "one",
        "job_id": 77,
        "restart": "zero",
        "mode": 7,
        "checkpoint": 3,
        "iteration": float("nan"),
        "exit_code": "x",
        "nodes": [1],
        "reason": {},
        "time": 5,
    }
    with (whole / "links.jsonl").open("a", encoding="utf-8") as file:
        for name in strange:
            file.write(
                json.dumps({"event": "end", "link": 1, "job_id": "77", name: strange[name]}) + "\n"
            )
        file.write(json.dumps(strange) + "\n")
    plan = json.loads((whole / "plan.json").read_text(encoding="utf-8"))
    plan.update(run=5, recipe={}, cost={"gpu_hours": float("nan")})
    (whole / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    everything_of(whole)


def test_a_run_directory_that_was_moved_says_where_its_jobs_work_and_one_behind_a_link_does_not(
    whole, tmp_path
):
    script = whole / "job.sbatch"
    script.write_text(
        f"#!/bin/bash\nexport HPCTRAIN_RUN_DIR='{tmp_path}/it'\"'\"'s $(touch canary)'\n",
        encoding="utf-8",
    )
    assert (
        f"was moved or copied: its job.sbatch works in {tmp_path}/it's $(touch canary)"
        in everything_of(whole)[1]
    )
    script.write_text(f"#!/bin/bash\nexport HPCTRAIN_RUN_DIR='{whole}'\n", encoding="utf-8")
    (tmp_path / "linked").symlink_to(whole)
    assert "moved" not in everything_of(tmp_path / "linked")[1]


def test_jobs_that_slurm_has_forgotten_are_named():
    answer = Answer({}, {}, (), complete=True)
    assert answer.forgotten(["1", "2", "3"], {"2"}) == [
        "Slurm knows nothing (any more) of jobs 1, 3: how they ended is not seen"
    ]
    assert answer.forgotten(["2"], {"2"}) == []
    assert "and 195 more" in answer.forgotten([str(i) for i in range(200)])[0]
    assert Answer({}, {}, ("sacct: there is no `sacct` here",)).forgotten(["1"]) == []
