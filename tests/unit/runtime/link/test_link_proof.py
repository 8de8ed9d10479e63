"""A link acts on proof: what it cannot tell it refuses, what it cannot read it leaves, and it owns
no room in the framework's folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import checkpoints
import pytest

from hpctrain.runtime import judging, shards
from hpctrain.runtime.settings import GuardError

from .conftest import Run


def names(folder):
    return sorted(os.listdir(folder))


def test_hpctrain_leaves_nothing_in_the_frameworks_folder(run):
    assert run.begin(1)["mode"] == "scratch"
    assert names(run.ckpt) == []  # "output directory is not empty" is said by several frameworks
    run.save(10)
    run.end(0)
    assert names(run.ckpt) == ["global_step10", "latest"]


def test_a_lock_of_an_earlier_version_is_respected_and_cleared(run):
    run.ckpt.mkdir()
    held = {"job_id": "5", "restart": 0, "host": "x", "pid": 0, "run": "old", "cluster": ""}
    (run.ckpt / ".hpctrain-lock.000003").write_text(json.dumps(held))
    run.fake("scontrol", 'echo "JobId=$4 JobState=RUNNING Restarts=0"')
    refused = run.call("begin", "--link", 1)
    assert refused.returncode == 1 and "is running and works in" in refused.stderr
    assert names(run.ckpt) == [".hpctrain-lock.000003"]
    run.fake("scontrol", 'echo "JobId=$4 JobState=TIMEOUT Restarts=0"')
    assert run.begin(1)["mode"] == "scratch"
    assert names(run.ckpt) == []


def test_where_the_folder_beside_cannot_be_made_the_run_directory_takes_it_and_that_is_said(run):
    run.ckpt.mkdir()
    run.aside.write_text("a file that is in the way")
    run.save(10)
    checkpoints.partial_save(str(run.ckpt), 20, [3, 0], 1, 2)
    assert run.begin(1)["iteration"] == "10"
    assert "cannot be written: locks and what is set aside go to" in run.said
    assert "interrupted-global_step20" in names(run.dir / "checkpoints.hpctrain")


def test_a_checkpoint_that_nobody_has_a_rule_for_is_never_moved_nor_passed_over(quick):
    quick.save(10)
    odd = quick.ckpt / "global_step20"
    odd.mkdir()
    (odd / "shard.orbax").write_bytes(b"x")
    before = checkpoints.snapshot(str(quick.ckpt))
    assert quick.begin(1)["decision"] == "gave_up"
    assert "`global_step20` is newer than `global_step10`" in quick.records()[-1]["reason"]
    assert checkpoints.snapshot(str(quick.ckpt)) == before


@pytest.mark.parametrize(
    ("name", "files", "layout"),
    [
        (
            "checkpoint-500",
            {"trainer_state.json": b'{"global_step": 500}', "optimizer.pt": None},
            "hf-trainer",
        ),
        ("iter_0000500", {"mp_rank_00/model_optim_rng.pt": None}, "megatron"),
        ("step500", {"train/rank0.pt": None, ".metadata.json": b"{}"}, "olmo-core"),
    ],
)
def test_another_writers_checkpoints_are_not_an_empty_folder(quick, name, files, layout):
    for file, content in files.items():
        path = quick.ckpt / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content or checkpoints.torch_file({"step": 500}))
    before = checkpoints.snapshot(str(quick.ckpt))
    assert quick.begin(1)["decision"] == "gave_up"
    reason = quick.records()[-1]["reason"]
    assert f"`{name}`" in reason and f"`recipe_options: {{layout: {layout}}}`" in reason
    assert checkpoints.snapshot(str(quick.ckpt)) == before
    assert quick.records()[-1]["event"] == "begin"


def test_a_tag_of_ones_own_is_a_checkpoint_that_latest_names(quick):
    quick.save(10)
    os.rename(quick.ckpt / "global_step10", quick.ckpt / "epoch3")
    (quick.ckpt / "latest").write_text("epoch3")
    found = quick.begin(1)
    assert (found["mode"], found["checkpoint"]) == ("resume", str(quick.ckpt / "epoch3"))
    assert found["iteration"] == ""  # nothing says it, and 0 would be a lie
    assert (quick.ckpt / "latest").read_text() == "epoch3"


def test_of_tags_of_ones_own_the_newest_whole_one_is_gone_on_from(quick):
    for tag, step in (("epoch2", 20), ("epoch4", 40)):
        quick.save(step, name=tag)
        model = quick.ckpt / tag / "mp_rank_00_model_states.pt"
        told = {
            "dp_world_size": 2,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": 1}},
        }
        model.write_bytes(checkpoints.torch_file({**told, "global_steps": step}))
    os.unlink(quick.ckpt / "epoch4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    found = quick.begin(1)
    assert (found["mode"], found["iteration"], found["checkpoint"]) == (
        "resume",
        "20",
        str(quick.ckpt / "epoch2"),
    )
    assert (quick.ckpt / "latest").read_text() == "epoch2"
    assert "interrupted-epoch4" in names(quick.aside)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT])
def test_what_cannot_be_read_decides_nothing_and_changes_nothing(quick, monkeypatch, number):
    quick.save(10)
    quick.save(20)
    before = checkpoints.snapshot(str(quick.ckpt))

    def away(path, *flags):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(shards, "open_state", away)
    with pytest.raises(GuardError, match="nothing was changed"):
        quick.begin(1)
    assert checkpoints.snapshot(str(quick.ckpt)) == before
    assert quick.records() == [] and not quick.scancelled.exists()
    monkeypatch.undo()
    assert quick.begin(1)["iteration"] == "20"


def test_an_older_checkpoint_that_cannot_be_read_is_not_asked(quick, monkeypatch):
    quick.save(10)
    quick.save(20)
    judge = judging.judge_as

    def only_the_newest(layout, path, *rest):
        assert not path.endswith("global_step10")
        return judge(layout, path, *rest)

    monkeypatch.setattr("hpctrain.runtime.layouts.judge_as", only_the_newest)
    assert quick.begin(1)["iteration"] == "20"


def test_a_colleagues_umask_is_no_damage():
    """As a user that may not read them: root may read anything, so the guard runs as nobody."""
    top = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        run = Run(top)
        run.save(10)
        inside = run.ckpt / "global_step10"
        os.chmod(top, 0o755)
        if os.getuid() == 0:
            for path in [top, *top.rglob("*")]:
                if path != inside and inside not in path.parents:
                    os.chown(path, 65534, 65534)
        else:
            os.chmod(inside, 0)
        os.chmod(inside, 0o700 if os.getuid() == 0 else 0)
        before = names(run.ckpt)
        runtime = run.dir / "runtime" / "__main__.py"
        command = [
            sys.executable,
            "-B",
            str(runtime),
            "begin",
            "--run-dir",
            str(run.dir),
            "--link",
            "1",
        ]
        as_nobody = {"user": 65534, "group": 65534} if os.getuid() == 0 else {}
        python = shutil.which("python3", path="/usr/bin:/bin")
        command[0] = python or sys.executable
        done = subprocess.run(
            command, env=run.environment(), capture_output=True, text=True, check=False, **as_nobody
        )
        assert done.returncode == 1 and "Permission denied" in done.stderr, done.stderr
        assert "nothing was changed" in done.stderr
        assert names(run.ckpt) == before and run.records() == []
    finally:
        subprocess.run(["chmod", "-R", "u+rwx", str(top)], check=False)
        shutil.rmtree(top)


@pytest.mark.parametrize("odd", ["pipe", "folder", "loop", "zero", "huge"])
@pytest.mark.parametrize("name", ["latest", "links.jsonl", "ledger.jsonl"])
def test_odd_state_files_neither_hold_nor_end_a_guard(run, name, odd):
    run.save(10)
    path = str((run.ckpt if name == "latest" else run.dir) / name)
    if os.path.exists(path):
        os.unlink(path)
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": lambda: os.mkdir(path),
        "loop": lambda: os.symlink(path, path),
        "zero": lambda: os.symlink("/dev/zero", path),
        "huge": lambda: (open(path, "w").close(), os.truncate(path, 1 << 33)),
    }[odd]()
    found = run.begin(1)
    assert (found["mode"], found["iteration"]) == ("resume", "10")
    assert (run.ckpt / "latest").read_text() == "global_step10"


@pytest.mark.parametrize(
    ("rule", "whole"),
    [
        ({"pattern": "ckpt_{iteration}", "marker": "DONE"}, {"w.bin": b"x", "DONE": b""}),
        (
            {"pattern": "run*-{iteration}", "files": ["model.pt", "opt.pt"]},
            {"model.pt": None, "opt.pt": None},
        ),
        (
            {
                "pattern": "{iteration}",
                "marker": "DONE",
                "tracker": "latest.txt",
                "tracker_holds": "iteration",
            },
            {"DONE": b""},
        ),
    ],
)
def test_a_layout_of_ones_own_is_chained_like_any(tmp_path, rule, whole):
    run = Run(tmp_path, layout="own", own_layout=rule)
    run.python = None
    form = rule["pattern"].replace("*", "7").replace("{iteration}", "{}")

    def save(step, files):
        for file, content in files.items():
            path = run.ckpt / form.format(step) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(checkpoints.torch_file({}) if content is None else content)

    save(10, whole)
    save(20, dict(list(whole.items())[:-1]))
    (run.ckpt / form.format(20)).mkdir(exist_ok=True)
    if "tracker" in rule:
        (run.ckpt / rule["tracker"]).write_text("20")
    found = run.begin(1)
    assert (found["mode"], found["iteration"]) == ("resume", "10")
    assert names(run.aside)[-1] == "interrupted-" + form.format(20)
    if "tracker" in rule:
        assert (run.ckpt / rule["tracker"]).read_text() == "10"


@pytest.mark.parametrize(("holds", "text"), [("iteration", "10"), ("name", "ckpt_10")])
def test_a_lost_tracker_of_a_layout_of_ones_own_is_written_again(tmp_path, holds, text):
    """The program would find no checkpoint without it, and begin anew."""
    rule = {"pattern": "ckpt_{iteration}", "marker": "DONE", "tracker": "newest.txt"}
    run = Run(tmp_path, layout="own", own_layout={**rule, "tracker_holds": holds})
    run.python = None
    (run.ckpt / "ckpt_10").mkdir(parents=True)
    (run.ckpt / "ckpt_10" / "DONE").touch()
    found = run.begin(1)
    assert (found["mode"], found["iteration"]) == ("resume", "10")
    assert (run.ckpt / "newest.txt").read_text() == text


def test_other_ranks_than_the_checkpoints_end_the_chain_before_the_framework_does(quick):
    quick.save(10)
    quick.write_plan(data_parallel=4)
    assert quick.begin(1)["decision"] == "gave_up"
    assert "DeepSpeed refuses another number" in quick.records()[-1]["reason"]
    quick.write_plan(data_parallel=4, any_ranks=1)
    assert quick.begin(2, job="8")["mode"] == "resume"


def test_a_start_at_the_runs_last_step_trains_nothing_and_says_so(quick):
    quick.base()
    quick.write_plan(target=50, start_counts=True)
    assert quick.begin(1)["decision"] == "gave_up"
    assert "the run's last step is 50: nothing to train" in quick.records()[-1]["reason"]


def test_a_link_that_ends_beside_a_folder_it_cannot_tell_warns(quick):
    quick.begin(1)
    odd = quick.ckpt / "checkpoint-500"
    odd.mkdir(parents=True)
    (odd / "optimizer.pt").write_bytes(checkpoints.torch_file({}))
    quick.python = sys.executable
    done = quick.call("end", "--exit-code", 0)
    assert (
        "newest complete checkpoint: none" in done.stderr
        and "warning: there are checkpoints" in done.stderr
    )


def test_megatron_bridges_own_tracker_follows_the_chosen_checkpoint(tmp_path):
    run = Run(tmp_path, layout="megatron", data_parallel=None, zero_stage=None)
    run.python = None
    for step in (10, 20):
        folder = run.ckpt / f"iter_{step:07d}"
        (folder / "mp_rank_00").mkdir(parents=True)
        (folder / "mp_rank_00" / "model_optim_rng.pt").write_bytes(
            checkpoints.torch_file({"iteration": step})
        )
        (folder / "train_state.pt").write_bytes(checkpoints.torch_file({"step": step}))
    shutil.copy(run.ckpt / "iter_0000020" / "train_state.pt", run.ckpt / "latest_train_state.pt")
    os.truncate(run.ckpt / "iter_0000020" / "mp_rank_00" / "model_optim_rng.pt", 40)
    assert run.begin(1)["iteration"] == "10"
    own = (run.ckpt / "iter_0000010" / "train_state.pt").read_bytes()
    assert (run.ckpt / "latest_train_state.pt").read_bytes() == own
