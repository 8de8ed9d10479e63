"""The watcher beside a step: it knows a silence from work, ends a step that is stuck, does what the
run asks for when its figures are no numbers, and hurts nothing when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hpctrain.runtime import watch
from hpctrain.runtime.progress import Progress

LINES = {
    "hf": "{{'loss': 2.1, 'grad_norm': 1.0, 'learning_rate': 1e-05, 'epoch': {0}.5}}\n",
    "neox": " samples/sec: 1.5 | iteration {0:8d}/  900 | lm_loss: 2.1E+00 | grad norm: 0.9 |\n",
    "open-instruct": "INFO - finetune.py -   Step: {0}, LR: 0.00075, Loss: 6.26, TPS: 1341.9\n",
    "verl": "(TaskRunner pid=8) step:{0} - actor/pg_loss:0.1 - actor/grad_norm:0.2\n",
    "em-dpo": "train stats after {0} examples: {{'loss/train': '0.69', 'grad_norm': '12.1'}}\n",
    "titan": "[titan] 2026-05-18 - root - INFO - step: {0}  loss:  3.2  grad_norm:  0.8\n",
    "bar": "\r 3%|4  | {0}/900 [10:02<12:01,  2.02s/it]",
}


def grown(tmp_path, line, steps=10, every_s=10.0, floor_s=30.0):
    log = tmp_path / "log"
    log.write_text("")
    progress = Progress(str(log), floor_s, 0.0)
    state = None
    for step in range(1, steps + 1):
        with open(log, "a") as file:
            file.write(line.format(step))
        state = progress.look(step * every_s)
    return log, progress, state


@pytest.mark.parametrize("kind", LINES)
def test_the_steps_of_every_recipe_are_timed(tmp_path, kind):
    _, progress, state = grown(tmp_path, LINES[kind])
    assert state.median_s == 10.0 and state.limit_s == 50.0
    assert progress.look(149.0).silent_s < 50 < progress.look(151.0).silent_s
    assert state.num_bad == 0


def test_without_steps_that_are_known_no_silence_is_one(tmp_path):
    _, progress, _ = grown(tmp_path, "a line without any {0}\n")
    assert progress.look(1e6).limit_s is None


def test_any_output_is_a_sign_of_life_and_quiet_work_is_given_longer(tmp_path):
    log, progress, _ = grown(tmp_path, LINES["neox"])
    with open(log, "a") as file:
        file.write("NCCL INFO still here\n")
    assert progress.look(140.0).silent_s == 0.0
    with open(log, "a") as file:
        file.write("saving checkpoint at iteration 10\n")
    assert progress.look(150.0).limit_s == 200.0


def test_nan_counts_in_a_row_only(tmp_path):
    log, progress, _ = grown(tmp_path, LINES["neox"])
    for line, count in (("loss: nan\n", 1), ("loss: 2.0\n", 0), ("loss: nan\nloss=inf\n", 2)):
        with open(log, "a") as file:
            file.write(line)
        assert progress.look(0.0).num_bad == count


def test_a_log_that_is_cut_or_gone_is_read_on(tmp_path):
    log, progress, _ = grown(tmp_path, LINES["neox"])
    log.write_text(LINES["neox"].format(11))
    assert progress.look(110.0).step == "11"
    log.unlink()
    assert progress.look(120.0).silent_s == 10.0


@pytest.fixture
def run(tmp_path):
    plan = {
        "guard": {
            "schema_version": 1,
            "run": "r",
            "layout": "none",
            "checkpoint_dir": None,
            "start": None,
            "watch": "tell",
        }
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def watched(run, lines, policy="tell", wait_s=20.0, hang_s="0.6"):
    """What the watcher says of a step that writes `lines` and is then silent; whether it ended it;
    what it recorded."""
    plan = json.loads((run / "plan.json").read_text())
    plan["guard"]["watch"] = policy
    (run / "plan.json").write_text(json.dumps(plan))
    log = run / "log"
    step = subprocess.Popen(["sleep", "60"])
    environ = {**os.environ, "HPCTRAIN_HANG_S": hang_s, "SLURM_JOB_ID": "7", "HPCTRAIN_LINK": "2"}
    argv = [sys.executable, "-B", os.path.join(os.path.dirname(watch.__file__), "__main__.py")]
    argv += ["watch", "--run-dir", str(run), "--step", str(step.pid), "--every", "0.05"]
    reaper = threading.Thread(target=step.wait)
    reaper.start()
    try:
        with open(log, "ab") as output:
            watcher = subprocess.Popen(argv, stdout=output, stderr=output, env=environ)
        time.sleep(2.5)  # it reads what is written after its start
        for line in lines:
            with open(log, "a") as file:
                file.write(line)
            time.sleep(0.15)
        try:
            watcher.wait(wait_s)
        except subprocess.TimeoutExpired:
            watcher.terminate()
            watcher.wait()
        reaper.join(1.0)
        ended = step.returncode == -signal.SIGTERM
    finally:
        step.kill()
        reaper.join()
    records = run / "links.jsonl"
    told = records.read_text().splitlines() if records.is_file() else []
    return log.read_text(), ended, [json.loads(line) for line in told]


def test_a_step_that_is_stuck_is_ended_after_its_stacks_were_kept(run):
    said, ended, records = watched(run, [LINES["verl"].format(i) for i in range(12)])
    assert ended and "the step ends now: no word for" in said
    (record,) = records
    assert (record["mode"], record["link"], record["job_id"]) == ("stuck", 2, "7")
    assert os.path.exists(record["reason"].rpartition("stacks: ")[2])


def test_a_step_whose_length_is_unknown_or_that_is_not_watched_is_let_be(run):
    few = [LINES["verl"].format(i) for i in range(3)]
    many = [LINES["verl"].format(i) for i in range(12)]
    for lines, policy in ((few, "tell"), (many, "off")):
        _, ended, records = watched(run, lines, policy, wait_s=3.0)
        assert not ended and not records


@pytest.mark.parametrize("policy", ["tell", "save_and_stop", "hold"])
def test_figures_that_are_no_numbers_are_told_and_the_runs_wish_is_done(run, policy):
    lines = [LINES["titan"].format(i).replace("3.2", "nan") for i in range(6)]
    _, ended, records = watched(run, lines, policy, wait_s=3.0, hang_s="60")
    assert [record["mode"] for record in records] == ["red"]
    assert (run / "STOP").exists() == (policy != "tell")
    assert ended == (policy == "hold")


def test_a_watcher_that_fails_says_so_and_the_step_goes_on(run):
    (run / "links.jsonl").mkdir()
    lines = [LINES["verl"].format(i) for i in range(12)]
    said, ended, _ = watched(run, lines, wait_s=4.0)
    assert "nobody watches the steps any more" in said and not ended
