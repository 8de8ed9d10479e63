"""What a link does when it starts, from what lies in the checkpoint folder; on the oldest Python that must run it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import checkpoints
import pytest

from hpctrain.runtime import history
from hpctrain.runtime import link as guard
from hpctrain.runtime.lock import _job_state
from hpctrain.runtime.settings import parse_settings
from hpctrain.runtime.survey import start_link, start_number

RUNTIME = Path(history.__file__).parent
# Python 3.6 where this machine has one; the syntax of the oldest is checked for everybody by the next test.
OLD = sorted(map(str, (Path.home() / ".pyenv/versions").glob("3.6.*/bin/python")))
PYTHONS = [sys.executable, *OLD[:1]]


class Run:
    """A run directory with nothing but plan.json and runtime/, and the guard in a process of its own."""

    def __init__(self, top: Path, **guard):
        self.dir, self.ckpt = top / "run dir", top / "ckpt's"
        self.start = str(top / "base" / "global_step50")
        self.guard = {
            "schema_version": 1, "run": "ft", "layout": "deepspeed", "checkpoint_dir": str(self.ckpt), "start": None,
            "tensor_parallel": 1, "pipeline_parallel": 0, "data_parallel": 2, "zero_stage": 1, "target": 300,
            "give_up_after": 3, "after_each": None, "quarantine": True, "counter": "latest", **guard,
        }  # fmt: skip
        self.dir.mkdir(parents=True)
        (top / "logs").mkdir(exist_ok=True)
        shutil.copytree(RUNTIME, self.dir / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
        self.python = sys.executable
        self.bin = top / "bin"
        self.bin.mkdir(exist_ok=True)
        self.scancelled = top / "scancelled"
        self.fake("scancel", f'printf "%s\\n" "$@" >> {shlex.quote(str(self.scancelled))}')
        self.fake("scontrol", 'echo "JobId=$4 JobState=TIMEOUT Restarts=0"')
        self.write_plan()

    def write_plan(self, **changes):
        self.guard.update(changes)
        (self.dir / "plan.json").write_text(json.dumps({"guard": self.guard}))

    def fake(self, name, body):
        (self.bin / name).write_text("#!/bin/sh\n" + body + "\n")
        (self.bin / name).chmod(0o755)

    def environment(self, job="7", restart=0, **env):
        return {"PATH": f"{self.bin}:/usr/bin:/bin", "SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart),
                "SLURM_JOB_NODELIST": "nid[01-02]", "HPCTRAIN_LOCK_WAIT_S": "0.2", **env}  # fmt: skip

    def call(self, *args, **env):
        command = [
            self.python or sys.executable,
            "-B",
            str(self.dir / "runtime" / "__main__.py"),
            args[0],
            "--run-dir",
            str(self.dir),
        ]
        return subprocess.run(
            [*command, *map(str, args[1:])],
            env=self.environment(**env),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def begin(self, link=None, **env):
        if self.python is None:  # in this process: the same function, without the start of a Python
            said = []
            with mock.patch.dict(os.environ, self.environment(**env), clear=True):
                found = guard.begin(str(self.dir), link, os.environ, said.append)
            self.said = "\n".join(said)
            return {key[len("HPCTRAIN_") :].lower(): value for key, value in found.items()}
        done = self.call("begin", *(["--link", link] if link else []), **env)
        assert done.returncode == 0, done.stderr
        self.said = done.stderr
        found = dict(line.split("=", 1) for line in done.stdout.splitlines())
        return {
            key[len("HPCTRAIN_") :].lower(): shlex.split(value)[0] if value != "''" else ""
            for key, value in found.items()
        }

    def end(self, code=0, **env):
        if self.python is None:
            with mock.patch.dict(os.environ, self.environment(**env), clear=True):
                return guard.end(str(self.dir), code, os.environ, lambda text: None)
        done = self.call("end", "--exit-code", code, **env)
        assert done.returncode == 0, done.stderr

    def link(self, number, **kwargs):
        """A link that ends without a checkpoint."""
        found = self.begin(number, job=str(100 + number), **kwargs)
        if found["decision"] == "run":
            self.end(1, job=str(100 + number), **kwargs)
        return found

    def records(self, name="links.jsonl"):
        return history_records(self.dir / name)

    def save(self, step, **kwargs):
        return checkpoints.save(str(self.ckpt), step, 1, 2, **kwargs)

    def base(self, name="global_step50", **kwargs):
        self.start = checkpoints.save(os.path.dirname(self.start), 50, 1, 2, name=name, **kwargs)
        self.write_plan(start=self.start)
        return self.start


def history_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(params=PYTHONS, ids=lambda path: "this" if path == sys.executable else "3.6")
def run(tmp_path, request):
    found = Run(tmp_path)
    found.python = request.param
    return found


@pytest.fixture
def quick(tmp_path):
    found = Run(tmp_path)
    found.python = None
    return found


def test_runtime_is_python_3_6(tmp_path):
    import ast

    for path in RUNTIME.glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 6))
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])  # fmt: skip
            if path.name == "preflight.py":  # measures with the collectives that it finds there, if any
                modules = [module for module in modules if module.split(".")[0] not in ("mpi4py", "torch")]
            for module in modules:
                assert module.split(".")[0] in sys.stdlib_module_names if hasattr(sys, "stdlib_module_names") else True
                assert module.split(".")[0] not in ("dataclasses", "zoneinfo", "tomllib", "graphlib", "contextvars"), (
                    path
                )


def test_nothing_there_and_no_start_is_from_scratch(run):
    assert run.begin(1) == {"decision": "run", "mode": "scratch", "checkpoint": "", "iteration": "0", "link": "1"}


def test_a_start_is_bootstrapped_and_finetuned_from_once(run):
    run.write_plan(target=49)
    run.base("_global_step50_backup")
    found = run.begin(1)
    assert found["mode"] == "finetune"
    assert os.readlink(run.ckpt / "global_step50") == "../base/_global_step50_backup"
    assert (run.ckpt / "latest").read_bytes() == b"global_step50"
    assert "`_global_step50_backup` is iteration 50; its link is called `global_step50`" in run.said
    run.save(10)
    run.end(1)
    assert run.begin(2, job="8")["mode"] == "resume"
    assert run.records()[-1]["checkpoint"] == "global_step10"
    assert {**run.records()[1], "time": ""} == {
        "event": "end", "link": 1, "job_id": "7", "restart": 0, "mode": "finetune", "checkpoint": "global_step10", "iteration": 10,
        "exit_code": 1, "nodes": "nid[01-02]", "reason": "exit code 1", "time": ""}  # fmt: skip


def test_made_since_is_not_a_greater_number(run):
    """Upstream NeoX counts from 0 after a finetune: 10 is newer than 50."""
    run.write_plan(target=49)
    run.base()
    run.begin(1)
    run.save(10)
    (run.ckpt / "latest").write_text("global_step50")  # cut off before it was named
    found = run.begin(2, job="8")
    assert (found["mode"], found["iteration"], os.path.basename(found["checkpoint"])) == (
        "resume",
        "10",
        "global_step10",
    )
    assert (run.ckpt / "latest").read_text() == "global_step10"


def test_a_folder_bootstrapped_under_the_other_name_is_taken_as_it_is(quick):
    """An earlier version's link, or a plan that had a greater target then: nothing is made twice, nothing is renamed."""
    quick.base()
    assert quick.begin(1)["mode"] == "finetune" and (quick.ckpt / "latest").read_text() == "start-50"
    quick.end(1)
    quick.write_plan(target=49)
    found = quick.begin(2, job="8")
    assert (found["mode"], found["checkpoint"]) == ("finetune", str(quick.ckpt / "start-50"))
    assert sorted(name for name in os.listdir(quick.ckpt) if name[0] != ".") == ["latest", "start-50"]
    assert (quick.ckpt / "latest").read_text() == "start-50"
    quick.save(10)
    assert quick.begin(3, job="9")["mode"] == "resume"
    assert sorted(name for name in os.listdir(quick.ckpt) if name[0] != ".") == ["global_step10", "latest", "start-50"]


