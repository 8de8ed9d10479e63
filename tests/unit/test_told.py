"""Someone who did not run the job can say what happened: recorded runs of the fault campaign, and folders hurt here."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain import observe
from hpctrain.errors import EnvironmentFault
from hpctrain.logs import sections
from hpctrain.report.gather import gather
from hpctrain.runs import read_run
from hpctrain.slurmstate import Answer
from hpctrain.triage.target import Subject
from hpctrain.triage.thresholds import Thresholds

DATA = Path(__file__).parents[1] / "data" / "told"
RUNTIME = Path(__file__).parents[2] / "hpctrain" / "runtime" / "__main__.py"
sys.path.insert(0, str(Path(__file__).parents[1] / "standin"))

import checkpoints  # noqa: E402

NO_SLURM = Answer({}, {}, ("Slurm was not asked",))


def triage(run_dir):
    run = read_run(str(run_dir))
    return Subject(list(run.logs), Thresholds(), run, NO_SLURM).diagnose()


@pytest.mark.parametrize(
    ("name", "verdict", "incidents", "why"),
    [
        # A person cancelled link 1, link 2 met its limit, one rank of link 3 was killed in a save, link 4's node failed and it went on.
        ("cancelled-limit-killed-node", "GREEN",
         [("cancelled", 1, 0), ("time_limit", 2, 0), ("killed", 3, 0), ("node", 4, 0)],
         {1: "cancelled by a person", 2: "time limit", 3: "killed from outside on nid000001"}),
        # The node lost power, then was set down, then the disk was full.
        ("gone-node-disk", "RED", [("cut_off", 1, 0), ("node", 1, 1), ("disk", 1, 2)], {1: "disk, quota"}),
        ("requeued", "GREEN", [("preemption", 1, 0)], {}),
        ("gone", "GREEN", [("cut_off", 1, 0)], {}),
    ],
)  # fmt: skip
def test_a_recorded_run_is_told_from_its_directory_alone(name, verdict, incidents, why):
    diagnosis = triage(DATA / name)
    told = [(i.event.failure, i.attempt.link, i.attempt.restart) for i in diagnosis.incidents]
    assert told == incidents
    assert diagnosis.verdict == verdict
    status = observe.observe([str(DATA / name)], ask_slurm=False)[0]
    for link, words in why.items():
        assert words in next(found.reason for found in status.links if found.link == link)
    assert (status.state == "done") == (verdict == "GREEN")
    rows = [(row.link, row.restart, row.cause) for row in gather(str(DATA / name), ask_slurm=False).rows if row.cause]
    assert rows == [(link, restart, failure) for failure, link, restart in incidents]


def latest(folder, text):
    (folder / "latest").write_bytes(text)


HURTS = {
    "latest_empty": (lambda ck: latest(ck, b""), "`latest` is empty"),
    "latest_gone": (lambda ck: os.unlink(ck / "latest"), "`latest` is missing"),
    "latest_garbage": (lambda ck: latest(ck, b"\0\xffglobal_step"), "names no checkpoint"),
    "shard_cut": (lambda ck: os.truncate(ck / "global_step6" / "mp_rank_00_model_states.pt", 90), "`global_step6` is not complete"),
    "shard_gone": (lambda ck: os.unlink(ck / "global_step6" / "mp_rank_01_model_states.pt"), "`global_step6` is not complete"),
    "folder_gone": (lambda ck: os.rename(ck / "global_step6", ck.parent / "away"), "`latest` names `global_step6`, which is not there"),
}  # fmt: skip


@pytest.mark.parametrize("how", HURTS)
def test_a_hurt_checkpoint_folder_is_told_by_triage_and_status(tmp_path, how):
    """By the real guard, as the next link runs it, on a folder that was hurt after its last save."""
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
    begun = subprocess.run([sys.executable, "-B", str(RUNTIME), "begin", "--run-dir", str(run)], env=environ, capture_output=True, text=True)  # fmt: skip
    assert begun.returncode == 0, begun.stderr
    log = "hpctrain: job 8, restart 0, 1 nodes: n1\n" + begun.stderr
    (run / "logs" / "ft-8.out").write_text(
        log + "hpctrain: starting: resume, link 1, 2 tasks, rendezvous n1:1\niteration 7/ 9 | lm_loss: 1.0 |\n"
    )
    remarks = triage(run).remarks
    assert any(words in remark and "before link 1 (job 8)" in remark for remark in remarks), remarks
    assert words in observe.observe([str(run)], ask_slurm=False)[0].links[0].reason


def test_a_job_kept_out_by_anothers_lock_does_not_make_the_run_red(tmp_path):
    for name in ("plan.json", "links.jsonl", "ledger.jsonl"):
        (tmp_path / name).write_bytes((DATA / "requeued" / name).read_bytes())
    (tmp_path / "logs").mkdir()
    for path in (DATA / "requeued" / "logs").iterdir():
        (tmp_path / "logs" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "logs" / "ft-9999.out").write_text(
        "hpctrain: job 9999, restart 0, 1 nodes: n2\nhpctrain: error: job 9208 of run `ft` is running and works in `/ck`: two at once would"
        " corrupt its checkpoints; if you are sure that it has ended, remove `/ck/.lock`\n"
    )
    diagnosis = triage(tmp_path)
    assert diagnosis.verdict == "GREEN"
    assert ("refused", "9999") in [(i.event.failure, i.attempt.job_id) for i in diagnosis.incidents]


def test_whatever_is_torn_or_replaced_by_junk_status_triage_logs_and_report_still_answer(tmp_path):
    """Every file of a run cut at a random place, then full of bytes, then a folder, then gone; what could not be seen is said."""
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
                hurt.write_bytes(whole[:200] + rnd.randbytes(3000) + b"\r\x1b[31m\0\n" + whole[200:])
            elif how == "folder":
                hurt.mkdir()
            status = observe.observe([str(run)], ask_slurm=False)[0]
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
