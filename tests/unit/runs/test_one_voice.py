"""status, triage and logs name the same failure, and the one that ended the run."""

from __future__ import annotations

import json

import pytest

from hpctrain.runs.diagnose import Subject
from hpctrain.runs.records import read_run
from hpctrain.runs.status import observe
from hpctrain.runs.status_table import exit_code, show
from hpctrain.slurm.jobs import Answer
from hpctrain.triage.thresholds import Thresholds

STEP = "iteration {}/ 9 | lm_loss: {:.4f} |\n"
OOM = "[rank3]: torch.OutOfMemoryError: HIP out of memory. Tried to allocate 3.00 GiB\n"


def make(folder, *links):
    """A run of links as (mode, exit code, what their logs say)."""
    (folder / "logs").mkdir(parents=True)
    plan = {"run": "ft", "guard": {"target": 9, "layout": "deepspeed"}, "job": {"iterations": 9}}
    (folder / "plan.json").write_text(json.dumps(plan))
    records = []
    for number, (mode, code, said) in enumerate(links, 1):
        job = str(10 + number)
        key = {"link": number, "job_id": job, "restart": 0, "mode": mode, "checkpoint": None}
        records.append({"event": "begin", "reason": f"why {number}", **key})
        words = {"stopped": "stops, as asked (the file STOP is there)", "gave_up": "gives up (why)"}
        log = f"hpctrain: job {job}, restart 0, 1 nodes: n1\n"
        log += f"hpctrain: link {number}: {words.get(mode, 'starts from scratch (why)')}\n"
        if mode not in words:
            records.append({"event": "end", "exit_code": code, "iteration": 0, **key})
            log += f"hpctrain: starting: {mode}, link {number}, 4 tasks, rendezvous n1:1\n"
            log += f"{said}hpctrain: finished rc={code}\n"
        (folder / "logs" / f"ft-{job}.out").write_text(log)
    (folder / "links.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def judged(folder):
    run = read_run(str(folder))
    nobody = Answer({}, {}, ("Slurm was not asked",))
    diagnosis = Subject(list(run.logs), Thresholds(), run, nobody).diagnose()
    (status,) = observe([str(folder)], ask_slurm=False)
    return diagnosis, status


@pytest.mark.parametrize("last", ["stopped", "gave_up"])
def test_a_failure_that_nothing_got_over_is_the_verdict_and_the_state(tmp_path, last, capsys):
    """The only start that trained died of GPU memory; the link after it only saw STOP, or gave up."""
    run = make(tmp_path, ("scratch", 1, STEP.format(1, 2.5) + OOM), (last, None, ""))
    diagnosis, status = judged(run)
    assert (diagnosis.verdict, diagnosis.cause.event.failure) == ("RED", "gpu_oom")
    assert diagnosis.cause.attempt.link == 1 and "out of memory" in diagnosis.summary
    assert ("gave up" in diagnosis.summary) == (last == "gave_up")
    assert status.state == ("failed" if last == "stopped" else "gave up")
    assert exit_code([status]) == 1
    show([status], 0)
    first = capsys.readouterr().out.splitlines()[1]
    assert first.startswith("cause: link 1, job 11: GPU out of memory")


def test_what_a_later_start_got_over_is_no_failure_of_the_run(tmp_path):
    steps = "".join(STEP.format(n, 2.5 - n / 10) for n in range(1, 9))
    links = [("scratch", 1, steps + OOM), ("scratch", 0, steps), ("stopped", None, "")]
    diagnosis, status = judged(make(tmp_path, *links))
    assert diagnosis.cause is None and diagnosis.verdict != "RED"
    assert status.state == "stopped"


def test_a_give_up_without_a_failure_before_it_is_its_own_cause(tmp_path):
    diagnosis, status = judged(make(tmp_path, ("gave_up", None, "")))
    assert (diagnosis.verdict, diagnosis.cause.event.failure) == ("RED", "gave_up")
    assert status.state == "gave up"