def test_a_harmless_link_keeps_its_name_through_the_whole_run(quick):
    quick.write_plan(target=49)
    quick.base()
    quick.begin(1)
    quick.save(10)
    quick.end(1)
    assert quick.begin(2, job="8")["mode"] == "resume"
    assert sorted(name for name in os.listdir(quick.ckpt) if name[0] != ".") == [
        "global_step10",
        "global_step50",
        "latest",
    ]


def test_a_link_made_by_hand_gets_the_safe_name_before_the_framework_can_stumble_over_it(quick):
    quick.base()
    quick.ckpt.mkdir()
    os.symlink("../base/global_step50", quick.ckpt / "global_step50")
    (quick.ckpt / "latest").write_text("global_step50")
    assert quick.begin(1)["mode"] == "finetune"
    assert (quick.ckpt / "latest").read_text() == "start-50"
    assert "not `global_step50`: the run counts from 0 to 300" in quick.said
    os.rename(quick.ckpt / "start-50", quick.ckpt / "global_step50")
    quick.save(10)
    assert quick.begin(2, job="8")["mode"] == "resume"
    assert sorted(name for name in os.listdir(quick.ckpt) if name[0] != ".") == ["global_step10", "latest", "start-50"]


@pytest.mark.parametrize("text", ["", "\n", "global_step999", "../base/global_step50", "\0\0\0", "global_step20"])
def test_a_bad_latest_falls_back_to_the_newest_complete(quick, text):
    quick.save(10)
    quick.save(20)
    os.unlink(quick.ckpt / "global_step20" / "mp_rank_00_model_states.pt")
    (quick.ckpt / "latest").write_text(text)
    found = quick.begin(1)
    assert (found["mode"], found["iteration"]) == ("resume", "10")
    assert (quick.ckpt / "latest").read_text() == "global_step10"
    assert sorted(name for name in os.listdir(quick.ckpt) if not name.startswith(".")) == [
        "global_step10", "interrupted-20", "latest"]  # fmt: skip
    assert quick.records()[0]["reason"].count("latest")


def test_a_missing_latest_falls_back(quick):
    quick.save(10)
    os.unlink(quick.ckpt / "latest")
    assert quick.begin(1)["mode"] == "resume"


def test_shards_of_an_interrupted_save_never_mix_with_those_of_the_next(quick):
    quick.save(10)
    checkpoints.partial_save(str(quick.ckpt), 20, [6, 1], 1, 2, lineage="first")
    quick.begin(1)
    checkpoints.partial_save(str(quick.ckpt), 20, [0, 3], 1, 2, lineage="second")
    assert quick.begin(2, job="8")["iteration"] == "10"  # the two halves would have looked like one whole
    assert {"interrupted-20", "interrupted-20.2"} < set(os.listdir(quick.ckpt))


def test_a_save_cut_off_before_latest_is_not_lost(quick):
    quick.save(10)
    text = (quick.ckpt / "latest").read_text()
    before = os.stat(quick.ckpt / "latest")
    quick.save(20)
    (quick.ckpt / "latest").write_text(text)
    os.utime(quick.ckpt / "latest", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert quick.begin(1)["iteration"] == "20"


def test_who_went_back_by_hand_is_obeyed_and_the_newer_ones_are_kept_aside(quick):
    quick.save(10)
    quick.save(20)
    (quick.ckpt / "latest").write_text("global_step10")
    assert quick.begin(1)["iteration"] == "10"
    assert (quick.ckpt / "aside-20").is_dir()
    assert not (quick.ckpt / "global_step20").exists()


def test_done_cancels_the_successors_and_not_itself(run):
    run.save(300)
    ledger = [
        {"event": "submitted", "link": link, "job_id": str(40 + link), "depends_on": None} for link in range(1, 5)
    ]
    ledger.append({"event": "cancelled", "link": 4, "job_id": "44"})
    (run.dir / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ledger) + '{"event": "subm')
    assert run.begin(2, job="42")["decision"] == "done"
    assert run.scancelled.read_text().split() == ["43"]
    assert run.records("ledger.jsonl".replace("ledger", "links"))[-1]["mode"] == "done"
    lines = (run.dir / "ledger.jsonl").read_text().splitlines()
    assert lines[-2] == '{"event": "subm'
    assert json.loads(lines[-1])["event"] == "cancelled"


def test_a_start_never_counts_as_done(quick):
    quick.base()
    quick.write_plan(target=50)
    assert quick.begin(1)["mode"] == "finetune"


def test_stop_is_obeyed_before_anything_is_touched(quick):
    quick.base()
    (quick.dir / "STOP").write_text("")
    assert quick.begin(1)["decision"] == "stopped"
    assert not os.path.lexists(quick.ckpt / "latest")


def test_done_wins_over_stop_and_over_giving_up(quick):
    for number in (1, 2, 3):
        quick.link(number)
    quick.save(300)
    (quick.dir / "STOP").write_text("")
    assert quick.begin(4)["decision"] == "done"


def test_the_chain_gives_up_after_links_without_progress_and_says_why(quick):
    assert [quick.link(number)["decision"] for number in range(1, 5)] == ["run", "run", "run", "gave_up"]
    assert "3 links in a row" in quick.records()[6]["reason"]
    quick.save(10)  # progress after all
    assert quick.link(5)["mode"] == "resume"


def test_progress_resets_the_count(quick):
    for number in range(1, 9):
        assert quick.link(number)["decision"] == "run"
        if number % 2 == 0:
            quick.save(number)


def test_a_link_submitted_after_the_chain_gave_up_tries_again(quick):
    ledger = [{"event": "submitted", "link": link, "job_id": str(100 + link)} for link in range(1, 6)]
    (quick.dir / "ledger.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ledger))
    assert [quick.link(number)["decision"] for number in (1, 2, 3, 4, 5)][-2:] == ["gave_up", "gave_up"]
    assert [quick.link(number)["decision"] for number in (6, 7, 8, 9)] == ["run", "run", "run", "gave_up"]


def test_requeues_of_one_link_count_as_one_until_they_are_a_crash_loop(quick):
    decisions = [quick.begin(1, restart=restart)["decision"] for restart in range(10)]
    assert decisions == ["run"] * 9 + ["gave_up"]


def test_a_link_that_made_the_checkpoint_before_its_requeue_is_not_one_without_progress(quick):
    quick.begin(1, job="101")
    quick.save(10)
    quick.begin(1, job="101", restart=1)
    assert [quick.link(number)["decision"] for number in (2, 3, 4, 5)] == ["run", "run", "run", "gave_up"]


def test_a_requeue_keeps_its_link_number_and_a_hand_submitted_job_gets_the_next(quick):
    (quick.dir / "ledger.jsonl").write_text(json.dumps({"event": "submitted", "link": 4, "job_id": "70"}) + "\n")
    assert quick.begin(job="70")["link"] == "4"
    assert quick.begin(job="70", restart=1)["link"] == "4"
    assert quick.begin(job="71")["link"] == "5"


def test_a_half_copied_start_is_refused_with_its_reason(quick):
    quick.base()
    os.truncate(quick.start + "/mp_rank_00_model_states.pt", 30)
    found = quick.begin(1)
    assert found["decision"] == "gave_up"
    assert "mp_rank_00_model_states.pt" in quick.records()[0]["reason"]


def test_a_start_of_another_model_shape_is_refused(quick):
    quick.base()
    quick.write_plan(tensor_parallel=2)
    assert quick.begin(1)["decision"] == "gave_up"
    assert "model-parallel" in quick.records()[0]["reason"]


def test_a_start_from_another_number_of_nodes_is_fine(quick):
    quick.base()
    quick.write_plan(data_parallel=16)
    assert quick.begin(1)["mode"] == "finetune"


def test_checkpoints_removed_by_hand_mean_bootstrap_with_a_start_and_never_random_weights_without(tmp_path):
    run = Run(tmp_path / "a")
    run.base()
    run.link(1)
    run.save(10)
    run.link(2)
    shutil.rmtree(run.ckpt)
    assert run.begin(3)["mode"] == "finetune"
    assert "are gone" in run.records()[-1]["reason"]
    run = Run(tmp_path / "b")
    run.link(1)
    run.save(10)
    run.link(2)
    shutil.rmtree(run.ckpt)
    assert run.begin(3)["decision"] == "gave_up"
    assert "to begin again from scratch" in run.records()[-1]["reason"]


def test_a_latest_that_names_nothing_does_not_reach_a_run_from_scratch(quick):
    quick.ckpt.mkdir()
    (quick.ckpt / "latest").write_text("global_step9")
    assert quick.begin(1)["mode"] == "scratch"
    assert (quick.ckpt / "aside-latest").exists() and not (quick.ckpt / "latest").exists()


def test_the_forks_counter_sees_only_the_chosen_checkpoint(quick):
    quick.base()
    quick.write_plan(counter="greatest_folder", target=350)
    quick.begin(1)
    assert os.readlink(quick.ckpt / "global_step50")
    quick.save(60)
    checkpoints.partial_save(str(quick.ckpt), 70, [3, 0], 1, 2)
    shutil.copytree(quick.ckpt / "global_step60", quick.ckpt / "global_step65_bak")
    os.symlink("../base/global_step50", quick.ckpt / "global_step999")
    assert quick.begin(2, job="8")["iteration"] == "60"
    seen = [name for name in os.listdir(quick.ckpt) if "global_step" in name]
    assert sorted(seen) == ["global_step50", "global_step60"]


def test_nothing_of_the_start_ever_changes(quick):
    quick.base()
    before = checkpoints.snapshot(quick.start)
    quick.begin(1)
    quick.save(10)
    os.truncate(quick.ckpt / "global_step10" / "mp_rank_00_model_states.pt", 3)
    quick.end()
    quick.begin(2, job="8")
    assert checkpoints.snapshot(quick.start) == before


def test_two_links_at_once_the_second_does_not_start(run):
    run.begin(1, job="7")
    run.fake("scontrol", 'echo "JobId=$4 JobState=RUNNING Restarts=0"')
    done = run.call("begin", "--link", 2, job="8")
    assert done.returncode != 0 and done.stdout == ""
    assert "job 7 of run `ft` is running" in done.stderr
    run.end(0, job="7")
    assert run.begin(2, job="8")["decision"] == "run"


def test_a_dead_holders_lock_is_taken_and_a_slurm_that_cannot_tell_is_not_guessed(quick):
    quick.begin(1, job="7")
    quick.fake("scontrol", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    assert "cannot tell" in quick.call("begin", "--link", 2, job="8").stderr
    quick.fake("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert quick.begin(2, job="8")["decision"] == "run"
    assert "taken over" in quick.said


@pytest.mark.parametrize(("said", "restart", "state"), [
    ("JobId=1 JobState=RUNNING Restarts=0", 0, "alive"), ("JobId=1 JobState=RUNNING Restarts=1", 0, "dead"),
    ("JobId=1 JobState=PENDING Restarts=1", 0, "dead"), ("JobId=1 JobState=COMPLETING Restarts=0", 0, "ending"),
    ("JobId=1 JobState=NODE_FAIL Restarts=0", 0, "dead"), ("", 0, "dead"),
])  # fmt: skip
def test_what_slurm_says_of_a_holder(said, restart, state):
    assert _job_state(said, restart) == state


def test_a_holder_that_is_requeued_under_the_same_id_takes_its_own_lock(quick):
    quick.fake("scontrol", 'echo "JobId=$4 JobState=RUNNING Restarts=1"')
    quick.begin(1, job="7", restart=0)
    assert quick.begin(1, job="7", restart=1)["decision"] == "run"


@pytest.mark.parametrize("content", ["", "{", '{"guard": {}}', '{"guard": {"schema_version": 2}}', "[]"])
def test_a_damaged_plan_never_starts_a_job(quick, content):
    (quick.dir / "plan.json").write_text(content)
    done = quick.call("begin")
    assert done.returncode != 0 and done.stdout == "" and "plan.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("python", PYTHONS)
def test_any_path_comes_through_shell_and_locale(tmp_path, python):
    run = Run(tmp_path / "é'$(touch canary)\n`id` ")
    run.python = python
    run.save(10)
    done = run.call("begin", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    shell = subprocess.run(["bash", "-c", 'eval "$1"; printf %s "$HPCTRAIN_CHECKPOINT"', "x", done.stdout],
                           capture_output=True, text=True, cwd=tmp_path, check=True)  # fmt: skip
    assert shell.stdout == str(run.ckpt / "global_step10")
    assert not (tmp_path / "canary").exists()


def test_layout_none_is_done_when_an_earlier_link_ended_well(quick):
    quick.write_plan(layout="none", checkpoint_dir=None)
    assert quick.begin(1)["mode"] == "scratch"
    quick.end(0)
    (quick.dir / "ledger.jsonl").write_text('{"event": "submitted", "link": 2, "job_id": "8"}\n')
    assert quick.begin(2, job="8")["decision"] == "done"


def test_layout_none_runs_again_whenever_it_is_submitted_by_hand(quick):
    quick.write_plan(layout="none", checkpoint_dir=None)
    for number in range(1, 7):
        assert quick.begin(number, job=str(number))["decision"] == "run"
        quick.end(number % 2)


def test_made_tells_a_side_job_whether_its_link_made_a_checkpoint(quick):
    quick.begin(1)
    quick.save(10)
    quick.end(1)
    assert quick.call("made", "--link", 1).stdout == f"{quick.ckpt}/global_step10\n"
    quick.begin(2, job="8")  # killed without an end
    assert quick.call("made", "--link", 2).returncode == 1
    quick.save(20)
    assert quick.call("made", "--link", 2).stdout == f"{quick.ckpt}/global_step20\n"
    quick.begin(3, job="9")
    assert quick.call("made", "--link", 2).stdout == f"{quick.ckpt}/global_step20\n"
    assert quick.call("made", "--link", 3).returncode == 1


@pytest.mark.parametrize(("name", "number"), [
    ("global_step423858", 423858), ("_global_step423858_backup", 423858), ("_global_step_423858_backup", 423858), ("iter_0001000", 1000),
    ("checkpoint-12", 12), ("v2_global_step7_b3", 7), ("model-7", 7), ("v2-7b", None), ("final", None), ("step_3_step_4", None),
])  # fmt: skip
def test_the_iteration_in_a_starts_name(name, number):
    assert start_number("/x/" + name) == number


def test_a_start_without_a_number_is_refused_with_a_hint(quick):
    quick.base("final")
    assert quick.begin(1)["decision"] == "gave_up"
    assert "cannot be read from its name" in quick.records()[0]["reason"]


@pytest.mark.parametrize(("counter", "target", "retention", "name", "why"), [
    ("latest", 49, False, "global_step50", ""), ("latest", 50, False, "start-50", "its save at 50"), ("latest", 1337, False, "start-50", "to 1337"),
    ("latest", None, False, "start-50", "not known"), ("latest", 49, True, "start-50", "retention"),
    ("greatest_folder", 1337, True, "global_step50", ""), ("greatest_folder", None, False, "global_step50", ""),
])  # fmt: skip
def test_the_starts_link_has_the_frameworks_name_unless_that_does_harm(counter, target, retention, name, why):
    guard = {
        "schema_version": 1,
        "layout": "deepspeed",
        "checkpoint_dir": "/c",
        "start": "/b/global_step50",
        "target": target,
        "counter": counter,
        "retention": retention,
    }
    found, said = start_link(parse_settings(guard))
    assert found == name and why in said and bool(why) == bool(said)


def test_a_guard_that_cannot_write_does_not_start_the_job_and_the_next_one_goes_on(quick):
    """No more than 0 bytes may be written to any file, as with a full quota."""
    quick.save(10)
    (quick.ckpt / "latest").write_text("")
    command = 'ulimit -f 0; exec "$@"'
    done = subprocess.run(["bash", "-c", command, "x", sys.executable, "-B", str(quick.dir / "runtime" / "__main__.py"), "begin",
                           "--run-dir", str(quick.dir)], env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7"},
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode != 0 and done.stdout == "" and "Traceback" not in done.stderr
    assert quick.begin(1)["iteration"] == "10"


def test_watch_returns_when_a_checkpoint_was_made_after_the_stop_file_was_seen(quick):
    quick.save(10)
    watcher = subprocess.Popen([sys.executable, "-B", str(quick.dir / "runtime" / "__main__.py"), "watch", "--run-dir", str(quick.dir),
                                "--every", "0.1"])  # fmt: skip
    try:
        quick.save(20)
        with pytest.raises(subprocess.TimeoutExpired):
            watcher.wait(1)
        (quick.dir / "STOP").touch()
        checkpoints.partial_save(str(quick.ckpt), 30, [3, 0], 1, 2)
        with pytest.raises(subprocess.TimeoutExpired):
            watcher.wait(1)
        quick.save(30)
        assert watcher.wait(30) == 0
    finally:
        watcher.kill()
    quick.write_plan(layout="none")
    assert quick.call("watch").returncode == 1


def test_a_job_of_another_cluster_is_not_called_dead_because_this_one_does_not_know_it(quick):
    quick.begin(1, job="7", SLURM_CLUSTER_NAME="lumi")
    quick.fake("scontrol", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert "cannot tell" in quick.call("begin", "--link", 2, job="8", SLURM_CLUSTER_NAME="mahti").stderr
    assert quick.begin(2, job="8", SLURM_CLUSTER_NAME="lumi")["decision"] == "run"
